"""What a stand-in's host is like: DIR/host.json, read anew each time it is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bhystream.errors import GuestError

FAILURES = frozenset(
    {
        # The checkpoint socket.  A checkpoint whose FILE.meta is a FIFO is a hold, no rehearsal.
        "hang",  # no request is ever served
        "die",  # bhyve is killed in the middle of FILE.kern
        "no-anchor",  # descriptors under keys that bhyve does not know are closed at once
        "hold-die",  # bhyve is killed in the middle of FILE.kern, in a hold
        "hold-hang",  # all is saved and FILE.meta is never written
        "hold-grow",  # the last device has more to save than it had
        "hold-fail",  # the last device cannot be saved
        "held-die",  # bhyve is killed as soon as it is held
        # A restore.
        "restore-early",  # it ends when the memory is mapped, before any is read
        "slow-read",  # it waits for DIR/release before it reads the memory
        "late-cut",  # the read has ended when FILE is cut
        "short-read",  # it takes a read of 0 bytes for the end of FILE, and ends
        "restore",  # it ends when memory and devices are there
        "slow-restore",  # it waits for DIR/release then; or for ever
        "restore-late",  # it ends when the socket is there
    }
)


@dataclass(frozen=True)
class Settings:
    """The keys of host.json.  Every one has a default.

    generation: of the checkpoint interface: 4, of FreeBSD 14 and 15, or 5, of
    16; the sysctls of the release follow it.  fail: words of FAILURES.
    free_memory_bytes, program_hash: None: this system's own.  parent_command:
    of whoever started bhyve.  knows_suspending_lock: vm-bhyve is 1.7.0 or later.
    can_snapshot: of vmm; null: none is loaded.  module_hash: of vmm.ko.
    disks: by path, fields of host.Disk that differ from the file's own.  mtus:
    by tap.
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
    can_snapshot: bool | None = True
    module_hash: str = "766d6d2e6b6f"
    disks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mtus: Mapping[str, int] = field(default_factory=dict)
    sysctl: Mapping[str, str] = field(default_factory=dict)

    @property
    def clamps_devices(self) -> bool:
        """Say whether a device takes no more than INT_MAX bytes at once."""
        return self.sysctl.get("debug.devfs_iosize_max_clamp", "0") != "0"


def read_settings(directory: Path) -> Settings:
    """Return the settings of a stand-in's directory, the defaults where it has none.

    Raises GuestError for what is not a setting.
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
    unknown = found.keys() - {f.name for f in fields(Settings)}
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
