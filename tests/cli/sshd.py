"""A private SSH server on the loopback, for this user and one key, and a client that knows it.

Neither the user's nor the host's SSH configuration is read or changed.  As root the server needs
the empty directory /run/sshd, which is made if it is missing.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType

from support.waiting import until

from .pipeline import Stage, Words

_EMPTY = Path("/run/sshd")
_TRIES = 5


def free_port() -> int:
    """Return a port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def listens(port: int) -> bool:
    """Say whether a process listens at a port of the loopback, without connecting.

    Source: proc_net_tcp: local address in hexadecimal and host order, then state 0A, LISTEN.
    """
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(
        line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines
    )


class Sshd:
    """The server; a context manager."""

    def __init__(self, directory: Path) -> None:
        """Make keys and configuration in an existing directory."""
        self._directory = directory
        self._port = 0
        self._server: Stage | None = None
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.copy(directory / "user.pub", directory / "authorized_keys")

    def __enter__(self) -> Sshd:
        if os.geteuid() == 0:
            _EMPTY.mkdir(mode=0o755, exist_ok=True)
        for _ in range(_TRIES):
            if self._start(free_port()):
                return self
        said = self._server.stderr if self._server else ""
        self.close()
        raise RuntimeError(f"sshd does not start: {said}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the server."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _start(self, port: int) -> bool:
        """Start the server at a port; return False if the port was taken in the meantime."""
        self.close()
        here = self._directory
        (here / "known_hosts").write_text(f"[127.0.0.1]:{port} {(here / 'host.pub').read_text()}")
        (here / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {here}/host\n"
            f"AuthorizedKeysFile {here}/authorized_keys\nPidFile none\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nStrictModes no\n"
            "PermitRootLogin prohibit-password\n"
        )
        program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        assert program is not None, "sshd is missing (openssh-server)"
        # sshd runs itself again for each connection, by its absolute path.
        argv = [program, "-D", "-e", "-f", str(here / "sshd_config")]
        self._server = server = Stage(argv, os.environ, subprocess.DEVNULL, None)
        until(lambda: listens(port) or server.process.poll() is not None, "sshd")
        self._port = port
        return server.process.poll() is None

    def allow(self, options: str = "") -> None:
        """Say what the key may do.  options: those of authorized_keys, "" for a key of every right.

        Source: sshd(8), AUTHORIZED_KEYS FILE FORMAT.
        """
        key = (self._directory / "user.pub").read_text()
        (self._directory / "authorized_keys").write_text(f"{options} {key}".lstrip())

    def command(self, argv: Words, **environment: str) -> list[str]:
        """Return the ssh command that runs argv at the server, with these variables set."""
        # sshd passes on no variable, and the programs there are to be those of this checkout.
        whole = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        whole |= environment
        words = ["env", *(f"{key}={value}" for key, value in whole.items())]
        return self.typed(shlex.join([*words, *(str(word) for word in argv)]))

    def typed(self, remote: str) -> list[str]:
        """Return the ssh command that has the server run what is typed, in its shell."""
        here = self._directory
        settings = [
            f"UserKnownHostsFile={here}/known_hosts", "StrictHostKeyChecking=yes",
            f"IdentityFile={here}/user", "IdentitiesOnly=yes", "IdentityAgent=none",
            "BatchMode=yes",
        ]  # fmt: skip
        options = [word for setting in settings for word in ("-o", setting)]
        user = pwd.getpwuid(os.geteuid()).pw_name
        return [
            "ssh", "-F", "none", "-T", *options, "-p", str(self._port),
            f"{user}@127.0.0.1", remote,
        ]  # fmt: skip
