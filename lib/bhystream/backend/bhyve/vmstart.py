"""Start a guest by vm-bhyve's own `vm start`, so that vm-bhyve supervises it from the beginning.

vm-bhyve makes the taps, the console, the lock and the log, and at last runs the bare words
`bhyveload` and `bhyve`, which it finds through PATH.  bhyrecv puts a directory of its own
first in PATH:

    bhyveload, grub-bhyve   do nothing: a restored guest needs no loader
    bhyve                   vmshim.py: tells bhyrecv its arguments, waits, and becomes the
                            bhyve that bhyrecv wants (`bhyve -k FILE -r FILE NAME`)
    socket                  where bhyrecv waits for it
    locks                   what vmdirectory.py needs: the guest's name and directory, this host's
                            name, and the host to which the guest had moved from here

As long as the directory exists, vm-bhyve can start nothing by it but what bhyrecv names: if
bhyve is ended, and vm-bhyve runs `bhyve` again (on_fault), the program ends with status 1,
which is a power-off.  vmdirectory.py removes the directory once the guest runs; from then on the
shell finds the system's programs, also for a name that it remembers, because sh(1) goes on
through PATH if a remembered file is gone.  Source: bin/sh/exec.c, shellexec(), FreeBSD 15.1.

While the guest waits, run.lock has a word that names no host: if the host crashes, `vm
startall` does not boot a guest that runs elsewhere.

If PATH did not arrive, vm-bhyve would boot the guest from its disks, while it still runs at
the source.  So host.manager_finds() is asked before, in the way in which vm-bhyve sets PATH,
and a VM that appears before our program has called is destroyed at once.
Source, read: vm-bhyve 1.6.2 and 1.7.5, vm, lib/vm-base, lib/vm-core, core::__start(),
lib/vm-run, vm::run().
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

from bhystream import durable, strict_json
from bhystream.backend.adopted import Adopted
from bhystream.backend.bhyve import vmshim
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.launch import Child
from bhystream.backend.process import identify, peer_pid
from bhystream.errors import GuestError, from_oserror

_LIMIT_S = 120.0
_CALL_S = 10.0
_POLL_S = 0.01
_MOST_BYTES = 1 << 20  # of the arguments, which execve(2) limits to less
_NOTHING = "#!/bin/sh\n# Nothing to load: bhyrecv(8) restores this guest.\n"
_SHIM = """#!/bin/sh
# bhyrecv(8) waits for this call.
exec {python} -I -S {shim} {directory} "$@"
"""


class VmStart:
    """One `vm start`, until the program that becomes bhyve is there.

    arguments: bhyve's, as vm-bhyve gives them, with the guest's name.  child: the waiting program.
    """

    arguments: list[str]
    child: Adopted

    def __init__(
        self, host: Host, starter: Sequence[str], locks: Locks, directory: Path, log_path: str
    ) -> None:
        """Start nothing yet.

        starter: host.starter().  locks: the guest's.  directory: vmdirectory.directory_of().
        log_path: bhyve's log.
        """
        self._host = host
        self._words = [*starter, locks.name]
        self._locks = locks
        self._directory = directory
        self._log_path = log_path
        self._who = f"guest {locks.name}"
        self._peer: socket.socket | None = None

    def begin(self, on_wait: Callable[[], None]) -> None:
        """Run `vm start`; return when vm-bhyve has called our program.

        on_wait: called often.  Raises GuestError if vm-bhyve does not start the guest; call
        vmdirectory.end() in any case if the guest does not run in the end.
        """
        with self._listening(self._locks.forget_move()) as listener:
            if not self._host.manager_finds(self._directory / "bhyve"):
                raise GuestError(
                    f"{self._who}: vm-bhyve does not find bhyve through the PATH of its caller",
                    "remove PATH from rc.conf, and console=tmux from vm-bhyve's system.conf",
                )
            path = f"{self._directory}:{os.environ.get('PATH', '/sbin:/bin:/usr/sbin:/usr/bin')}"
            before = self._locks.log_written_ns()
            vm = Child(self._words, self._log_path, {**self._host.environment(), "PATH": path})
            try:
                self._peer = self._await_call(listener, vm, before, on_wait)
            finally:
                if not vm.has_ended():
                    vm.kill()
        self.arguments = self._read(self._peer)
        pid = peer_pid(self._peer, "bhyve")
        self.child = Adopted(identify(pid, "bhyve"), self._log_path)
        self._locks.wait_here()

    def _listening(self, away: str) -> contextlib.closing[socket.socket]:
        """Make the directory, its programs and its socket.  away: the host that has the guest."""
        programs = {
            "bhyveload": _NOTHING,
            "grub-bhyve": _NOTHING,
            "bhyve": _SHIM,
        }
        names = {
            "python": shlex.quote(sys.executable),
            "shim": shlex.quote(vmshim.__file__),
            "directory": shlex.quote(str(self._directory)),
        }
        listener = socket.socket(socket.AF_UNIX)
        try:
            durable.make_directory(self._directory.parent)
            os.mkdir(self._directory, 0o700)
            durable.write(
                self._directory / "locks",
                json.dumps([*map(str, astuple(self._locks)), away]),
            )
            for name, text in programs.items():
                durable.write(self._directory / name, text.format(**names), 0o700)
            listener.bind(str(self._directory / "socket"))
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise from_oserror(error, f"make {self._directory}") from None
        return contextlib.closing(listener)

    def _await_call(
        self, listener: socket.socket, vm: Child, before: int, on_wait: Callable[[], None]
    ) -> socket.socket:
        end = time.monotonic() + _LIMIT_S
        while not select.select([listener], [], [], _POLL_S)[0]:
            if self._host.exists(self._locks.name):
                self._locks.before_kill()
                self._host.destroy(self._locks.name)
                raise GuestError(
                    f"{self._who}: vm start began to boot the guest, and was stopped at once",
                    f"see vm-bhyve.log in {self._locks.directory}",
                )
            said = vm.last_words() if vm.has_ended() and vm.status else self._complaint(before)
            if said:
                raise GuestError(f"{self._who}: vm start: {said}")
            if time.monotonic() > end:
                raise GuestError(f"{self._who}: vm start: it runs no bhyve after {_LIMIT_S:.0f} s")
            on_wait()
        peer, _ = listener.accept()
        return peer

    def _complaint(self, before: int) -> str:
        """Return the line in which the supervisor says that it starts no bhyve, "" if none.

        before: what log_written_ns() returned before the start.
        """
        line = self._locks.last_log_line() if self._locks.log_written_ns() != before else ""
        return line if "fatal;" in line or line.endswith((": stopped", ": suspended")) else ""

    def _read(self, peer: socket.socket) -> list[str]:
        peer.settimeout(_CALL_S)
        data = b""
        try:
            while not data.endswith(b"\n") and len(data) < _MOST_BYTES:
                more = peer.recv(_MOST_BYTES)
                if not more:
                    break
                data += more
            return [str(word) for word in strict_json.loads(data)]
        except (OSError, ValueError) as error:
            raise GuestError(f"{self._who}: vm start: the call is cut off: {error}") from None

    def become(self, argv: list[str]) -> None:
        """Let the waiting program become another.  argv: its words, the program by its path.

        Raises GuestError if the waiting program has ended.
        """
        assert self._peer is not None, "call begin() first"
        try:
            answer = json.dumps({"argv": argv, "log": self._log_path})
            self._peer.sendall(answer.encode() + b"\n")
        except OSError as error:
            raise GuestError(f"{self._who}: vm start: its bhyve is gone: {error}") from None
        finally:
            self._close()

    def undo(self) -> None:
        """Give the waiting program up, unless it became another, and remove the log."""
        self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._log_path)

    def _close(self) -> None:
        if self._peer is not None:
            self._peer.close()
