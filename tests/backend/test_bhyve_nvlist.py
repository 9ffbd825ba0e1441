"""libnv's wire format: exact to the byte, and safe against any bytes from a socket."""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from bhystream.backend.bhyve import nvlist
from bhystream.backend.bhyve.nvlist import Descriptor, Value
from bhystream.errors import FormatError

# Written by hand from libnv's structures, not with the code under test.
REQUEST = bytes.fromhex(
    "6c000000000000000000005c00000000000000"
    "0404000b000000000000000000000000000000636d6400636865636b706f696e7400"
    "0409000200000000000000000000000000000066696c656e616d65006100"
    "0208000100000000000000000000000000000073757370656e640001"
)


def header(nfds: int, size: int, *, magic: int = 0x6C, version: int = 0, flags: int = 0) -> bytes:
    return struct.pack("<BBBQQ", magic, version, flags, nfds, size)


def pair(
    kind: int, name: bytes, data: bytes, *, nitems: int = 0, data_size: int | None = None
) -> bytes:
    size = len(data) if data_size is None else data_size
    return struct.pack("<BHQQ", kind, len(name), size, nitems) + name + data


def whole(*pairs: bytes, nfds: int = 0) -> bytes:
    body = b"".join(pairs)
    return header(nfds, len(body)) + body


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        theirs.settimeout(20)
        yield ours, theirs


def test_a_request_is_libnv_s_to_the_byte() -> None:
    request: dict[str, Value] = {"cmd": "checkpoint", "filename": "a", "suspend": True}
    assert nvlist.pack(request) == (REQUEST, [])
    assert nvlist.unpack(REQUEST, []) == request


def test_the_headers_have_the_sizes_of_libnv_s_packed_structures() -> None:
    assert nvlist.HEADER.size == 19
    assert nvlist.PAIR.size == 19


def test_a_descriptor_is_written_as_its_index_and_announced() -> None:
    raw, fds = nvlist.pack({"a": Descriptor(70), "b": Descriptor(71)})
    assert fds == [70, 71]
    assert raw == whole(pair(6, b"a\0", bytes(8)), pair(6, b"b\0", b"\1" + bytes(7)), nfds=2)
    assert nvlist.unpack(raw, [90, 91]) == {"a": Descriptor(90), "b": Descriptor(91)}


