"""QemuSink: a QEMU that waits for a guest, as base.Sink.

    check   the verdict; touches nothing, starts nothing
    open    the QEMU that waits at the socket, else one of ours; RAM all zero
    load    the state through a pipe; QEMU inmigrate -> paused
    start   cont, announce-self, let go

RAM of ours is a fresh file, unlinked as soon as QEMU has it mapped: nothing
is left behind when QEMU ends, however it ends.

A QEMU that we did not start is never ended by us.  If the move fails before
load(), abort() leaves it as it waits, its settings put back; a second attempt
starts from zero, because open() punches its whole RAM empty first.  If load()
fails, QEMU ends by itself (as all its versions do on a bad state) or stays as
it is, and is no longer `inmigrate`: check() refuses it by that name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bhystream.backend.base import Target
from bhystream.backend.qemu import facts, host, migration, ram, scope, verdict
from bhystream.backend.qemu.compare import compare
from bhystream.backend.qemu.empty import Empty
from bhystream.backend.qemu.load import feed_state
from bhystream.backend.qemu.qmp import CommandError, NobodyListensError, Qmp
from bhystream.backend.qemu.resources import Resources
from bhystream.backend.qemu.source import record_of
from bhystream.backend.qemu.validate import validate
from bhystream.errors import BhyError, GuestError, IncompatibleError, InternalError, UsageError
from bhystream.guest import Head, Json, State
from bhystream.memory import hole
from bhystream.memory.target import FileTarget, MappedTarget


class QemuSink:
    """A guest being built.

    may_have_run: False as long as its vCPUs provably never ran.
    """

    def __init__(
        self,
        qmp_path: str | None,
        resources: Mapping[str, str],
        name: str | None,
        force: bool,
        state_dir: str,
    ) -> None:
        """Prepare; touches nothing.

        qmp_path: absolute, or None for -o qmp=, else NAME.qmp in state_dir.
        resources: the -o keys.  name: of the guest here, or None for the
        stream's.  force: overrule differences of host and configuration.
        state_dir: exists, 0700, with a directory log/; for the socket and the log.
        Raises UsageError for a key that does not exist.
        """
        self._resources = Resources.parse(resources)
        given = self._resources.get("qmp")
        if qmp_path is not None and given not in (None, qmp_path):
            raise UsageError("-o qmp= and the operand name two sockets")
        self._qmp_path = qmp_path or given
        self._name = name
        self._force = force
        self._state_dir = state_dir
        self._config: dict[str, Any] | None = None
        self._qmp: Qmp | None = None
        self._empty: Empty | None = None
        self._ram_fd = -1
        self._mapped: MappedTarget | None = None
        self._found: dict[str, Any] = {}
        self._record: Json | None = None
        self._released = False
        self.may_have_run = False
        self.notices: Sequence[str] = ()
        self.on_wait: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        """Return the guest's name here; known after check()."""
        return self._name or str(self._known()["name"])

    def _known(self) -> dict[str, Any]:
        if self._config is None:
            raise InternalError("QemuSink: check() was not called, or refused the guest")
        return self._config

    # ---- check

    def check(self, head: Head) -> list[str]:
        """Return the reasons why this host cannot take the guest; remember it."""
        kind = head.host.get("hypervisor")
        if kind != "qemu":
            return [f"hypervisor: the guest runs under {ascii(kind)[:40]}, not qemu"]
        try:
            config = validate(head.config)
            hard, soft = self._judge(head, config)
        except (BhyError, OSError) as error:
            return [str(error)]
        reasons = hard if self._force else hard + soft
        if not reasons:
            self._config = config
        return reasons

    def _judge(self, head: Head, config: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Return (reasons that stand, reasons that force overrules)."""
        hard: list[str] = []
        soft = verdict.host_reasons(head, config)
        name = self._name or config["name"]
        path = self._qmp_path or os.path.join(self._state_dir, f"{name}.qmp")
        self._qmp_path = path
        directory: str | None = None
        if self._listens(path):
            qmp = self._connected()
            stands, differences = verdict.waiting_reasons(qmp, config)
            hard += stands + [
                f"{key}: a QEMU with its own waits at {path}; remove -o {key}="
                for key in self._resources.values
                if key != "qmp"
            ]
            soft += differences + verdict.version_reasons(head, qmp.version)
        elif self._resources.get("template"):
            differences = self._judge_template(head, config)
            soft += differences
        else:
            known, _, version = verdict.machines(host.program(config["arch"]))
            if config["machine"]["type"] not in known:
                hard.append(f"machine: this QEMU does not know {config['machine']['type']}")
            hard += verdict.resource_reasons(self._resources, config)
            soft += verdict.version_reasons(head, version)
            directory = verdict.ram_directory(self._resources)
        if self._qmp is None:
            stands, doubts = scope.reasons()
            hard += stands
            soft += doubts
        soft += verdict.room_reasons(config["memory"]["size_bytes"], directory)
        return hard, soft

    def _judge_template(self, head: Head, config: dict[str, Any]) -> list[str]:
        program, words = self._template(config)
        _, aliases, version = verdict.machines(program)
        here = verdict.template_config(words, aliases, config["name"])
        if here["memory"] != config["memory"]:
            raise IncompatibleError("; ".join(compare(config, here)))
        return compare(config, here) + verdict.version_reasons(head, version)

    def _template(self, config: dict[str, Any]) -> tuple[str, list[str]]:
        """Return the operator's (program, arguments)."""
        words = self._resources.template()
        if words[0].startswith("-"):
            return host.program(config["arch"]), words
        return words[0], words[1:]

    def _listens(self, path: str) -> bool:
        """Say whether a process listens at a socket; refuse what is no socket.

        QEMU unlinks whatever lies at the path that it is told to listen on.
        """
        if self._qmp is not None:
            return True
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            return False
        if not stat.S_ISSOCK(mode):
            raise IncompatibleError(f"qmp: {path} exists and is not a socket")
        try:
            self._qmp = Qmp(path, f"guest {self._name or os.path.basename(path)}")
        except NobodyListensError:
            return False  # its QEMU is gone; ours replaces the socket
        return True

    # ---- open

    def late_reasons(self) -> list[str]:
        """Return nothing: a QEMU that waits needs no plan."""
        return []

    def open(self, plan: bytes) -> Sequence[Target]:
        """Start or take over the empty QEMU; return its RAM file, all zero."""
        config = self._known()
        size_bytes = config["memory"]["size_bytes"]
        if self._qmp is None:
            self._empty = Empty(
                config, self._resources, self.name, str(self._qmp_path), self._state_dir
            )
            if self._resources.get("template"):
                self._qmp = self._empty.start_template(*self._template(config))
            else:
                self._qmp = self._empty.start_built()
                self._ram_fd = self._empty.take_ram()
            self._require_disks(self._qmp)
        qmp = self._connected()
        if self._ram_fd < 0:
            self._ram_fd = ram.open_ram(qmp.pid, size_bytes, os.O_RDWR)
            other = ram.other_user(self._ram_fd, qmp.pid)
            if other is not None:
                raise IncompatibleError(f"mem: the memory file is in use by process {other}")
            # Mappings see the zeros too: right also for a QEMU that waits.
            hole.punch(self._ram_fd, 0, size_bytes)
        target: Target = FileTarget(self._ram_fd, 0)
        if ram.is_huge(self._ram_fd):
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            mapping = ram.map_ram(self._ram_fd, size_bytes, f"guest {self.name}", protection)
            self._mapped = MappedTarget(memoryview(mapping))
            target = self._mapped
        self._prepare(qmp)
        return [target]

    def _require_disks(self, qmp: Qmp) -> None:
        """Refuse a QEMU that has opened other disks than the source's, by what it says of them."""
        differences = verdict.disk_differences(qmp, self._known())
        if differences and not self._force:
            raise IncompatibleError(f"guest {self.name}: {'; '.join(differences)}")

    def _prepare(self, qmp: Qmp) -> None:
        """Set what the load needs, before the source pauses.

        Without late-block-activate a shared image would be locked before
        `cont`, and the source could not take it back.  announce-rounds=0:
        QEMU would announce the guest when it is loaded, not when it runs, and
        switches would learn a place that may still be given up.  Source:
        qemu/qemu migration/migration.c at 005807860d3e,
        process_incoming_migration_bh().
        """
        found = migration.capabilities(qmp)
        parameters = qmp.execute("query-migrate-parameters", doing="examine migration")
        wanted = {"x-ignore-shared": True, "late-block-activate": True}
        self._found = {
            "capabilities": {name: found.get(name, False) for name in wanted},
            "parameters": {"announce-rounds": int(parameters["announce-rounds"])},
        }
        self._record = dict(record_of(qmp, self.name, self._found)) | {"announce": True}
        migration.set_capabilities(qmp, wanted)
        migration.set_parameters(qmp, {"announce-rounds": 0})

    def _connected(self) -> Qmp:
        if self._qmp is None:
            raise InternalError("QemuSink: open() was not called")
        return self._qmp

    # ---- load and start

    def require_alive(self) -> None:
        """Ask QEMU for its state.  Raises GuestError where it does not answer."""
        if self._qmp is not None:
            with self._blaming():
                facts.status(self._qmp)

    def load(self, states: Sequence[State]) -> None:
        """Give QEMU the device state; the guest stands paused afterwards."""
        qmp = self._connected()
        [data] = [state.data for state in states if not state.is_optional]
        with self._blaming():
            feed_state(qmp, data)

    def start(self) -> None:
        """Let the guest run, verify that it does, and let go of it."""
        qmp = self._connected()
        with self._blaming():
            facts.status(qmp)  # one that has ended meanwhile has not run
        self.may_have_run = True
        try:
            qmp.execute("cont", doing="start", limit_s=30.0)
            state = facts.status(qmp)
        except CommandError:
            # An answer: QEMU did not start them (a disk is locked, say).
            with contextlib.suppress(GuestError):
                self.may_have_run = facts.status(qmp) not in ("paused", "prelaunch")
            raise
        except GuestError as error:
            raise (self._empty.blame(error) if self._empty else error) from None
        if state != "running":
            raise GuestError(f"guest {self.name}: cannot start: it is '{state}' after cont")
        # The network first: it is what the guest's peers still miss.
        migration.announce(qmp)
        migration.restore(qmp, self._found)
        self._let_go()

    def leave_paused(self) -> None:
        """Let go of the loaded guest; record() and open_paused() find it again."""
        migration.restore(self._connected(), self._found)
        self._let_go()

    def record(self) -> Json:
        """Return what open_paused() needs; known after open()."""
        if self._record is None:
            raise InternalError("QemuSink: open() was not called")
        return self._record

    @contextlib.contextmanager
    def _blaming(self) -> Any:
        """Replace "lost QEMU" by QEMU's own last words, where we have its log."""
        try:
            yield
        except GuestError as error:
            raise (self._empty.blame(error) if self._empty else error) from None

    def _let_go(self) -> None:
        """From here on the guest is nobody's: abort() does nothing."""
        self._released = True
        if self._qmp is not None:
            self._qmp.close()
        if self._empty is not None:
            self._empty.let_go()
        self._close_ram()

    def _close_ram(self) -> None:
        if self._mapped is not None:
            self._mapped.release()
            self._mapped = None
        if self._ram_fd >= 0:
            os.close(self._ram_fd)
            self._ram_fd = -1

    def abort(self) -> None:
        """Undo open(): our QEMU and our files go, a waiting QEMU stays."""
        if self._released:
            return
        if self._qmp is not None:
            if self._empty is None and self._found:
                migration.restore(self._qmp, self._found)
            self._qmp.close()
            self._qmp = None
        if self._empty is not None:
            self._empty.remove()
            self._empty = None
        self._found = {}
        self._close_ram()
