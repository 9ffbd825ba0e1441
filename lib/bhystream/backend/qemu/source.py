"""QemuSource: a running QEMU guest as base.Source.

RAM is never read through QEMU: it is a shared file, mapped here for the life
of the object.  The pause is `stop`; the device state is QEMU's own migration
stream with x-ignore-shared, which leaves the shared RAM out, written into a
pipe and read whole into memory.

    open      connect, identify, refuse what cannot be moved; changes nothing
    pause     capabilities and limits set first, while the guest runs; then stop,
              and the state (state.py)        running -> postmigrate
    resume    paused.py                        postmigrate -> running

The destination's QEMU checks little of what it loads, so head() carries the
configuration that config.py made of the argv.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bhystream.backend.base import Prepared
from bhystream.backend.process import identify
from bhystream.backend.qemu import facts, graph, host, migration, ram, supervisors
from bhystream.backend.qemu.compare import compare
from bhystream.backend.qemu.config import guest_name, label, reduce_argv
from bhystream.backend.qemu.paused import QemuPaused, ending
from bhystream.backend.qemu.plugged import check_plugged
from bhystream.backend.qemu.process import read_argv, working_directory
from bhystream.backend.qemu.qmp import Qmp
from bhystream.backend.qemu.state import take_state
from bhystream.errors import GuestError, IncompatibleError
from bhystream.guest import PAGE_BYTES, Head, Json, Layout, Segment, State
from bhystream.memory.mapping import unmap

# Measured with QEMU 7.2 under TCG on two busy cores: stop 2 to 6 ms, state 2 to
# 5, load 2 to 12, cont under 1, and the programs around them.
FIXED_NS = 25_000_000


class QemuSource:
    """A running guest, named by the path of its QMP socket."""

    def __init__(self, qmp_path: str, *, force: bool = False) -> None:
        """Open the guest.  Raises GuestError, IncompatibleError or AccessError.

        force: also one that writes to another image than its command line names,
        and one that something seems to supervise.
        """
        self._force = force
        self._mappings: list[mmap.mmap] = []
        self._views: list[memoryview] = []
        self._ram_fd = -1
        fallback = _name_of_path(qmp_path)
        self._qmp = Qmp(os.path.abspath(qmp_path), f"guest {fallback}")
        try:
            self._open(fallback)
            if not force and (found := supervisors.reasons(self._identity.pid)):
                raise IncompatibleError(f"{self._qmp.who}: {found[0]}")
        except BaseException:
            self.close()
            raise

    def _open(self, fallback: str) -> None:
        qmp = self._qmp
        self._identity = identify(qmp.pid, "QEMU")
        state = facts.status(qmp)
        if state != "running":
            raise GuestError(
                f"{qmp.who}: cannot send it: it is '{state}', not running", hint=_cure(state)
            )
        found = migration.capabilities(qmp)
        migration.refuse_unusual(qmp, found)
        parameters = qmp.execute("query-migrate-parameters", doing="examine migration")
        self._found: dict[str, Any] = {
            "capabilities": {"x-ignore-shared": found["x-ignore-shared"]},
            "parameters": {"max-bandwidth": int(parameters["max-bandwidth"])},
        }
        backend = facts.memory_backend(qmp)
        self._fallback = fallback
        self._argv = read_argv(qmp.pid)[1:]
        self._changes: list[str] = []
        self._config, self._drives = self._describe(self._changes)
        qmp.who = f"guest {self._config['name']}"
        segment = Segment(backend.ident, None, backend.size_bytes // PAGE_BYTES)
        self._layout = Layout((segment,))
        self._size_bytes = backend.size_bytes
        self._ram_fd = ram.open_ram(qmp.pid, backend.size_bytes, os.O_RDONLY)
        mapping = ram.map_ram(self._ram_fd, backend.size_bytes, qmp.who, mmap.PROT_READ)
        self._mappings = [mapping]
        self._views = [memoryview(mapping)]

    def _describe(
        self, changes: list[str] | None
    ) -> tuple[dict[str, Any], tuple[graph.Drive, ...] | None]:
        """Return the configuration as it is now, and what is in its drives.

        changes: as of reduce_argv(), where they are no reason to refuse.
        """
        graph.refuse_jobs(self._qmp)
        found = facts.gather(self._qmp)
        config = reduce_argv(self._argv, found, self._fallback, changes if self._force else None)
        check_plugged(self._qmp, config)
        return config, found.drives

    def _require_quiet(self) -> None:
        """Refuse a paused guest whose disks are not what they were just before."""
        graph.refuse_jobs(self._qmp)
        if graph.drives(self._qmp, working_directory(self._qmp.pid)) != self._drives:
            raise GuestError(
                f"{self._qmp.who}: its disks were changed as it was paused", hint="send it again"
            )

    @property
    def name(self) -> str:
        """Return the guest's name: of -name, else of the socket."""
        return str(self._config["name"])

    @property
    def lock_name(self) -> str:
        """Return the pid and start time: the same through every socket."""
        return f"qemu-{self._identity.pid}-{self._identity.start_ticks}"

    def head(self) -> Head:
        """Return what goes into the head sections."""
        devices = tuple(
            f"{d['driver']} {d['props']['id']}" if "id" in d["props"] else d["driver"]
            for d in self._config["devices"]
        )
        return Head(host.describe(self._qmp.version), self._layout, self._config, devices)

    def resources(self) -> Sequence[str]:
        """Return the -o keys that bhyrecv will ask for, in its order."""
        config = self._config
        keys = [disk["key"] for disk in config["disks"] if not disk["empty"]]
        keys += [net["key"] for net in config["nets"]]
        keys += [key for key in ("kernel", "initrd", "bios") if config[key]]
        return [f"{key}=" for key in keys]

    def warnings(self) -> Sequence[str]:
        """Return which image the destination has to lend, and a name that is another here."""
        out = [f"{change}; lend it the former" for change in self._changes]
        own = guest_name(self._argv)
        if own not in ("", self.name):
            out.append(
                f"name: {ascii(own)[:80]} cannot be a guest's in a stream; it is called"
                f" {self.name}, or what bhyrecv's operand says"
            )
        return out

    def prepare(self, id_: str) -> Prepared:
        """Return the record; what the pause needs is set in it, in a millisecond."""
        return Prepared(record_of(self._qmp, self.name, self._found))

    def memory(self) -> Sequence[memoryview]:
        """Return the one mapping of the guest's memory, read-only."""
        return self._views

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the page extents of the memory's file that hold data."""
        return ram.extents(self._ram_fd, self._size_bytes, self._identity.pid)

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Return None: QEMU's dirty log is its own."""
        return None

    def require_described(self) -> None:
        """Ask for devices, disks and jobs again: they may change while the guest is sent."""
        config, drives = self._describe([])
        if config != self._config or drives != self._drives:
            lines = compare(self._config, config)
            raise GuestError(
                f"{self._qmp.who}: its devices or disks were changed while it was sent"
                + (f": {lines[0]}" if lines else ""),
                hint="send it again",
            )

    def fixed_ns(self) -> int:
        """Return what stop, state, load and cont take together."""
        return FIXED_NS

    def pause(self) -> QemuPaused:
        """Stop the guest and take its state.  What can be set up before that is."""
        qmp = self._qmp
        try:
            with ending(qmp.who, self._identity):
                data = self._stop()
        except BaseException:
            with contextlib.suppress(GuestError):
                migration.let_run(qmp)
                migration.restore(qmp, self._found)
            raise
        return QemuPaused(
            self.name,
            qmp.path,
            self._identity,
            self._found,
            announce=False,
            qmp=qmp,
            states=(State("qemu", data),),
        )

    def _stop(self) -> bytes:
        """Stop the guest and return its state."""
        qmp = self._qmp
        migration.set_parameters(qmp, {"max-bandwidth": migration.UNLIMITED})
        migration.set_capabilities(qmp, {"x-ignore-shared": True})
        # It waits for the disks, and slow storage takes its time.
        qmp.execute("stop", doing="pause", limit_s=60.0)
        state = facts.status(qmp)
        if state != "paused":
            raise GuestError(f"{qmp.who}: cannot pause: it is '{state}'")
        self._require_quiet()
        return take_state(qmp, self._identity)

    def close(self) -> None:
        """Give up connection, descriptor and mapping; the guest stays as it is."""
        self._qmp.close()
        unmap(self._views, self._mappings)
        self._views, self._mappings = [], []
        if self._ram_fd >= 0:
            os.close(self._ram_fd)
            self._ram_fd = -1


def record_of(qmp: Qmp, name: str, found: Mapping[str, Any]) -> Json:
    """Return the record by which open_paused() finds a guest again."""
    who = identify(qmp.pid, "QEMU")
    return {
        "hypervisor": "qemu",
        "name": name,
        "qmp": qmp.path,
        "pid": who.pid,
        "start_ticks": who.start_ticks,
        "boot_id": who.boot_id,
        "restore": dict(found),
        "announce": False,
    }


def _name_of_path(path: str) -> str:
    """Return a guest name made of the socket's: "web1" of "/run/web1.qmp"."""
    return label(os.path.basename(path).split(".")[0]) or "guest"


def _cure(state: str) -> str:
    if state == "paused":
        return "let it run first (QMP: cont)"
    if state == "inmigrate":
        return "it waits for a stream: give its socket to bhyrecv"
    if state == "postmigrate":
        return "it was moved already: bhysend -l, then --resume or --discard"
    return ""