def test_every_type_comes_back_as_it_was() -> None:
    pairs: dict[str, Value] = {
        "null": None,
        "yes": True,
        "no": False,
        "zero": 0,
        "most": (1 << 64) - 1,
        "empty": "",
        "text": "Gr\u00fc\u00dfe",
        "raw": os.fsdecode(b"\xff\xfe"),
        "binary": b"\0\1",
    }
    raw, fds = nvlist.pack(pairs)
    back = nvlist.unpack(raw, fds)
    assert back == pairs
    assert {name: type(value) for name, value in back.items()} == {
        name: type(value) for name, value in pairs.items()
    }


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ({"a": "x\0y"}, "NUL"),
        ({"a\0b": 1}, "NUL"),
        ({"a": -1}, "64 bits"),
        ({"a": 1 << 64}, "64 bits"),
        ({"a": b""}, "empty binary"),
        ({"n" * 2048: 1}, "a name has 2049 bytes"),
        ({"a": "x" * (64 << 10)}, "at most 65536"),
        ({str(n): Descriptor(n) for n in range(17)}, "17 descriptors"),
    ],
)
def test_what_the_format_cannot_say_is_not_packed(pairs: dict[str, Value], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        nvlist.pack(pairs)


GOOD = pair(3, b"n\0", bytes(8))

MALFORMED = {
    "the magic": (header(0, 0, magic=0x6D), "begins with 0x6d"),
    "the version": (header(0, 0, version=1), "version 1"),
    "big endian": (header(0, 0, flags=0x80), "big endian"),
    "no unique": (header(0, 0, flags=0x02), "flags 0x02"),
    "ignore case": (header(0, 0, flags=0x01), "flags 0x01"),
    "over the cap": (header(0, (64 << 10) + 1), "65537 bytes, at most"),
    "the largest size": (header(0, (1 << 64) - 1), "at most"),
    "too many descriptors": (header(17, 0), "17 descriptors, at most"),
    "missing descriptors": (header(1, 0), "0 descriptors came instead of 1"),
    "bytes behind the pairs": (whole(GOOD) + b"x", "30 bytes of pairs instead of 29"),
    "type 0": (whole(pair(0, b"a\0", b"")), "type 0"),
    "a nested list": (whole(pair(5, b"a\0", header(0, 0))), "type 5"),
    "an array": (whole(pair(9, b"a\0", bytes(8), nitems=1)), "type 9 and 1 items"),
    "type 255": (whole(pair(255, b"a\0", b"")), "type 255"),
    "items of a scalar": (whole(pair(3, b"a\0", bytes(8), nitems=2)), "2 items"),
    "no name": (whole(pair(3, b"", bytes(8))), "a name of 0 bytes"),
    "a name without NUL": (whole(pair(3, b"ab", bytes(8))), "a name does not end"),
    "a name with two NULs": (whole(pair(3, b"a\0\0", bytes(8))), "a name does not end"),
    "a name over the cap": (whole(pair(3, b"a" * 2048 + b"\0", bytes(8))), "2049 bytes"),
    "a null with data": (whole(pair(1, b"a\0", b"x")), "1 bytes of data instead of 0"),
    "a bool of 2": (whole(pair(2, b"a\0", b"\2")), "a bool of 2"),
    "a bool of two bytes": (whole(pair(2, b"a\0", b"\1\0")), "instead of 1"),
    "a number of 4 bytes": (whole(pair(3, b"a\0", bytes(4))), "instead of 8"),
    "a string without NUL": (whole(pair(4, b"a\0", b"xy")), "value of 'a' does not end"),
    "a string with two NULs": (whole(pair(4, b"a\0", b"x\0y\0")), "value of 'a' does not end"),
    "an empty string": (whole(pair(4, b"a\0", b"")), "value of 'a' does not end"),
    "an empty binary": (whole(pair(7, b"a\0", b"")), "empty binary"),
    "a descriptor that did not come": (whole(pair(6, b"a\0", bytes(8))), "names descriptor 0"),
    "a descriptor of 4 bytes": (whole(pair(6, b"a\0", bytes(4))), "instead of 8"),
    "the same name twice": (whole(GOOD, GOOD), "'n' comes twice"),
    "data past the end": (whole(pair(7, b"a\0", b"x", data_size=2)), "cut in a pair"),
    "data far past the end": (
        whole(pair(7, b"a\0", b"x", data_size=(1 << 64) - 1)),
        "cut in a pair",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_lists_are_refused(case: str) -> None:
    raw, text = MALFORMED[case]
    with pytest.raises(FormatError, match=text):
        nvlist.unpack(raw, [])


def test_every_cut_is_refused() -> None:
    for size in range(len(REQUEST)):
        with pytest.raises(FormatError):
            nvlist.unpack(REQUEST[:size], [])


def test_every_cut_of_the_pairs_is_refused_though_the_size_agrees() -> None:
    body = REQUEST[19:]
    borders = {0, 34, 64}
    for size in set(range(len(body))) - borders:
        with pytest.raises(FormatError, match="cut"):
            nvlist.unpack(header(0, size) + body[:size], [])


@pytest.mark.parametrize(("index", "nfds"), [(1, 1), (2, 2), ((1 << 64) - 1, 1)])
def test_a_descriptor_index_out_of_range_is_refused(index: int, nfds: int) -> None:
    raw = whole(pair(6, b"a\0", struct.pack("<Q", index)), nfds=nfds)
    with pytest.raises(FormatError, match=f"names descriptor {index}"):
        nvlist.unpack(raw, list(range(nfds)))


def test_a_descriptor_of_two_names_is_refused() -> None:
    raw = whole(pair(6, b"a\0", bytes(8)), pair(6, b"b\0", bytes(8)), nfds=1)
    with pytest.raises(FormatError, match="'b' names descriptor 0"):
        nvlist.unpack(raw, [9])


def test_a_descriptor_of_no_name_is_refused() -> None:
    with pytest.raises(FormatError, match="descriptor 0 belongs to nothing"):
        nvlist.unpack(whole(GOOD, nfds=1), [9])


def test_changed_bytes_are_refused_or_read_but_nothing_else() -> None:
    seed = 20261123
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(3000):
        raw = bytearray(REQUEST)
        for _ in range(chance.randint(1, 4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        with contextlib.suppress(FormatError):
            nvlist.unpack(bytes(raw), [])


Sockets = tuple[socket.socket, socket.socket]


def test_a_list_crosses_a_socket_with_its_descriptor(sockets: Sockets) -> None:
    ours, theirs = sockets
    read_end, write_end = os.pipe()
    before = open_fds()
    nvlist.send(ours, {"cmd": "checkpoint", "fddir": Descriptor(write_end)})
    got = nvlist.receive(theirs)
    assert got is not None
    fd = got["fddir"]
    assert isinstance(fd, Descriptor)
    assert fd.fd not in (read_end, write_end)
    assert not os.get_inheritable(fd.fd)
    os.write(fd.fd, b"here")
    assert os.read(read_end, 4) == b"here"
    os.close(fd.fd)
    assert open_fds() == before
    os.close(read_end)
    os.close(write_end)


def test_the_descriptor_follows_in_a_message_of_one_byte(sockets: Sockets) -> None:
    ours, theirs = sockets
    nvlist.send(ours, {"a": Descriptor(ours.fileno())})
    raw, _ = nvlist.pack({"a": Descriptor(ours.fileno())})
    data, control, _, _ = theirs.recvmsg(len(raw), 200)
    assert (data, control) == (raw, [])
    data, control, _, _ = theirs.recvmsg(10, 200)
    assert data == b"\0"
    assert len(control) == 1
    os.close(array.array("i", control[0][2])[0])


def test_several_descriptors_cross_in_order(sockets: Sockets) -> None:
    ours, theirs = sockets
    pipes = [os.pipe() for _ in range(16)]
    nvlist.send(ours, {str(n): Descriptor(pipes[n][1]) for n in range(16)})
    got = nvlist.receive(theirs)
    assert got is not None
    for n, (read_end, write_end) in enumerate(pipes):
        fd = got[str(n)]
        assert isinstance(fd, Descriptor)
        os.write(fd.fd, bytes([n]))
        assert os.read(read_end, 2) == bytes([n])
        for each in (fd.fd, read_end, write_end):
            os.close(each)


def test_lists_follow_each_other_and_the_end_is_none(sockets: Sockets) -> None:
    ours, theirs = sockets
    nvlist.send(ours, {"n": 1})
    nvlist.send(ours, {"fd": Descriptor(ours.fileno())})
    nvlist.send(ours, {"n": 2})
    ours.close()
    assert nvlist.receive(theirs) == {"n": 1}
    second = nvlist.receive(theirs)
    assert second is not None
    fd = second["fd"]
    assert isinstance(fd, Descriptor)
    os.close(fd.fd)
    assert nvlist.receive(theirs) == {"n": 2}
    assert nvlist.receive(theirs) is None


def test_a_connection_that_ends_inside_a_list_is_refused() -> None:
    for size in range(1, len(REQUEST)):
        ours, theirs = socket.socketpair()
        with theirs:
            ours.sendall(REQUEST[:size])
            ours.close()
            with pytest.raises(FormatError):
                nvlist.receive(theirs)


def test_a_size_over_the_cap_is_refused_before_its_bytes_come(sockets: Sockets) -> None:
    ours, theirs = sockets
    ours.sendall(header(0, (64 << 10) + 1))
    with pytest.raises(FormatError, match="65537 bytes, at most"):
        nvlist.receive(theirs)


def rights(*fds: int) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


@pytest.mark.parametrize("came", [1, 3, 4, 100])
def test_other_descriptors_than_announced_are_refused_and_none_stays_open(
    sockets: Sockets, came: int
) -> None:
    ours, theirs = sockets
    raw = whole(pair(6, b"a\0", bytes(8)), pair(6, b"b\0", b"\1" + bytes(7)), nfds=2)
    before = open_fds()
    ours.sendall(raw)
    ours.sendmsg([b"\0"], rights(*[ours.fileno()] * came))
    with pytest.raises(FormatError, match="instead of 2"):
        nvlist.receive(theirs)
    assert open_fds() == before


def test_a_missing_message_of_descriptors_is_refused(sockets: Sockets) -> None:
    ours, theirs = sockets
    ours.sendall(whole(pair(6, b"a\0", bytes(8)), nfds=1))
    ours.close()
    with pytest.raises(FormatError, match="ends before its descriptors"):
        nvlist.receive(theirs)


def test_descriptors_of_a_malformed_list_are_closed(sockets: Sockets) -> None:
    ours, theirs = sockets
    before = open_fds()
    ours.sendall(whole(pair(6, b"a\0", b"\5" + bytes(7)), nfds=1))
    ours.sendmsg([b"\0"], rights(ours.fileno()))
    with pytest.raises(FormatError, match="names descriptor 5"):
        nvlist.receive(theirs)
    assert open_fds() == before


def test_descriptors_that_nobody_announced_do_not_stay_open(sockets: Sockets) -> None:
    ours, theirs = sockets
    before = open_fds()
    ours.sendmsg([REQUEST[:5]], rights(ours.fileno()))
    ours.sendmsg([REQUEST[5:40]], rights(ours.fileno()))
    ours.sendmsg([REQUEST[40:]], rights(ours.fileno()))
    got = nvlist.receive(theirs)
    assert got == {"cmd": "checkpoint", "filename": "a", "suspend": True}
    assert open_fds() == before
