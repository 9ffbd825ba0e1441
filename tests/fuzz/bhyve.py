"""Targets that read what bhyve, vm-bhyve and a FreeBSD host write, and what a stream says of bhyve.

A target for a text takes its bytes as the package reads such a text: UTF-8 with surrogateescape.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from bhystream.backend.bhyve import config, freebsd_text, nvlist, snapshot, vmconf
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.config import GuestConfig
from bhystream.backend.bhyve.contents import BhyveContents
from bhystream.backend.bhyve.cures import translated
from bhystream.backend.bhyve.fpu import parse as parse_fpu
from bhystream.backend.bhyve.journal import Journal
from bhystream.backend.bhyve.layout import layout_of
from bhystream.backend.bhyve.snapshotfiles import Files, read_fpu
from bhystream.backend.bhyve.validate import validate
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest, last_start
from bhystream.backend.process import Identity
from bhystream.backend.refusals import Refusals
from bhystream.errors import IncompatibleError
from bhystream.guest import State
from bhystream.strict_json import pack_json, unpack_json
from fuzz.target import attempt, fail


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def meta(data: bytes) -> None:
    """Parse a FILE.meta, and cut and join the FILE.kern that it describes."""
    found = snapshot.parse(data)
    at = 0
    for item in found.items:
        if item.offset_bytes != at or item.size_bytes < 1:
            fail(f"{item} does not stand at {at}")
        at += item.size_bytes
    if found.kern_bytes + len(data) > snapshot.MAX_ALL_BYTES:
        fail("the states are larger than a stream allows")
    if at <= 1 << 20:
        states = snapshot.cut(data, bytes(at))
        if snapshot.join(states)[1:] != (data, [state.data for state in states[1:]]):
            fail("cut() and join() differ")


def nvlist_bytes(data: bytes) -> None:
    """Unpack one libnv list, without descriptors; a list packs to a list that unpacks alike."""
    pairs = nvlist.unpack(data, [])
    if nvlist.unpack(*nvlist.pack(pairs)) != pairs:
        fail("pack() and unpack() differ")


def nvlist_socket(data: bytes) -> None:
    """Receive one list from a socket, with as many descriptors as the first byte says."""
    count, data = data[0] % 4 if data else 0, data[1:]
    ours, theirs = socket.socketpair()
    with ours, theirs, open("/dev/null", "rb") as null:
        before = len(os.listdir("/proc/self/fd"))
        for socket_ in (ours, theirs):
            socket_.setblocking(False)
        theirs.send(data)
        if count:
            socket.send_fds(theirs, [b"\0"], [null.fileno()] * count)
        theirs.close()
        try:
            pairs = nvlist.receive(ours)
        finally:
            after = len(os.listdir("/proc/self/fd")) + 1
            if after > before + nvlist.DESCRIPTOR_CAP:
                fail("descriptors were left open")
        for value in (pairs or {}).values():
            if isinstance(value, nvlist.Descriptor):
                os.close(value.fd)
        if len(os.listdir("/proc/self/fd")) + 1 != before:
            fail("a descriptor belongs to no value")


def config_text(data: bytes) -> None:
    """Read a bhyve_config(5) file: what can travel passes the check at the destination.

    What cannot is refused for the same reasons whether or not these are collected.
    """
    text, against = text_of(data), Refusals()
    made = config.split(config.parse(text), "web1", against)
    told = [translated(one, "web1", vmconf.parse(text), made.full) for one in against.reasons]
    if any("\n" in one for one in told):
        fail("a reason has more than one line")
    try:
        found = config.read(text, "web1")
    except IncompatibleError as error:
        if list(error.reasons()) != against.reasons:
            fail(f"{error.reasons()} are not {against.reasons}")
        raise
    if against.reasons:
        fail(f"{against.reasons} refuse nothing")
    _travels(found)


def _travels(found: GuestConfig) -> None:
    section = unpack_json(pack_json(found.section))
    if validate(section) != section:
        fail("validate() has changed what split() made")
    config_file({**section["keys"], **found.resources()})


def argv(data: bytes) -> None:
    """Read a bhyve command line, one word for each line."""
    words = text_of(data).replace("\0", "").split("\n")
    if not any(word.startswith("-k") for word in words):
        _travels(config.split(parse_argv([*words, "web1"]), "web1"))


_directory: list[Path] = []


def _guest() -> Path:
    if not _directory:
        _directory.append(Path(tempfile.mkdtemp()) / "web1")
        _directory[0].mkdir()
    return _directory[0]


def vm_bhyve(data: bytes) -> None:
    """Read vm-bhyve's files of a guest: the .conf, the log and the locks, parted by form feeds."""
    directory, hostname = _guest(), "hv1"
    names = ("web1.conf", "vm-bhyve.log", "run.lock", "bhysend.conf")
    for name, part in zip(names, (data.split(b"\f", 3) + [b""] * 3)[:4], strict=True):
        (directory / name).write_bytes(part)
    guest = VmBhyveGuest("web1", directory, hostname)
    guest.locks.reasons()
    attempt(lambda: _travels(guest.last_started()))
    attempt(lambda: _travels(guest.running(Identity(1, 1, "x"))))


def vm_bhyve_text(data: bytes) -> None:
    """Parse a .conf, a log and system.conf, from the same text."""
    text = text_of(data)
    keys = vmconf.parse(text)
    vmconf.changes(keys, Path("/vm/web1"), ["/a", "/b"], 1, ("/rom", None))
    if start := last_start(text):
        start.argv()
    freebsd_text.more_stores(keys, freebsd_text.mounts(text))
    freebsd_text.vendor(text, None)
    freebsd_text.swap_used_bytes(text)


def section(data: bytes) -> None:
    """Check a CONFIG section of a stream and, behind a form feed, a REHEARSAL."""
    head, _, plan = data.partition(b"\f")
    made = unpack_json(head)
    contents = BhyveContents()
    contents.config(made)
    keys = made["keys"]
    contents.layout(layout_of(int(keys["memory.size"])))
    contents.devices(config.devices(made))
    text = config_file(keys)
    if config.parse(text) != keys:
        fail("a value has become another line")
    contents.plan(plan)


def fpu(data: bytes) -> None:
    """Read what bhysend keeps of an FPU: FILE.fpu, the journal, and a state "fpu/0"."""
    path = _guest() / "ckp.fpu"
    path.write_bytes(data)
    attempt(Journal(path).read)
    attempt(lambda: read_fpu(Files(path.parent, "ckp")))
    parse_fpu(State("fpu/0", data, is_optional=True))
