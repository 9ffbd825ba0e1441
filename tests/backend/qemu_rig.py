"""Start, ask and end QEMUs for the backend's tests.

The guest is SeaBIOS with nothing to boot: it runs, uses memory, has every
device, and starts at once.  tests/guest checks what a guest's memory holds
after a move.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bhystream.backend.base import Target
from bhystream.backend.qemu.sink import QemuSink
from bhystream.backend.qemu.source import QemuSource
from bhystream.guest import PAGE_BYTES
from bhystream.stream import format as fmt
from support.waiting import until

MIB = 1 << 20
SIZE = 64 * MIB
DEADLINE_S = 20.0

Ask = Callable[..., Any]


class Rig:
    """A directory and the QEMUs that are started in it; end() ends them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        (self.state_dir / "log").mkdir(mode=0o700, parents=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def argv(
        self,
        name: str,
        *extra: str,
        machine: str = "pc-q35-7.2",
        ram: str = "",
        accel: str = "tcg",
    ) -> list[str]:
        ram = ram or f"memory-backend-file,share=on,prealloc=off,mem-path={self.path(name)}.ram"
        return [
            "qemu-system-x86_64", "-name", name, "-nodefaults", "-no-user-config",
            "-display", "none", "-vga", "none", "-no-reboot", "-accel", accel,
            "-object", f"{ram},id=ram0,size={SIZE}",
            "-machine", f"{machine},memory-backend=ram0", "-m", f"{SIZE >> 20}M",
            "-qmp", f"unix:{self.path(name)}.qmp,server=on,wait=off", *extra,
        ]  # fmt: skip

    def start(self, name: str, *extra: str, **settings: str) -> str:
        """Start a QEMU; return its QMP path once QEMU answers there.  settings: for argv()."""
        path = self.path(f"{name}.qmp")
        process = subprocess.Popen(self.argv(name, *extra, **settings), stdin=subprocess.DEVNULL)
        self.processes[name] = process
        until(lambda: listens(path) or process.poll() is not None, "a socket", DEADLINE_S)
        assert process.poll() is None, "QEMU did not start"
        with monitor(path):  # QEMU listens early, and answers when it is complete
            return path

    def sink(self, name: str = "there", **resources: str) -> QemuSink:
        return QemuSink(None, resources, name, False, str(self.state_dir))

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for path in self.state_dir.glob("*.qmp"):
            with contextlib.suppress(OSError):
                os.kill(peer(str(path)), 9)


@contextlib.contextmanager
def rigged() -> Iterator[Rig]:
    """Make a rig, and end it."""
    # The path is short, because a Unix socket's has at most 107 bytes, and on
    # tmpfs, because the RAM files are there.
    with tempfile.TemporaryDirectory(prefix="bhyq-", dir="/dev/shm") as directory:
        made = Rig(Path(directory))
        try:
            yield made
        finally:
            made.end()


def listens(path: str) -> bool:
    """Say whether a socket accepts connections: it exists a moment before that."""
    try:
        return peer(path) > 0
    except OSError:
        return False


def peer(path: str) -> int:
    """Return the pid of the process that listens at a QMP socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(raw[:4], "little")


@contextlib.contextmanager
def monitor(path: str) -> Iterator[Any]:
    """Yield ask(command, **arguments), which uses a QMP connection of its own."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        stream = sock.makefile("rw")
    with stream:  # closes the socket too, so that QEMU serves the next client
        stream.readline()

        def ask(command: str, **arguments: object) -> Any:
            stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            stream.flush()
            while True:
                reply = json.loads(stream.readline())
                if "event" not in reply:
                    return reply.get("return", reply)

        ask("qmp_capabilities")
        yield ask


def stop(path: str) -> None:
    """Stop a guest by QMP."""
    with monitor(path) as ask:
        ask("stop")


def state_of(path: str) -> str:
    with monitor(path) as ask:
        return str(ask("query-status")["status"])


def copy_memory(source: QemuSource, destination: Target) -> int:
    """Copy every touched page by hand; return the number of pages."""
    pages = 0
    [view] = source.memory()
    for first, end in source.touched():
        extent = memoryview(fmt.EXTENT.pack(first, end - first, fmt.KIND_DATA))
        chunk = view[first * PAGE_BYTES : end * PAGE_BYTES]
        destination.place(0, len(view) // PAGE_BYTES, extent, chunk)
        pages += end - first
    return pages


def strings(value: object) -> Iterator[str]:
    """Yield every text in a JSON value, keys too."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield str(key)
            yield from strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value


def image(rig: Rig, name: str, kind: str = "raw", size: int = 8 * MIB, backing: str = "") -> str:
    """Make a disk image; a raw one is full of data, so that a job on it takes long."""
    path = rig.path(name)
    if kind == "raw":
        Path(path).write_bytes(os.urandom(MIB) * (size // MIB))
        return path
    sized = ["-b", backing, "-F", "raw", path] if backing else [path, str(size)]
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *sized], check=True)
    return path


def disk(path: str, kind: str = "raw") -> tuple[str, ...]:
    drive = f"if=none,id=d0,file={path},format={kind}"
    return "-drive", drive, "-device", "virtio-blk-pci,drive=d0,id=vd0"


def node(path: str, kind: str = "raw") -> tuple[str, ...]:
    file = f"driver=file,filename={path},node-name=f0"
    device = "virtio-blk-pci,drive=n0,id=vd0"
    above = f"driver={kind},node-name=n0,file=f0"
    return "-blockdev", file, "-blockdev", above, "-device", device


def cdrom(path: str = "") -> tuple[str, ...]:
    drive = "if=none,id=cd0,media=cdrom,readonly=on" + (f",format=raw,file={path}" if path else "")
    return "-drive", drive, "-device", "ide-cd,drive=cd0,id=ide0"


def export(ask: Ask, rig: Rig) -> None:
    """Export the one disk of a guest, as a backup program does."""
    server = {"type": "unix", "data": {"path": rig.path("nbd")}}
    assert ask("nbd-server-start", addr=server) == {}
    [drive] = ask("query-block")
    name = drive["inserted"]["node-name"]
    assert ask("block-export-add", **{"type": "nbd", "id": "backup", "node-name": name}) == {}
