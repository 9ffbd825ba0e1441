"""QemuSink: a QEMU that waits for a guest, as base.Sink.

    check   give the verdict; change nothing, start nothing
    open    take the QEMU that waits at the socket, or start a QEMU; its RAM is all zero
    load    write the state into a pipe; QEMU inmigrate -> paused
    start   tell QEMU to run the guest (cont) and to send its addresses to the network
            (announce-self), and leave QEMU running

The RAM of a QEMU of ours is a fresh file, unlinked as soon as QEMU has mapped it
(unless -o mem= names the file), so that nothing is left behind however QEMU ends.

We never end a QEMU that we did not start.  If the move fails before load(),
abort() leaves that QEMU waiting, its settings put back; a second attempt starts
from zero, because open() first empties the whole RAM.  If load() fails, QEMU
either ends by itself (as all its versions do on a bad state) or is no longer
`inmigrate`, so that check() refuses it next time.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from bhystream.backend.base import Target
from bhystream.backend.process import Identity, identify, is_alive
from bhystream.backend.qemu import facts, migration, ram, verdict
from bhystream.backend.qemu.empty import Empty
from bhystream.backend.qemu.load import StatePipe
from bhystream.backend.qemu.qmp import CommandError, Qmp
from bhystream.backend.qemu.resources import Resources
from bhystream.backend.qemu.source import record_of
from bhystream.backend.qemu.validate import validate
from bhystream.backend.qemu.wanted import Wanted, connect
from bhystream.errors import (
    BhyError,
    GuestError,
    IncompatibleError,
    InternalError,
    Interrupted,
    UsageError,
)
from bhystream.guest import Head, Json, State
from bhystream.memory import hole
from bhystream.memory.target import FileTarget, MappedTarget


@dataclass(frozen=True)
class Checked:
    """A guest that this host can take.

    config: the stream's configuration, validated.  name: the guest's name at this host.
    """

    MISSING: ClassVar[str] = "check() was not called, or refused the guest"
    config: dict[str, Any]
    name: str
    qmp_path: str

    @property
    def size_bytes(self) -> int:
        """Return the size of the guest's memory."""
        return int(self.config["memory"]["size_bytes"])


@dataclass(frozen=True)
class Opened(Checked):
    """A guest whose QEMU waits for the pages, and then for the state.

    empty: the waiting QEMU if we started it, else None.  settings: QEMU's migration
    settings before we changed them.  record: what open_paused() needs to find the
    guest again.  identity: QEMU's process.  pipe: the state goes to QEMU through it.
    """

    MISSING = "open() was not called"
    qmp: Qmp
    empty: Empty | None
    settings: Mapping[str, Any]
    record: Json
    identity: Identity
    pipe: StatePipe

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Replace "lost QEMU" by QEMU's own last words, if we have its log."""
        try:
            yield
        except GuestError as error:
            raise self.blame(error) from None

    def blame(self, error: GuestError) -> GuestError:
        """Return the error, with QEMU's own last words if we have its log."""
        return self.empty.blame(error) if self.empty else error


_Stage = TypeVar("_Stage", bound=Checked)


