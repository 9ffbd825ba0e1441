"""The properties of a stand-in's host: DIR/host.json, which every question reads anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from bhystream.errors import GuestError

FAILURES = frozenset(
    {
        # Checkpoints.  A checkpoint is a hold if its FILE.meta is a FIFO, else a rehearsal.
        "hang",  # no request is ever served
        "die",  # bhyve is killed in the middle of FILE.kern
        "no-anchor",  # descriptors under keys that bhyve does not know are closed at once
        "hold-die",  # bhyve is killed in the middle of FILE.kern, in a hold
        "hold-hang",  # all is saved, but FILE.meta is never written, in a hold
        "hold-grow",  # the last device has more to save in a hold than in a rehearsal
        "hold-fail",  # the last device cannot be saved in a hold
        "held-die",  # bhyve is killed when FILE.meta has its first byte, in a hold
        # Restores.
        "restore-early",  # bhyve ends when the memory is mapped, before the memory is read
        "slow-read",  # bhyve waits for DIR/release, without limit, before it reads the memory
        "late-cut",  # bhyve has read all of FILE when FILE is cut
        "short-read",  # bhyve takes a read of 0 bytes for the end of FILE, and ends
        "restore",  # bhyve ends when memory and devices are restored
        "slow-restore",  # bhyve then waits for DIR/release, without limit
        "no-button",  # bhyve does not take what would connect the guest's power button
        "restore-late",  # bhyve ends when the socket is there
    }
)


class Settings(NamedTuple):
    """The keys of host.json, each with its default.

    generation: the version of the checkpoint interface, 4 (FreeBSD 14 and 15) or 5 (16); it
    decides the sysctls of the release.  fail: words of FAILURES.
    free_memory_bytes, program_hash: null means this system's own value.  parent_command:
    the command that started bhyve.  knows_suspending_lock: vm-bhyve is 1.7.0 or
    later.  keeps_path: PATH reaches what vm-bhyve runs.  knows_clocks: the kernel is
    one whose clocks can be moved on.
    can_snapshot: vmm has snapshots; null if no vmm is loaded.
    module_hash: the digest of vmm.ko.  disks: for each path, the fields of host.Disk that
    differ from the file's own.  mtus: the MTU of each tap.  sysctl: the value of each
    name.
    """

    generation: int = 5
    dirty_log: bool = False
    fail: tuple[str, ...] = ()
    swap_used_bytes: int = 0
    free_memory_bytes: int | None = None
    program_hash: str | None = None
    cpu_vendor: str = "intel"
    parent_command: str = ""
    knows_suspending_lock: bool = True
    keeps_path: bool = True
    knows_clocks: bool = True
    can_snapshot: bool | None = True
    module_hash: str = "766d6d2e6b6f"
    disks: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    mtus: Mapping[str, int] = MappingProxyType({})
    sysctl: Mapping[str, str] = MappingProxyType({})

    @property
    def clamps_devices(self) -> bool:
        """Say whether a device takes no more than INT_MAX bytes at once."""
        return self.sysctl.get("debug.devfs_iosize_max_clamp", "0") != "0"


def read_settings(directory: Path) -> Settings:
    """Return the settings of a stand-in's directory, the defaults if it has no host.json.

    Raises GuestError if host.json is invalid or cannot be read.
    """
    path = directory / "host.json"
    try:
        found: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as error:
        raise GuestError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise GuestError(f"{path} is not a JSON object")
    unknown = found.keys() - set(Settings._fields)
    if unknown:
        raise GuestError(f"{path}: unknown key: {', '.join(sorted(unknown))}")
    if "fail" in found:
        found["fail"] = tuple(found["fail"])
    settings = Settings(**found)
    if settings.generation not in (4, 5):
        raise GuestError(f"{path}: no generation {settings.generation}")
    if not FAILURES.issuperset(settings.fail):
        raise GuestError(f"{path}: no such failure: {settings.fail}")
    return settings
