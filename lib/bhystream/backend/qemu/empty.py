"""An empty QEMU that we start to wait for a guest, and can remove without a trace.

QEMU is started from the stream's configuration, on a memory file of ours, or
from the operator's template.  We unlink our memory file as soon as QEMU has
mapped it, unless -o mem= names the file itself.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from bhystream.backend.qemu import facts, host, scope, verdict
from bhystream.backend.qemu.command import build, waiting
from bhystream.backend.qemu.launch import Launched
from bhystream.backend.qemu.qmp import Qmp
from bhystream.backend.qemu.resources import Resources
from bhystream.errors import GuestError, IncompatibleError

_LEFT_S = 600.0


class Empty:
    """An empty QEMU, and every file that was made for it: ours until let_go()."""

    def __init__(
        self,
        config: dict[str, Any],
        resources: Resources,
        name: str,
        qmp_path: str,
        state_dir: str,
        on_wait: Callable[[], None],
    ) -> None:
        """Prepare; start nothing.  config: validated.  name: the guest's at this host.

        qmp_path: absolute.  state_dir: has a directory log/, for QEMU's log.  on_wait: as
        in Qmp.
        """
        self._config = config
        self._resources = resources
        self._name = name
        self._who = f"guest {name}"
        self._on_wait = on_wait
        self._qmp_path = qmp_path
        self._log = os.path.join(state_dir, "log", f"{name}.log")
        self._child: Launched | None = None
        self._ram_fd = -1
        self._made: list[str] = []

    def start_built(self) -> Qmp:
        """Start QEMU from the configuration; return the connection, which the caller closes.

        take_ram() then returns the memory file.  Raises BhyError if QEMU does not
        start, or the memory file cannot be made.
        """
        ram_path, is_kept = self._make_ram(self._config["memory"]["size_bytes"])
        self._note_serials()
        program = host.program(self._config["arch"])
        for sandbox in (True, False):
            argv = build(
                self._config,
                self._resources,
                name=self._name,
                ram_path=ram_path,
                qmp_path=self._qmp_path,
                sandbox=sandbox,
            )
            try:
                qmp = self._launch([program, *argv])
                break
            except GuestError as error:
                # A QEMU built without seccomp refuses -sandbox and ends.
                if not (sandbox and "-sandbox" in str(error)):
                    raise
        if not is_kept:
            os.unlink(ram_path)
            self._made.remove(ram_path)
        return qmp

    def start_template(self, program: str, words: list[str]) -> Qmp:
        """Start the operator's command line, so that QEMU waits; return the connection.

        Raises BhyError if QEMU does not start, or its memory has another size.
        """
        path = verdict.template_ram_path(words)
        if path is not None and not os.path.lexists(path):
            self._made.append(path)
        qmp = self._launch([program, *words, *waiting(self._qmp_path)])
        backend = facts.memory_backend(qmp)
        if backend.size_bytes != self._config["memory"]["size_bytes"]:
            raise IncompatibleError("template: its memory has another size than the guest's")
        return qmp

    def take_ram(self) -> int:
        """Return the descriptor of start_built()'s memory file, which the caller closes."""
        fd, self._ram_fd = self._ram_fd, -1
        return fd

    def _make_ram(self, size_bytes: int) -> tuple[str, bool]:
        """Create the memory file.  Returns (path, whether it keeps its name)."""
        path = self._resources.get("mem") or "/dev/shm"
        is_kept = not os.path.isdir(path)
        if not is_kept:
            _remove_left(path, f"bhyrecv-{self._name}-")
            path = os.path.join(path, f"bhyrecv-{self._name}-{os.getpid()}")
        try:
            self._ram_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._made.append(path)
            os.ftruncate(self._ram_fd, size_bytes)
        except OSError as error:
            raise GuestError(f"{self._who}: mem: {path}: {error.strerror}") from None
        return path, is_kept

    def _note_serials(self) -> None:
        """Note the serial ports' files that QEMU will make, so that remove() removes them."""
        for port in self._config["serials"]:
            path = (self._resources.get(port["key"]) or "null").removeprefix("unix:")
            if path != "null" and not os.path.lexists(path):
                self._made.append(path)

    def _launch(self, argv: list[str]) -> Qmp:
        """Start QEMU and connect.

        Ends QEMU if no connection can be made; remove() ends it after a later failure.
        """
        path = self._qmp_path
        if path not in self._made:
            self._made.append(path)
        words = [*scope.leaving(self._name), *argv]
        child = Launched(words, self._log, self._who, self._resources.secrets())
        try:
            qmp = child.connect(path, self._on_wait)
        except BaseException:
            child.kill()
            child.remove_log()
            raise
        self._child = child
        try:
            if qmp.pid != child.pid:
                self._made.remove(path)
                raise GuestError(f"{self._who}: process {qmp.pid}, not our QEMU, answers at {path}")
            state = facts.status(qmp)
            if state != "inmigrate":
                raise GuestError(f"{self._who}: QEMU is '{state}', not waiting")
        except BaseException:
            qmp.close()
            raise
        return qmp

    def blame(self, error: GuestError) -> GuestError:
        """Return the error, with QEMU's own last words if QEMU has ended."""
        return self._child.blame(error) if self._child else error

    def let_go(self) -> None:
        """Leave QEMU and its files to themselves."""
        if self._child is not None:
            self._child.let_go()

    def remove(self) -> None:
        """End QEMU and remove all files made for it.  Never raises; may be called twice."""
        if self._child is not None:
            self._child.kill()
            self._child.remove_log()
            self._child = None
        if self._ram_fd >= 0:
            os.close(self.take_ram())
        for path in self._made:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._made = []


def _remove_left(directory: str, prefix: str) -> None:
    """Remove the memory files that killed bhyrecvs have left while they started QEMU.

    Such a file has no page yet.  A young one may belong to a bhyrecv that we cannot see.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            path, pid = os.path.join(directory, name), name.removeprefix(prefix)
            is_pid = name == prefix + pid and pid.isascii() and pid.isdigit()
            if is_pid and not os.path.exists(f"/proc/{pid}"):
                with contextlib.suppress(OSError):
                    if os.lstat(path).st_mtime < time.time() - _LEFT_S:
                        os.unlink(path)
