"""One synchronous QMP connection, with a time limit on every command.

The protocol itself is the QEMU project's `qemu.qmp` package, an asyncio
library.  This class drives it from a private event loop that runs only while
a command is under way: no thread, no signal handler, no wake-up descriptor.
A signal handler of the program that only sets a flag interrupts nothing here:
the system calls are restarted, and a command ends with its reply, at its limit
or with the loss of the connection.

QEMU serves one client at a time: a second client can connect, but is not
greeted.  So if no greeting comes within GREETING_LIMIT_S, another client holds
the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from bhystream.backend.process import await_end, identify, peer_pid
from bhystream.backend.qemu.process import read_argv
from bhystream.errors import AccessError, GuestError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

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


def _library() -> type[QMPClient]:
    """Import qemu.qmp, an optional dependency.  Raises GuestError if it is missing."""
    try:
        from qemu.qmp import QMPClient
    except ImportError:
        raise GuestError(
            "cannot talk to QEMU: the Python package qemu.qmp is missing",
            hint="pip install bhystream[qemu]",
        ) from None
    log = logging.getLogger("qemu.qmp")
    if not log.handlers:
        # Without a handler, the logging module prints to standard error what
        # we report ourselves, in one line.
        log.addHandler(logging.NullHandler())
    return QMPClient


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
    """

    def __init__(self, path: str, who: str) -> None:
        """Connect.  Raises AccessError if the socket is forbidden, else GuestError."""
        client_class = _library()
        self.path = path
        self.who = who
        sock = self._connect()
        try:
            self.pid = peer_pid(sock, "QEMU")
            if _managed_by_libvirt(path, read_argv(self.pid)):
                raise GuestError(
                    f"{who}: cannot connect: libvirt manages this QEMU", hint="virsh migrate"
                )
            self._loop = asyncio.new_event_loop()
        except BaseException:
            sock.close()
            raise
        # Keep asyncio from printing errors: our own exceptions report them.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._client: QMPClient = client_class("bhystream")
        self._ahead: list[tuple[str, asyncio.Task[Any]]] = []
        try:
            self._greet(sock)
        except BaseException:
            sock.close()
            self._loop.close()
            raise
        self.version = self._version()

    def _connect(self) -> socket.socket:
        """Return a connected, non-blocking socket, which the caller closes."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(GREETING_LIMIT_S)
            sock.connect(self.path)
            sock.setblocking(False)
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

    def _greet(self, sock: socket.socket) -> None:
        who = identify(self.pid, "QEMU")
        try:
            self._run(self._client.connect(sock), GREETING_LIMIT_S)
        except TimeoutError:
            raise self._busy() from None
        except Exception as error:
            if await_end(who, _END_S):
                text = f"{self.who}: its QEMU (process {self.pid}) has ended"
                raise NobodyListensError(text) from None
            raise GuestError(f"{self.who}: {self.path} does not speak QMP: {error}") from None

    def _version(self) -> str:
        greeting = self._client.greeting
        try:
            number: Any = greeting.QMP.version["qemu"] if greeting else {}
            return f"{number['major']}.{number['minor']}.{number['micro']}"
        except (KeyError, TypeError):
            return "unknown"

    def _run(self, work: Awaitable[T], limit_s: float) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, limit_s))

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
        from qemu.qmp import ExecuteError

        work: Awaitable[Any]
        if self._ahead and self._ahead[0][0] == command and not arguments:
            work = self._ahead.pop(0)[1]
        else:
            work = self._client.execute(command, arguments)
        try:
            return self._run(work, limit_s)
        except ExecuteError as error:
            raise CommandError(f"{self.who}: cannot {doing}: {error}") from None
        except TimeoutError:
            raise ConnectionLostError(
                f"{self.who}: cannot {doing}: QEMU did not answer {command} in {limit_s:g} s"
            ) from None
        except Exception as error:
            # EOFError, OSError, StateError and ProtocolError mean the same to us.
            raise ConnectionLostError(
                f"{self.who}: cannot {doing}: lost QEMU ({error or type(error).__name__})"
            ) from None

    @contextlib.contextmanager
    def ahead(self, *commands: str) -> Iterator[None]:
        """Send commands without arguments all at once; in this block execute() takes their answers.

        For the pause: QEMU does the commands in their order, and the connection is crossed once
        instead of once for each.  QEMU also does the commands behind one that has failed, so
        a command that may follow only a success does not belong here.  The block runs them in
        the same order; the answers to those that it does not run are dropped at its end.
        """
        self._ahead = [
            (command, self._loop.create_task(self._client.execute(command))) for command in commands
        ]
        try:
            yield
        finally:
            left, self._ahead = self._ahead, []
            # A later command must not get the answer to one of these.
            with contextlib.suppress(Exception):
                for _, task in left:
                    self._run(task, COMMAND_LIMIT_S)

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

        `fd` stays the caller's.  Do not call this while a command is under way:
        the byte that carries the descriptor has to arrive with, or before, the
        getfd that claims it.  Raises CommandError or ConnectionLostError.
        """
        try:
            # qemu.qmp uses asyncio's private socket here.  If asyncio withdraws
            # that socket, only this call has to change.
            self._client.send_fd_scm(fd)
        except Exception as error:
            raise ConnectionLostError(f"{self.who}: cannot {doing}: {error}") from None
        self.execute("getfd", {"fdname": name}, doing=doing)

    def close(self) -> None:
        """Disconnect; QEMU and its guest stay as they are.  May be called twice."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(Exception):
            self._run(self._client.disconnect(), 2.0)
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def __del__(self) -> None:
        """Close a connection that an error path left open: asyncio would print a page about it.

        Do nothing if the garbage collector calls this within another
        connection's command, where a second loop cannot run.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            with contextlib.suppress(Exception):
                self.close()
