"""One QMP connection, with a time limit on every command.

The protocol itself is in wire.py; this class knows whose socket it is, and says
in our errors what has failed.  A signal handler of the program that only sets a
flag interrupts nothing here: the system calls are restarted, and a command ends
with its reply, at its limit or with the loss of the connection.

QEMU serves one client at a time: a second client can connect, but is not
greeted.  So if no greeting comes within GREETING_LIMIT_S, another client holds
the socket.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from bhystream.backend.process import await_end, identify, peer_pid
from bhystream.backend.qemu.process import read_argv
from bhystream.backend.qemu.wire import RefusedError, Wire, WireError
from bhystream.errors import AccessError, GuestError, as_error

GREETING_LIMIT_S = 5.0
COMMAND_LIMIT_S = 10.0
_END_S = 0.5

T = TypeVar("T")


class CommandError(GuestError):
    """QEMU answered with an error; the connection is sound."""


class ConnectionLostError(GuestError):
    """The connection broke, or a command's limit passed: the command's effect is unknown."""


class NobodyListensError(GuestError):
    """No process listens at the path: there is no socket, or its QEMU is gone."""


def _managed_by_libvirt(path: str, argv: list[str]) -> bool:
    """Say whether libvirt owns the QEMU behind a socket.

    libvirt opens the listening socket itself and passes it to QEMU, so the peer
    may be libvirt's daemon.  A disk below /var/lib/libvirt proves nothing; the
    master key secret, or a monitor below .../libvirt/qemu, proves libvirt.
    """
    program = argv[0].rsplit("/", 1)[-1] if argv else ""
    if program in ("libvirtd", "virtqemud"):
        return True
    if "/libvirt/qemu/" in path:
        return True
    return any("masterKey0" in word and "secret" in word for word in argv)


class Qmp:
    """A connection to the QMP socket at `path`, greeted and negotiated.

    who: names the guest in messages, "guest web1"; may be set later, when the
    name is known.  pid: the process that listens.  version: "7.2.22".

    on_wait, below: as in Wire; what it raises ends the command, whose effect is then unknown,
    and has to be a BhyError.
    """

    def __init__(self, path: str, who: str, on_wait: Callable[[], None] = lambda: None) -> None:
        """Connect.  Raises AccessError if the socket is forbidden, else GuestError."""
        self.path = path
        self.who = who
        sock = self._connect()
        try:
            self.pid = peer_pid(sock, "QEMU")
            if _managed_by_libvirt(path, read_argv(self.pid)):
                raise GuestError(
                    f"{who}: cannot connect: libvirt manages this QEMU", hint="virsh migrate"
                )
            self._wire = Wire(sock, on_wait)
            self.version = self._greet()
        except BaseException:
            sock.close()
            raise
        # Sent by ahead(), in order: each command, and its id.
        self._ahead: list[tuple[str, int]] = []

    def _connect(self) -> socket.socket:
        """Return a connected socket, which the caller closes."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(GREETING_LIMIT_S)
            sock.connect(self.path)
        except (TimeoutError, BlockingIOError):
            sock.close()
            raise self._busy() from None
        except OSError as error:
            sock.close()
            # The error for an AF_UNIX path that is too long has no errno.
            text = f"{self.who}: cannot connect to {self.path}: {error.strerror or error}"
            if isinstance(error, PermissionError):
                raise AccessError(text) from None
            if isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
                raise NobodyListensError(text) from None
            raise GuestError(text) from None
        return sock

    def _busy(self) -> GuestError:
        return GuestError(
            f"{self.who}: cannot connect: another client holds {self.path}",
            hint="end that client, or give QEMU a second -qmp socket",
        )

    def _greet(self) -> str:
        """Take the greeting, and leave the negotiation; return QEMU's version."""
        who = identify(self.pid, "QEMU")
        try:
            greeting = self._wire.greeting(GREETING_LIMIT_S)
            id_ = self._wire.send("qmp_capabilities", None, GREETING_LIMIT_S)
            self._wire.answer(id_, GREETING_LIMIT_S)
        except TimeoutError:
            raise self._busy() from None
        except (WireError, RefusedError, OSError) as error:
            if await_end(who, _END_S):
                text = f"{self.who}: its QEMU (process {self.pid}) has ended"
                raise NobodyListensError(text) from None
            raise GuestError(f"{self.who}: {self.path} does not speak QMP: {error}") from None
        try:
            number = greeting["version"]["qemu"]
            return f"{number['major']}.{number['minor']}.{number['micro']}"
        except (KeyError, TypeError):
            return "unknown"

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        doing: str,
        limit_s: float = COMMAND_LIMIT_S,
    ) -> Any:
        """Run one command and return its value.

        doing: the purpose, for messages, in the infinitive: "pause".
        limit_s: how long to wait for the reply, in seconds.
        Raises CommandError if QEMU answers with an error, else ConnectionLostError.
        """
        return self._execute(command, arguments, doing, limit_s)

    def _execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        doing: str,
        limit_s: float,
        *fds: int,
    ) -> Any:
        try:
            if self._ahead and self._ahead[0][0] == command and not arguments:
                _, id_ = self._ahead.pop(0)
            else:
                id_ = self._wire.send(command, arguments, limit_s, *fds)
            return self._wire.answer(id_, limit_s)
        except RefusedError as error:
            raise CommandError(f"{self.who}: cannot {doing}: {error}") from None
        except TimeoutError:
            raise ConnectionLostError(
                f"{self.who}: cannot {doing}: QEMU did not answer {command} in {limit_s:g} s"
            ) from None
        except (WireError, OSError) as error:
            raise ConnectionLostError(f"{self.who}: cannot {doing}: lost QEMU ({error})") from None
        except MemoryError as error:
            # Nobody can tell any more where in the exchange the two ends are.
            lack = as_error(error)
            raise ConnectionLostError(f"{self.who}: cannot {doing}: {lack}", lack.hint) from None

    @contextlib.contextmanager
    def ahead(self, *commands: str) -> Iterator[None]:
        """Send commands without arguments all at once; in this block execute() takes their answers.

        For the pause: QEMU does the commands in their order, and the connection is crossed once
        instead of once for each.  QEMU also does the commands behind one that has failed, so
        a command that may follow only a success does not belong here.  The block runs them in
        the same order; the answers to those that it does not run are dropped at its end.
        """
        # If the connection is lost already, execute() says so.
        with contextlib.suppress(Exception):
            for command in commands:
                self._ahead.append((command, self._wire.send(command, None, COMMAND_LIMIT_S)))
        try:
            yield
        finally:
            self._wire.forget([id_ for _, id_ in self._ahead])
            self._ahead.clear()

    def ask(
        self,
        command: str,
        make: Callable[[Any], T],
        arguments: Mapping[str, object] | None = None,
        *,
        doing: str,
    ) -> T:
        """Run one command and return what `make` makes of its value.

        make: raises LookupError, TypeError, ValueError, AttributeError or ArithmeticError for
        a value that it cannot use.  Raises GuestError if `make` does so, and what
        execute() raises.
        """
        value = self.execute(command, arguments, doing=doing)
        try:
            return make(value)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            raise GuestError(
                f"{self.who}: cannot {doing}: QEMU's answer to {command} is not what QMP says"
            ) from None

    def send_fd(self, name: str, fd: int, *, doing: str) -> None:
        """Give QEMU a duplicate of `fd` under `name`, for "fd:name".

        `fd` stays the caller's.  Raises CommandError or ConnectionLostError.
        """
        self._execute("getfd", {"fdname": name}, doing, COMMAND_LIMIT_S, fd)

    def close(self) -> None:
        """Disconnect; QEMU and its guest stay as they are.  May be called twice."""
        self._wire.close()
