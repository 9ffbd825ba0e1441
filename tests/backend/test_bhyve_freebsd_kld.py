"""FreeBSD's kernel linker, which knows the vmm that is loaded, is asked; it is played."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path
from typing import Any

import pytest
import xxhash

from bhystream.backend.bhyve import freebsd_kld
from bhystream.backend.bhyve.freebsd import FreeBsdHost


class Linker:
    """kldfind(2), kldsym(2) and kldstat(2) of a kernel with these files and their symbols."""

    def __init__(self, files: dict[str, set[str]], *, denies: bool = False) -> None:
        self.files = files
        self.denies = denies

    def _named(self, file: int) -> set[str]:
        if file == 0:
            return set().union(*self.files.values())
        return [*self.files.values()][file - 1]

    def kldfind(self, name: bytes) -> int:
        names = [*self.files]
        return names.index(name.decode()) + 1 if name.decode() in names else -1

    def kldsym(self, file: int, command: int, data: Any) -> int:
        lookup = data._obj
        assert (command, lookup.version) == (1, 32)
        if self.denies:
            ctypes.set_errno(errno.EPERM)
            return -1
        if lookup.symname.decode() not in self._named(file):
            ctypes.set_errno(errno.ENOENT)
            return -1
        return 0

    def kldstat(self, file: int, data: Any) -> int:
        found = data._obj
        assert found.version == 2080
        found.pathname = f"/boot/modules/{[*self.files][file - 1]}".encode()
        return 0


BOTH = {"vm_snapshot_req", "vm_get_topology"}


@pytest.mark.parametrize(
    ("files", "can"),
    [
        ({"kernel": {"panic"}, "vmm.ko": BOTH}, True),
        ({"kernel": {"panic", "vm_snapshot_req"}, "vmm.ko": {"vm_get_topology"}}, False),
        ({"kernel": BOTH}, True),
        ({"kernel": {"vm_get_topology"}}, False),
        ({"kernel": {"panic"}}, None),
        ({"kernel": BOTH, "vmm.ko": set()}, None),
    ],
)
def test_snapshots_are_seen_by_a_symbol_of_the_vmm_that_is_loaded(
    files: dict[str, set[str]], can: bool | None
) -> None:
    assert freebsd_kld.can_snapshot(Linker(files)) is can


def test_symbols_that_may_not_be_asked_for_are_not_missing() -> None:
    assert freebsd_kld.can_snapshot(Linker({"vmm.ko": BOTH}, denies=True)) is None


def test_the_structures_of_the_linker_have_the_kernels_sizes() -> None:
    assert ctypes.sizeof(freebsd_kld.SymLookup) == 32
    assert ctypes.sizeof(freebsd_kld.FileStat) == 2080
    assert freebsd_kld.FileStat.pathname.offset == 1056


def test_the_module_is_hashed_where_it_was_loaded_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linker = Linker({"kernel": set(), "vmm.ko": BOTH})
    monkeypatch.setattr(freebsd_kld, "_libc", lambda: linker)
    assert freebsd_kld.path(freebsd_kld.file_id("vmm.ko")) == "/boot/modules/vmm.ko"
    module = tmp_path / "vmm.ko"
    module.write_bytes(b"code")
    monkeypatch.setattr(freebsd_kld, "path", lambda file: str(module))
    host = FreeBsdHost.__new__(FreeBsdHost)
    assert host.module_hash() == xxhash.xxh3_128_hexdigest(b"code")
    del linker.files["vmm.ko"]
    assert host.module_hash() == ""
