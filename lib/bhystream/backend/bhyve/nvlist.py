"""libnv's wire format, in which bhyve's checkpoint socket takes and gives messages.

A list is a header and then one pair after the other.  The descriptors that the
pairs name follow in a separate message, whose data is a single byte.
Only the types that bhyve's commands use are implemented: no nested lists, no arrays.

Both sides are strict.  bhyve's libnv refuses a malformed list.  The functions
here never trust the other end of a socket: they check a size against its cap
before they read so many bytes, and close a descriptor that no pair claims.

Source: FreeBSD sys/contrib/libnv/nvlist.c and bsd_nvpair.c (header, pairs),
lib/libnv/msgio.c (the descriptors' message), nv(9).
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bhystream.errors import FormatError

SIZE_CAP_BYTES = 64 << 10
"""The largest list read or written; a checkpoint request has about 150 bytes."""

DESCRIPTOR_CAP = 16
"""Far below the number that libnv puts into one message (84), so one message is always enough."""

NAME_CAP_BYTES = 2048
"""The longest name with its NUL: libnv's NV_NAME_MAX."""

_MAGIC = 0x6C
_VERSION = 0
_BIG_ENDIAN = 0x80

_NULL, _BOOL, _NUMBER, _STRING, _DESCRIPTOR, _BINARY = 1, 2, 3, 4, 6, 7

HEADER = struct.Struct("<BBBQQ")  # magic, version, flags, descriptors, size of the pairs
PAIR = struct.Struct("<BHQQ")  # type, size of the name with its NUL, size of the data, items
_U64 = struct.Struct("<Q")
_INT = array.array("i").itemsize


class Descriptor(NamedTuple):
    """A file descriptor as a value; pack() and receive() say who owns the descriptor."""

    fd: int


Value = None | bool | int | str | bytes | Descriptor


def _broken(text: str) -> FormatError:
    return FormatError(f"bad nvlist: {text}")


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise _broken(f"{text!r} holds a NUL")
    return raw + b"\0"


def _pack_value(value: Value, fds: list[int]) -> tuple[int, bytes]:
    """Return (type, data); a descriptor is appended to `fds`."""
    if value is None:
        return _NULL, b""
    if isinstance(value, bool):  # tested before int, because a bool is also an int
        return _BOOL, bytes([value])
    if isinstance(value, int):
        if not 0 <= value < 1 << 64:
            raise _broken(f"the number {value} has no 64 bits")
        return _NUMBER, _U64.pack(value)
    if isinstance(value, str):
        return _STRING, _text(value)
    if isinstance(value, Descriptor):
        fds.append(value.fd)
        return _DESCRIPTOR, _U64.pack(len(fds) - 1)
    if not value:
        raise _broken("libnv knows no empty binary value")
    return _BINARY, value


def pack(pairs: Mapping[str, Value]) -> tuple[bytes, list[int]]:
    """Return the list as bytes, and the descriptors that have to follow the list.

    The descriptors stay the caller's.  Raises FormatError if the format cannot
    express the list: a NUL in a string, a number that is negative or longer than
    64 bits, an empty binary value, a name or a list over its cap.
    """
    fds: list[int] = []
    out = bytearray()
    for name, value in pairs.items():
        raw = _text(name)
        if len(raw) > NAME_CAP_BYTES:
            raise _broken(f"a name has {len(raw)} bytes, at most {NAME_CAP_BYTES}")
        kind, data = _pack_value(value, fds)
        out += PAIR.pack(kind, len(raw), len(data), 0) + raw + data
    _check_caps(len(fds), len(out))
    return HEADER.pack(_MAGIC, _VERSION, 0, len(fds), len(out)) + out, fds


def _check_caps(nfds: int, size_bytes: int) -> None:
    if nfds > DESCRIPTOR_CAP:
        raise _broken(f"{nfds} descriptors, at most {DESCRIPTOR_CAP}")
    if size_bytes > SIZE_CAP_BYTES:
        raise _broken(f"{size_bytes} bytes, at most {SIZE_CAP_BYTES}")


def _unpack_header(raw: bytes) -> tuple[int, int]:
    """Return (number of descriptors, size of the pairs in bytes), both within their caps."""
    magic, version, flags, nfds, size_bytes = HEADER.unpack(raw)
    if magic != _MAGIC:
        raise _broken(f"it begins with {magic:#04x}")
    if version != _VERSION:
        raise _broken(f"version {version}")
    if flags & _BIG_ENDIAN:
        raise _broken("it is big endian")
    if flags:
        raise _broken(f"flags {flags:#04x}")
    _check_caps(nfds, size_bytes)
    return nfds, size_bytes


def _unpack_text(raw: bytes, what: str) -> str:
    if raw[-1:] != b"\0" or b"\0" in raw[:-1]:
        raise _broken(f"{what} does not end with its only NUL")
    return raw[:-1].decode("utf-8", "surrogateescape")


def _fixed(data: bytes, size_bytes: int, name: str) -> bytes:
    if len(data) != size_bytes:
        raise _broken(f"{name!r} has {len(data)} bytes of data instead of {size_bytes}")
    return data


