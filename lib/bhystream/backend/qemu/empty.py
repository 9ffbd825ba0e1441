"""An empty QEMU of ours: started to wait for a guest, and removed without a trace.

From the stream's configuration, on a memory file of ours; or from the
operator's template.  RAM of ours is unlinked as soon as QEMU has it mapped.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from bhystream.backend.qemu import facts, host, scope, verdict
from bhystream.backend.qemu.command import build, waiting
from bhystream.backend.qemu.launch import Launched
from bhystream.backend.qemu.qmp import Qmp
from bhystream.backend.qemu.resources import Resources
from bhystream.errors import GuestError, IncompatibleError


class Empty:
    """One such QEMU, and every file that was made for it: ours until let_go()."""

    def __init__(
        self,
        config: dict[str, Any],
        resources: Resources,
        name: str,
        qmp_path: str,
        state_dir: str,
    ) -> None:
        """config: validated.  name: of the guest here.  Nothing is started yet."""
        self._config = config
        self._resources = resources
        self._name = name
        self._who = f"guest {name}"
        self._qmp_path = qmp_path
        self._log = os.path.join(state_dir, "log", f"{name}.log")
        self._child: Launched | None = None
        self._ram_fd = -1
        self._made: list[str] = []

    def start_built(self) -> Qmp:
        """Start it from the configuration; return the connection, the caller's.

        take_ram() then gives the memory file.  Raises BhyError.
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
                # A QEMU built without seccomp says so and ends.
                if not (sandbox and "-sandbox" in str(error)):
                    raise
        if not is_kept:
            os.unlink(ram_path)
            self._made.remove(ram_path)
        return qmp

    def start_template(self, program: str, words: list[str]) -> Qmp:
        """Start the operator's own command line, made to wait; return the connection."""
        path = verdict.template_ram_path(words)
        if path is not None and not os.path.lexists(path):
            self._made.append(path)
        qmp = self._launch([program, *words, *waiting(self._qmp_path)])
        backend = facts.memory_backend(qmp)
        if backend.size_bytes != self._config["memory"]["size_bytes"]:
            raise IncompatibleError("template: its memory has another size")
        return qmp

    def take_ram(self) -> int:
        """Hand over the descriptor of the memory file that start_built() made."""
        fd, self._ram_fd = self._ram_fd, -1
        return fd

    def _make_ram(self, size_bytes: int) -> tuple[str, bool]:
        """Create the memory file.  Returns (path, whether it keeps its name)."""
        path = self._resources.get("mem") or "/dev/shm"
        is_kept = not os.path.isdir(path)
        if not is_kept:
            path = os.path.join(path, f"bhyrecv-{self._name}-{os.getpid()}")
        try:
            self._ram_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._made.append(path)
            os.ftruncate(self._ram_fd, size_bytes)
        except OSError as error:
            raise GuestError(f"{self._who}: mem: {path}: {error.strerror}") from None
        return path, is_kept

    def _note_serials(self) -> None:
        """Note the files that QEMU will make, for remove()."""
        for port in self._config["serials"]:
            path = (self._resources.get(port["key"]) or "null").removeprefix("unix:")
            if path != "null" and not os.path.lexists(path):
                self._made.append(path)

    def _launch(self, argv: list[str]) -> Qmp:
        """Start QEMU and connect; on failure it has ended."""
        path = self._qmp_path
        if path not in self._made:
            self._made.append(path)
        words = [*scope.leaving(self._name), *argv]
        child = Launched(words, self._log, self._who, self._resources.secrets())
        try:
            qmp = child.connect(path)
        except BaseException:
            child.kill()
            child.remove_log()
            raise
        self._child = child
        try:
            if qmp.pid != child.pid:
                self._made.remove(path)
                raise GuestError(f"{self._who}: process {qmp.pid} answers at {path}, not ours")
            state = facts.status(qmp)
            if state != "inmigrate":
                raise GuestError(f"{self._who}: QEMU is '{state}', not waiting")
        except BaseException:
            qmp.close()
            raise
        return qmp

    def blame(self, error: GuestError) -> GuestError:
        """Return the error with QEMU's own last words, if it has any."""
        return self._child.blame(error) if self._child else error

    def let_go(self) -> None:
        """Leave QEMU and its files to themselves."""
        if self._child is not None:
            self._child.let_go()

    def remove(self) -> None:
        """End QEMU and remove what was made.  Never raises; twice is no error."""
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
