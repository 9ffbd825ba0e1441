"""Start a stand-in's restore before its memory is there, as bhyrecv starts bhyve.

early = Early(host, "g", meta, memory_bytes)    # FILE is a hole, FILE.kern zeros, FILE.meta true
guest = early.start()
early.cut()                 # waits until the VM's memory is mapped
early.await_read()          # a marker is in the VM: all but the last page was read
early.write(page, data)     # into the VM
early.release(kern, last)
"""

from __future__ import annotations

import json
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from bhystream.errors import GuestError
from bhystream.standin.node import read_map

from .held import kern_bytes
from .rig import Guest, Rig, Snapshot, Spec, await_true

_PAGE = 4096


class Early:
    """The files of one early start of a guest that has lowmem only.  meta: FILE.meta's content."""

    def __init__(self, host: Rig, name: str, meta: dict[str, Any], memory_bytes: int) -> None:
        self._host = host
        self._name = name
        self._bytes = memory_bytes
        self.files = Snapshot(host.directory / "s" / f"{name}-early")
        for path, size in ((self.files.path, memory_bytes), (self.files.kern, kern_bytes(meta))):
            path.touch()
            os.truncate(path, size)
        self.files.meta.write_text(json.dumps(meta))
        self.last_page = memory_bytes // _PAGE - 1
        self.marker = os.urandom(_PAGE)
        self.files.put_page(self.last_page - 1, self.marker)

    def start(self, spec: Spec | None = None) -> Guest:
        """Start the restore; return at once."""
        return self._host.launch(self._name, spec, self.files.path)

    def is_mapped(self) -> bool:
        """Say whether the VM has its memory, as VM_MMAP_GETNEXT would show."""
        with suppress(GuestError):
            return bool(read_map(self._host.directory, self._name).maps)
        return False

    def cut(self) -> None:
        """Wait for the VM's memory, then cut FILE and FILE.kern so that bhyve cannot run yet."""
        await_true(self.is_mapped, "the memory of the VM")
        os.truncate(self.files.path, self._bytes - _PAGE)
        os.truncate(self.files.kern, 0)

    def await_read(self) -> None:
        """Wait for the marker in the VM's memory, and zero the marker's page."""
        page = self.last_page - 1
        await_true(lambda: self.read(page) == self.marker, "the marker")
        self.write(page, bytes(_PAGE))

    def write(self, page: int, data: bytes) -> None:
        """Write a page into the VM."""
        with self._node().open("r+b") as file, mmap.mmap(file.fileno(), self._bytes) as memory:
            memory[page * _PAGE : (page + 1) * _PAGE] = data

    def write_all(self, image: bytes) -> None:
        """Write every page but the last into the VM, including zero pages."""
        with self._node().open("r+b") as file, mmap.mmap(file.fileno(), self._bytes) as memory:
            memory[: self.last_page * _PAGE] = image[: self.last_page * _PAGE]

    def read(self, page: int) -> bytes:
        """Return a page of the VM."""
        with self._node().open("rb") as file:
            return os.pread(file.fileno(), _PAGE, page * _PAGE)

    def release(self, kern: bytes, last: bytes) -> None:
        """Write the true FILE.kern, and then the last page of FILE: bhyve reads on at once."""
        with self.files.kern.open("r+b") as file:
            file.write(kern)
        with self.files.path.open("r+b") as file:
            os.pwrite(file.fileno(), last, self.last_page * _PAGE)

    def _node(self) -> Path:
        return self._host.directory / "vmm" / self._name