def _unpack_value(kind: int, data: bytes, name: str, unclaimed: dict[int, int]) -> Value:
    """Return a value.

    unclaimed: index to descriptor; a descriptor that the value takes is removed.
    """
    if kind == _NULL:
        _fixed(data, 0, name)
        return None
    if kind == _BOOL:
        flag = _fixed(data, 1, name)[0]
        if flag > 1:
            raise _broken(f"{name!r} is a bool of {flag}")
        return bool(flag)
    if kind == _NUMBER:
        number: int = _U64.unpack(_fixed(data, 8, name))[0]
        return number
    if kind == _STRING:
        return _unpack_text(data, f"the value of {name!r}")
    if kind == _BINARY:
        if not data:
            raise _broken(f"{name!r} is an empty binary value")
        return data
    if kind == _DESCRIPTOR:
        index: int = _U64.unpack(_fixed(data, 8, name))[0]
        if index not in unclaimed:
            raise _broken(f"{name!r} names descriptor {index}, which did not come or is taken")
        return Descriptor(unclaimed.pop(index))
    raise _broken(f"{name!r} has type {kind}")


def _unpack_pair(data: memoryview, at: int, unclaimed: dict[int, int]) -> tuple[str, Value, int]:
    """Return the pair at an offset in bytes: (name, value, offset of the pair's end)."""
    if len(data) - at < PAIR.size:
        raise _broken("it is cut in a pair's header")
    kind, name_bytes, data_bytes, nitems = PAIR.unpack_from(data, at)
    at += PAIR.size
    if not 1 <= name_bytes <= NAME_CAP_BYTES:
        raise _broken(f"a name of {name_bytes} bytes")
    if len(data) - at < name_bytes + data_bytes:
        raise _broken("it is cut in a pair")
    name = _unpack_text(bytes(data[at : at + name_bytes]), "a name")
    at += name_bytes
    if nitems:
        raise _broken(f"{name!r} has type {kind} and {nitems} items")
    end: int = at + data_bytes
    return name, _unpack_value(kind, bytes(data[at:end]), name, unclaimed), end


def unpack(data: bytes, fds: Sequence[int]) -> dict[str, Value]:
    """Return the pairs of one whole list, header included.

    fds: the descriptors that came with the list, in order.  If unpack() raises,
    they stay the caller's; if it returns, each belongs to exactly one value.
    Raises FormatError if the bytes or the descriptors are not those of one list.
    """
    if len(data) < HEADER.size:
        raise _broken("it is cut in its header")
    nfds, size_bytes = _unpack_header(data[: HEADER.size])
    if len(data) - HEADER.size != size_bytes:
        raise _broken(f"{len(data) - HEADER.size} bytes of pairs instead of {size_bytes}")
    if len(fds) != nfds:
        raise _broken(f"{len(fds)} descriptors came instead of {nfds}")
    unclaimed = dict(enumerate(fds))
    pairs: dict[str, Value] = {}
    at = HEADER.size
    view = memoryview(data)
    while at < len(data):
        name, value, at = _unpack_pair(view, at, unclaimed)
        if name in pairs:
            raise _broken(f"{name!r} comes twice")
        pairs[name] = value
    if unclaimed:
        raise _broken(f"descriptor {min(unclaimed)} belongs to nothing")
    return pairs


def send(sock: socket.socket, pairs: Mapping[str, Value]) -> None:
    """Send one list over a Unix stream socket.  The list's descriptors stay the caller's.

    Raises FormatError as pack() does, and OSError as the socket does
    (TimeoutError if the socket has a time limit).
    """
    message, fds = pack(pairs)
    sock.sendall(message)
    if fds:
        # One control message per descriptor, all with a single byte of data, as libnv sends
        # them; the receiver reads exactly this byte.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd])) for fd in fds]
        sock.sendmsg([b"\0"], rights)


def _read(sock: socket.socket, size_bytes: int) -> bytes:
    """Read up to size_bytes, fewer at the end of the connection.

    recv(2) takes no descriptors, so the kernel closes any that arrive with these bytes.
    """
    got = bytearray()
    while len(got) < size_bytes:
        part = sock.recv(size_bytes - len(got))
        if not part:
            break
        got += part
    return bytes(got)


def _receive_fds(sock: socket.socket, nfds: int) -> list[int]:
    """Receive the message with nfds descriptors, which are then the caller's.

    The buffer has room for one more, so that one too many is noticed.
    """
    room_bytes = (nfds + 1) * socket.CMSG_SPACE(_INT)
    data, control, flags, _ = sock.recvmsg(1, room_bytes, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, raw in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", raw[: len(raw) - len(raw) % _INT])
    if data and len(fds) == nfds and not flags & socket.MSG_CTRUNC:
        return fds
    _close(fds)
    if not data:
        raise _broken("it ends before its descriptors")
    raise _broken(f"{len(fds)} descriptors came instead of {nfds}")


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def receive(sock: socket.socket) -> dict[str, Value] | None:
    """Receive one list from a Unix stream socket.

    Returns None if the connection ends before the first byte.  The caller has
    to close the descriptors in the list; they are close-on-exec.  If receive()
    raises, no descriptor is left open.  Raises FormatError if the list is
    malformed or the connection ends inside it, and OSError as the socket does.
    """
    header = _read(sock, HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        raise _broken("it is cut in its header")
    nfds, size_bytes = _unpack_header(header)
    pairs = _read(sock, size_bytes)
    fds = _receive_fds(sock, nfds) if nfds and len(pairs) == size_bytes else []
    try:
        return unpack(header + pairs, fds)
    except FormatError:
        _close(fds)
        raise
