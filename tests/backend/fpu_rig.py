"""A VM of the stand-in without a process, whose vCPUs are saved and loaded."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve import fpu
from bhystream.backend.bhyve.journal import Journal
from bhystream.standin import cpu as cpu_file
from bhystream.standin import node
from bhystream.standin.cpu import FPU_BYTES
from bhystream.standin.vm import StandinVm

LOW_BYTES = 2 << 20
SEED = 8


_MADE: list[Machine] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close every machine that a test has made: select(2) takes no descriptor above 1023."""
    yield
    while _MADE:
        _MADE.pop().close()


class Machine:
    """A VM of the stand-in without a process, with random memory and vCPUs full of values."""

    def __init__(self, directory: Path, ncpus: int, vendor: str = "intel") -> None:
        directory.mkdir(exist_ok=True)
        (directory / "host.json").write_text(json.dumps({"cpu_vendor": vendor}))
        self.directory = directory
        self.ncpus = ncpus
        node.create(directory, "g")
        maps = node.memory_maps(LOW_BYTES, is_wired=False)
        node.write_map(directory, "g", node.Map(maps, (ncpus, 1, 1), is_active=True))
        self.memory = node.Memory(directory, "g", LOW_BYTES, has_log=False)
        self.low = self.memory.segments()[0][1]
        self.low[:] = random.Random(SEED).randbytes(LOW_BYTES)
        self.low[0x5000:0x6000] = bytes(4096)  # the guest's PML4
        path = node.beside(directory, "g", "cpu")
        self.cpus = cpu_file.create(path, ncpus, is_intel=vendor == "intel")
        self.journal = Journal(directory / "journal")
        self.vm = self._first = StandinVm(directory, "g", is_writable=True)
        _MADE.append(self)

    def close(self) -> None:
        """Close the VM, the vCPUs' file and the memory."""
        for vm in {id(vm): vm for vm in (self.vm, self._first)}.values():
            vm.close()
        self.cpus.close()
        os.close(self.memory.fd)
        with contextlib.suppress(BufferError):
            self.low.close()

    def start(self) -> None:
        """Put each vCPU in the middle of its work, held, with FPU registers of its own."""
        for index, cpu in enumerate(self.cpus):
            cpu.start(index)
            image = bytearray(random.Random(index).randbytes(832))
            image[24:32] = struct.pack("<II", 0x1F80, 0xFFFF)
            image[416:576] = bytes(160)
            image[512] = 7
            cpu.put_fpu(0, bytes(image))

    def seen(self) -> list[bytes]:
        """Return all that must not change: memory, registers, hidden parts, FPU, CPL."""
        found = [self.low[:]]
        for cpu in self.cpus:
            found.append(cpu.state())
            found.append(cpu.fpu(0, FPU_BYTES))
            names = (name for name in cpu_file.NAMES if not name.startswith("nmi_after"))
            masked = {"cr0_shadow": cpu_file.CR0_MASK, "cr4_shadow": cpu_file.CR4_MASK}
            values = {name: cpu.get(name) & masked.get(name, -1) for name in names}
            found.append(json.dumps(values).encode())
        return found

    def save(self) -> fpu.Saved:
        """Save the FPU registers, and assert that everything else is as before."""
        before = self.seen()
        saved = fpu.save(self.vm, self.low, self.ncpus, self.journal)
        assert self.seen() == before
        assert not self.journal.exists()
        return saved