class QemuSink:
    """A guest that is built in a QEMU.  Attributes and errors are base.Sink's."""

    def __init__(
        self,
        qmp_path: str | None,
        resources: Mapping[str, str],
        name: str | None,
        force: bool,
        state_dir: str,
        below: Sequence[str] = (),
    ) -> None:
        """Prepare; change nothing on the host.

        qmp_path: absolute, or None for -o qmp=, else NAME.qmp in state_dir.
        resources: the -o keys.  name: the guest's name here, or None for the
        stream's.  force: overrule differences of host and configuration.
        state_dir: an existing directory, 0700, with a directory log/; for the
        socket and the log.  below: the directories in which the disks have to lie, ()
        for any.  Raises UsageError for an -o key or value that is wrong.
        """
        parsed = Resources.parse(resources, below)
        given = parsed.get("qmp")
        if qmp_path is not None and given not in (None, qmp_path):
            raise UsageError("-o qmp= and the operand name two sockets")
        self._wanted = Wanted(parsed, qmp_path or given, name, state_dir)
        self._force = force
        self._waiting: Qmp | None = None
        self._stage: Checked | None = None
        # abort() undoes what was connected, started and set, and then releases the memory.
        self._made = contextlib.ExitStack()
        self._ram = contextlib.ExitStack()
        self.may_have_run = False
        self.notices: Sequence[str] = ()
        self.on_wait: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        """Return the guest's name here; known after check()."""
        return self._wanted.given_name or self._at(Checked).name

    def _at(self, stage: type[_Stage]) -> _Stage:
        """Return the stage reached.  Raises InternalError if that is not yet `stage`."""
        if not isinstance(self._stage, stage):
            raise InternalError(f"QemuSink: {stage.MISSING}")
        return self._stage

    def _wait(self) -> None:
        # on_wait is set, and set again, after this object is made.
        self.on_wait()

    # ---- check

    def check(self, head: Head) -> list[str]:
        """Return the reasons why this host cannot take the guest; without any, remember it."""
        kind = head.host.get("hypervisor")
        if kind != "qemu":
            return [f"hypervisor: the guest runs under {ascii(kind)[:40]}, not qemu"]
        try:
            config = validate(head.config)
            hard, soft = self._wanted.judge(head, config, self._connect)
        except Interrupted:  # of on_wait
            raise
        except (BhyError, OSError) as error:
            return [str(error)]
        reasons = hard if self._force else hard + soft
        if not reasons:
            self._stage = Checked(config, self._wanted.name(config), self._wanted.path(config))
        return reasons

    def _connect(self, path: str) -> Qmp | None:
        """Return the connection to the QEMU that waits at a path; None if none waits.

        abort() closes the connection.
        """
        if self._waiting is None:
            who = f"guest {self._wanted.given_name or os.path.basename(path)}"
            if found := connect(path, who, self._wait):
                self._made.callback(found.close)
                self._waiting = found
        return self._waiting

    def description(self, head: Head) -> Sequence[str]:
        """Return (): no manager is known that could have it."""
        return ()

    def disks(self) -> Mapping[str, str]:
        """Return the paths of the raw disks that -o gives, by their keys."""
        return self._wanted.resources.raw_disks(self._at(Checked).config)

    # ---- open

    def late_reasons(self) -> list[str]:
        """Return nothing: a QEMU that waits needs no plan."""
        return []

    def open(self, plan: bytes) -> Sequence[Target]:
        """Start or take over the empty QEMU; return its RAM, all zero, as one Target."""
        checked, empty, fd = self._at(Checked), None, None
        if self._waiting:
            qmp = self._waiting
        else:
            empty, qmp, fd = self._start_empty(checked)
        if fd is None:
            fd = self._take_over_ram(qmp, checked.size_bytes)
        target: Target = FileTarget(fd, 0)
        if ram.is_huge(fd):
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            mapping = ram.map_ram(fd, checked.size_bytes, f"guest {self.name}", protection)
            target = mapped = MappedTarget(memoryview(mapping), FileTarget(fd, 0))
            self._ram.callback(mapped.release)
        self._stage = self._prepare(checked, qmp, empty)
        return [target]

    def _start_empty(self, checked: Checked) -> tuple[Empty, Qmp, int | None]:
        """Start a QEMU of ours.

        Returns it, its connection, and the memory file's descriptor, or None if
        QEMU has opened the memory itself (a template).
        """
        wanted, fd = self._wanted, None
        empty = Empty(
            checked.config,
            wanted.resources,
            checked.name,
            checked.qmp_path,
            wanted.state_dir,
            self._wait,
        )
        self._made.callback(empty.remove)
        if wanted.resources.get("template"):
            qmp = empty.start_template(*wanted.template(checked.config))
        else:
            qmp = empty.start_built()
            fd = empty.take_ram()
            self._ram.callback(os.close, fd)
        self._made.callback(qmp.close)
        # Ask QEMU itself, which may have opened other disks than the source's.
        differences = verdict.disk_differences(qmp, checked.config)
        if differences and not self._force:
            raise IncompatibleError(f"guest {checked.name}: {'; '.join(differences)}")
        return empty, qmp, fd

    def _take_over_ram(self, qmp: Qmp, size_bytes: int) -> int:
        """Return the descriptor of a memory file that QEMU has opened itself, made all zero."""
        fd = ram.open_ram(qmp.pid, size_bytes, os.O_RDWR)
        self._ram.callback(os.close, fd)
        other = ram.other_user(fd, qmp.pid)
        if other is not None:
            raise IncompatibleError(f"mem: the memory file is in use by process {other}")
        # QEMU's own mapping sees the zeros too.
        hole.punch(fd, 0, size_bytes)
        return fd

    def _prepare(self, checked: Checked, qmp: Qmp, empty: Empty | None) -> Opened:
        """Set what the load needs, before the source pauses.

        Without late-block-activate QEMU would lock a shared image before `cont`,
        and the source could not take the image back.  announce-rounds is set to
        0, because QEMU would announce the guest when it is loaded, not when it
        runs, and switches would learn a place that may still be given up.
        Source: qemu/qemu migration/migration.c at 005807860d3e,
        process_incoming_migration_bh().
        """
        found = migration.capabilities(qmp)
        wanted = {"x-ignore-shared": True, "late-block-activate": True}
        settings = {
            "capabilities": {name: found.get(name, False) for name in wanted},
            "parameters": {"announce-rounds": migration.parameter(qmp, "announce-rounds")},
        }
        if empty is None:
            self._made.callback(migration.restore, qmp, settings)
        record = dict(record_of(qmp, checked.name, settings)) | {"announce": True}
        migration.set_capabilities(qmp, wanted)
        migration.set_parameters(qmp, {"announce-rounds": 0})
        pipe = StatePipe(qmp, self._wait)
        self._ram.callback(pipe.close)
        if empty is None:
            self._made.callback(pipe.take_back)
        return Opened(
            checked.config,
            checked.name,
            checked.qmp_path,
            qmp,
            empty,
            settings,
            record,
            identify(qmp.pid, "QEMU"),
            pipe,
        )

    # ---- load and start

    def require_alive(self) -> None:
        """Ask QEMU for its state.  Raises GuestError if QEMU does not answer."""
        if isinstance(self._stage, Opened):
            with self._stage.blaming():
                facts.status(self._stage.qmp)
        elif self._waiting:
            facts.status(self._waiting)

    def load(self, states: Sequence[State]) -> None:
        """Give QEMU the device state; the guest stands paused afterwards."""
        guest = self._at(Opened)
        [data] = [state.data for state in states if not state.is_optional]
        with guest.blaming():
            guest.pipe.feed(data)

    def advance_clocks(self, ns: int) -> int:
        """Return 0: QEMU has no command for it."""
        self.notices = [*self.notices, "its clocks are as they were saved: QEMU cannot move them"]
        return 0

    def start(self) -> None:
        """Let the guest run, verify that it does, and let go of it."""
        guest = self._at(Opened)
        qmp = guest.qmp
        if not is_alive(guest.identity):  # QEMU has ended meanwhile, so its guest has not run
            raise guest.blame(GuestError(f"{qmp.who}: cannot start: its QEMU has ended"))
        # From here on nothing may end the wait for QEMU.
        self.on_wait = lambda: None
        self.may_have_run = True
        try:
            with qmp.ahead("cont", "query-status"):
                qmp.execute("cont", doing="start", limit_s=30.0)
                state = facts.status(qmp)
        except CommandError:
            # QEMU has answered that it did not start the vCPUs (a disk is locked, say).
            with contextlib.suppress(GuestError):
                self.may_have_run = facts.status(qmp) not in ("paused", "prelaunch")
            raise
        except GuestError as error:
            raise guest.blame(error) from None
        if state != "running":
            raise GuestError(f"guest {guest.name}: cannot start: it is '{state}' after cont")
        self._let_go(guest)

    def settle(self) -> None:
        """Tell the network where the guest is, and put QEMU's settings back."""
        guest = self._at(Opened)
        # The network first: the guest's peers wait for that only.
        migration.announce(guest.qmp)
        migration.restore(guest.qmp, guest.settings)
        guest.qmp.close()

    def leave_paused(self) -> None:
        """Let go of the loaded guest; record() and open_paused() find it again."""
        guest = self._at(Opened)
        migration.restore(guest.qmp, guest.settings)
        self._let_go(guest)
        guest.qmp.close()

    def record(self) -> Json:
        """Return what open_paused() needs; known after open()."""
        return self._at(Opened).record

    def _let_go(self, guest: Opened) -> None:
        """Give the guest up: from here on abort() does nothing."""
        self._made.pop_all()
        if guest.empty is not None:
            guest.empty.let_go()
        self._ram.close()

    def abort(self) -> None:
        """Undo open(): remove our QEMU and our files; leave a QEMU that waited as it was."""
        self._made.close()
        self._waiting = None
        self._ram.close()
