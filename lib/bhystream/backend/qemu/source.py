"""QemuSource: a running QEMU guest as base.Source.

RAM is never read through QEMU: it is a shared file, mapped here for the life
of the object.  The pause is `stop`; the device state is QEMU's own migration
stream with x-ignore-shared, which leaves the shared RAM out, written into a
pipe and read whole into memory.

    open      connect, identify, refuse what cannot be moved; changes nothing (opened.py)
    pause     set capabilities and limits while the guest runs; then stop the guest
              and take the state (state.py)    running -> postmigrate
    resume    see paused.py                    postmigrate -> running

The destination's QEMU checks little of what it loads, so head() carries the
configuration that config.py made of the argv.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bhystream.backend.base import Prepared
from bhystream.backend.process import identify
from bhystream.backend.qemu import facts, graph, host, migration, ram
from bhystream.backend.qemu.compare import compare
from bhystream.backend.qemu.config import guest_name
from bhystream.backend.qemu.opened import open_guest
from bhystream.backend.qemu.paused import QemuPaused, ending
from bhystream.backend.qemu.process import working_directory
from bhystream.backend.qemu.qmp import Qmp
from bhystream.backend.qemu.state import state_pipe, take_state
from bhystream.errors import GuestError, Reason
from bhystream.guest import Fixed, Head, Json, State

# Measured with QEMU 7.2 under TCG on two cores: stop and questions 1 to 2 ms, state and walk 4
# to 6; load 3 to 5, cont 1, and the answers and records of both programs in between.
_STATE_NS, _LOAD_NS = 8_000_000, 10_000_000
# What is asked when the guest is stopped, in this order.
_QUIET = ("query-status", "query-jobs", "query-block-exports", "query-block")


class QemuSource:
    """A running guest, named by the path of its QMP socket."""

    def __init__(
        self, qmp_path: str, *, force: bool = False, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Open the guest.  Raises GuestError, IncompatibleError or AccessError.

        force: also open a guest that writes to another image than QEMU's command
        line names, or that a supervisor might start again.  on_wait: as in Qmp.
        """
        self._opened = open_guest(qmp_path, force=force, on_wait=on_wait)
        self._is_suspended = False
        self._walked: list[tuple[int, int]] | None = None

    def _require_quiet(self) -> None:
        """Raise GuestError if the disks of the paused guest changed just before, or are in use."""
        qmp = self._opened.qmp
        graph.refuse_jobs(qmp)
        drives = graph.drives(qmp, working_directory(qmp.pid))
        if drives != self._opened.described.drives:
            raise GuestError(
                f"{qmp.who}: its disks were changed as it was paused", hint="send it again"
            )

    @property
    def name(self) -> str:
        """Return the guest's name: from -name, else from the socket's path."""
        return self._opened.name

    @property
    def lock_name(self) -> str:
        """Return a name with QEMU's pid and start time: the same through every QMP socket."""
        identity = self._opened.identity
        return f"qemu-{identity.pid}-{identity.start_ticks}"

    def head(self) -> Head:
        """Return what goes into the head sections."""
        guest, config = self._opened, self._opened.described.config
        devices = tuple(
            f"{d['driver']} {d['props']['id']}" if "id" in d["props"] else d["driver"]
            for d in config["devices"]
        )
        return Head(host.describe(guest.qmp.version), guest.ram.layout, config, devices)

    def resources(self) -> Sequence[str]:
        """Return the -o keys that bhyrecv will ask for, in its order."""
        config = self._opened.described.config
        keys = [disk["key"] for disk in config["disks"] if not disk["empty"]]
        keys += [net["key"] for net in config["nets"]]
        keys += [key for key in ("kernel", "initrd", "bios") if config[key]]
        return [f"{key}=" for key in keys]

    def disks(self) -> Mapping[str, str]:
        """Return the paths of the raw disks, by their keys, through QEMU's own root and mounts."""
        pid = self._opened.qmp.pid
        described = self._opened.described
        images = described.images
        keys = [key for key in graph.raw_disks(described.config) if key in images]
        return {key: f"/proc/{pid}/root{images[key]}" for key in keys}

    def warnings(self) -> Sequence[Reason]:
        """Return the images that the destination has to lend, and a name that cannot be kept."""
        out = [Reason(change, "lend the guest the former") for change in self._opened.changes]
        own = guest_name(self._opened.program.argv)
        if own not in ("", self.name):
            out.append(
                Reason(
                    f"name: {ascii(own)[:80]} cannot be a guest's name in a stream; the guest is"
                    f" called {self.name}, or as bhyrecv's operand says"
                )
            )
        return out

    def prepare(self, id_: str) -> Prepared:
        """Return the record.  pause() itself makes all settings, before it stops the guest."""
        opened = self._opened
        return Prepared(record_of(opened.qmp, self.name, opened.settings))

    def memory(self) -> Sequence[memoryview]:
        """Return the one mapping of the guest's memory, read-only."""
        return self._opened.ram.views

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the page extents of the memory's file that hold data.

        The first call after pause() yields what pause() has found.
        """
        memory, walked, self._walked = self._opened.ram, self._walked, None
        if walked is not None:
            return iter(walked)
        return ram.extents(memory.fd, memory.size_bytes, self._opened.identity.pid)

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Return None: QEMU shows its dirty log to no other program."""
        return None

    def require_described(self) -> None:
        """Raise GuestError or IncompatibleError if devices, disks or jobs changed since open."""
        before, now = self._opened.described, self._opened.program.describe([])
        if now != before:
            lines = compare(before.config, now.config)
            raise GuestError(
                f"{self._opened.qmp.who}: its devices or disks were changed while it was sent"
                + (f": {lines[0]}" if lines else ""),
                hint="send it again",
            )

    def fixed(self) -> Fixed:
        """Return what stop and state usually take, and load and cont."""
        return Fixed(_STATE_NS, _LOAD_NS, self._opened.described.config["smp"]["cpus"])

    def suspend_vcpus(self) -> None:
        """Stop the guest by `stop`.  Raises GuestError if another program has stopped it."""
        qmp = self._opened.qmp
        if (state := facts.status(qmp)) != "running":
            raise GuestError(f"{qmp.who}: cannot throttle it: it is '{state}'")
        self._is_suspended = True
        qmp.execute("stop", doing="throttle", limit_s=60.0)

    def resume_vcpus(self) -> None:
        """Let the guest run on if suspend_vcpus() has stopped it.  Raises GuestError."""
        if self._is_suspended:
            migration.let_run(self._opened.qmp)
            self._is_suspended = False

    def pause(self, stopping: Callable[[], None] = lambda: None) -> QemuPaused:
        """Set up the migration while the guest runs; stop the guest and take its state.

        Raises GuestEndedError if QEMU has ended, else GuestError, after an attempt
        to let the guest run on.
        """
        guest = self._opened
        try:
            with ending(guest.qmp.who, guest.identity):
                data = self._stop(stopping)
        except BaseException:
            with contextlib.suppress(GuestError):
                migration.let_run(guest.qmp)
                migration.restore(guest.qmp, guest.settings)
            raise
        return QemuPaused(
            guest.name,
            guest.qmp.path,
            guest.identity,
            guest.settings,
            announce=False,
            qmp=guest.qmp,
            states=(State("qemu", data),),
        )

    def _stop(self, stopping: Callable[[], None]) -> bytes:
        """Stop the guest and return its state.

        The memory is walked while QEMU saves the state.  The state of the devices is saved
        last, and changes no memory: in a migration with memory QEMU has sent all of it by then.
        Source: QEMU 7.2, migration/savevm.c, qemu_savevm_state_complete_precopy().
        """
        qmp, memory, who = self._opened.qmp, self._opened.ram, self._opened.identity
        migration.set_parameters(qmp, {"max-bandwidth": migration.UNLIMITED})
        migration.set_capabilities(qmp, {"x-ignore-shared": True})
        with state_pipe(qmp) as pipe:
            stopping()
            with qmp.ahead("stop", *_QUIET):
                # `stop` waits for the disks, and slow storage may take long.
                qmp.execute("stop", doing="pause", limit_s=60.0)
                state = facts.status(qmp)
                if state != "paused":
                    raise GuestError(f"{qmp.who}: cannot pause: it is '{state}'")
                self._require_quiet()
            with ram.Walk(memory.fd, memory.size_bytes, who.pid) as walk:
                data = take_state(qmp, who, pipe)
        self._walked = walk.found
        return data

    def close(self) -> None:
        """Release connection, descriptor and mapping; the guest stays as it is.

        A view that the engine still holds keeps the mapping alive until the
        engine drops the view; that is no error.
        """
        self._opened.close()


def record_of(qmp: Qmp, name: str, found: Mapping[str, Any]) -> Json:
    """Return the record by which open_paused() finds a guest again.

    found: the migration settings to put back.  Raises EndedError if QEMU has ended.
    """
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
