"""Build the boot ROM of rom.c, and read what it prints.

The ROM is a guest for KVM on any host: if the kernel offers /dev/kvm without
hardware support, KVM emulates each instruction, and SSE and Linux do not run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .build import run_tool

_HERE = Path(__file__).parent
_CFLAGS = (
    "-m32", "-Os", "-ffreestanding", "-fno-builtin", "-fno-pic", "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-mgeneral-regs-only",
    "-Wall", "-Wextra", "-Werror", "-nostdlib", "-static",
)  # fmt: skip
_LINK = f"-Wl,-T,{_HERE / 'rom.ld'},--build-id=none,--no-warn-rwx-segments"
_CREATE_VM = 0xAE01  # Source: linux/kvm.h
_BEAT = re.compile(rb"beat (\d+) bad (\d+) clock ([0-9a-f]+) tsc ([0-9a-f]+)")


def build_rom(path: Path) -> Path:
    """Make the ROM, 64 KiB, at a path; return the path.  Raises BuildError."""
    linked = path.with_suffix(".elf")
    run_tool(["gcc", *_CFLAGS, _LINK, "-o", linked, _HERE / "rom.c"])
    run_tool(["objcopy", "-O", "binary", linked, path])
    return path


def why_no_kvm() -> str:
    """Return why no guest can run under KVM here, "" if a guest can."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        os.close(fcntl.ioctl(fd, _CREATE_VM, 0))
    except OSError as error:
        return f"KVM_CREATE_VM: {errno.errorcode.get(error.errno or 0)}: {error.strerror}"
    finally:
        os.close(fd)
    return ""


@dataclass(frozen=True)
class Beat:
    """One line of the ROM's output.  clock: kvmclock's, in units of 2^20 ns.  tsc: ticks."""

    number: int
    bad: int
    clock: int
    tsc: int


def beats_of(said: bytes) -> list[Beat]:
    """Return the complete beats in the ROM's output."""
    return [
        Beat(int(found[1]), int(found[2]), int(found[3], 16), int(found[4], 16))
        for line in said.split(b"\n")[:-1]
        if (found := _BEAT.fullmatch(line))
    ]


def assert_unbroken(said: bytes) -> None:
    """Assert that no beat is missing, that none is bad, and that no clock has gone back."""
    beats = beats_of(said)
    assert [beat.number for beat in beats] == list(range(len(beats)))
    assert len(beats) == len(said.split(b"\n")) - 1, said.decode(errors="replace")
    assert not any(beat.bad for beat in beats)
    for clock in ([beat.clock for beat in beats], [beat.tsc for beat in beats]):
        assert clock == sorted(clock)
