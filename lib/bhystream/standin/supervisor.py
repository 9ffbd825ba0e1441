"""Play vm-bhyve's `vm _run`: the loop around a guest, its taps, its locks and its log.

    python -m bhystream.standin.supervisor [-t TAP:BRIDGE]... NAME -- ARGUMENT...

The arguments are those of the stand-in, without the name.  If PATH has a program
called `bhyve`, the supervisor runs that program instead of the stand-in, because
vm-bhyve runs the bare word.  The exit status is 1 if vm-bhyve would refuse the
start.

vm-bhyve refuses the start if there is a run.lock of another host, or if the VM
exists.  After each exit of bhyve, suspending.lock ends the loop, from 1.7.0 on;
without suspending.lock, bhyve's status decides:

    0        on_restart of NAME.conf, by default restart, which is without -r
    1, 2     the guest is off: the loop ends
    others   on_fault, by default shutdown.  So a bhyve that was killed (137)
             ends the loop, but not with on_fault=restart

At the end the supervisor removes taps, VM and locks, in this order.  bhyve's
standard error goes to bhyve.log, as with debug=yes.

Source: freebsd/vm-bhyve lib/vm-run, vm::run, vm::lock, vm::handle_exit.
"""

from __future__ import annotations

import getopt
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from bhystream.backend.bhyve.host import VMM_DIR
from bhystream.errors import BhyError, GuestError, UsageError

from .config import parse
from .kernel import StandinHost

LOG = "vm-bhyve.log"
RUN_LOCK = "run.lock"
SUSPENDING_LOCK = "suspending.lock"
CONSOLE = "console"
_OFF = (1, 2)
_AGAIN_S = 0.05  # between a fault and the next run
_USAGE = "usage: supervisor [-t tap:bridge]... name -- argument ...\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise one guest; return 0 when its loop has ended, 1 if that fails.

    argv: without the program's name; None stands for the process's own.
    """
    directory = os.environ.get(VMM_DIR)
    try:
        if not directory:
            raise UsageError(f"{VMM_DIR} is not set")
        words = list(sys.argv[1:] if argv is None else argv)
        own, arguments = _split(words)
        options, operands = getopt.getopt(own, "t:", ["tap="])
        if len(operands) != 1:
            raise UsageError("one name is needed", hint=_USAGE)
        taps = [value for _, value in options]
        Supervisor(StandinHost(Path(directory)), operands[0], arguments).run(taps)
    except (BhyError, OSError, getopt.GetoptError) as error:
        sys.stderr.write(f"supervisor: {error}\n{getattr(error, 'hint', '')}")
        return 1
    return 0


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        raise UsageError("-- and the arguments are missing", hint=_USAGE)
    at = words.index("--")
    return words[:at], words[at + 1 :]


class Supervisor:
    """One guest's supervisor.  arguments: bhyve's, without the name."""

    def __init__(self, host: StandinHost, name: str, arguments: Sequence[str]) -> None:
        self._host = host
        self._name = name
        self._arguments = list(arguments)
        store = Path(host.environment()[VMM_DIR]) / "vm"
        self._guest = store / name
        self._config = parse(arguments)
        self._has_rom = bool(self._config.get("lpc.bootrom"))

    def run(self, taps: Sequence[str]) -> None:
        """Start the guest again and again, until its loop ends.

        taps: each "tap0:bridge0"; made now and destroyed at the end.  Raises
        GuestError if the guest runs already, or a tap cannot be made.
        """
        self._confirm_stopped()
        self._guest.mkdir(parents=True, exist_ok=True)
        (self._guest / LOG).write_text("")
        self._log("initialising")
        made: list[str] = []
        try:
            for word in taps:
                tap, _, bridge = word.partition(":")
                self._log(f"initialising network device {tap}")
                self._host.make_tap(tap, bridge or None)
                made.append(tap)
            (self._guest / RUN_LOCK).write_text(f"{os.uname().nodename}\n")
            self._write_console()
            self._log("booting")
            self._loop()
        finally:
            self._clean_up(made)

    def _clean_up(self, taps: Sequence[str]) -> None:
        for tap in taps:
            self._log(f"destroying network device {tap}")
            (self._host.run_dir.parent / "net" / tap).unlink(missing_ok=True)
        is_suspended = (self._guest / SUSPENDING_LOCK).exists()
        self._log("suspended" if is_suspended else "stopped")
        self._host.destroy(self._name)
        for lock in (RUN_LOCK, SUSPENDING_LOCK, CONSOLE):
            (self._guest / lock).unlink(missing_ok=True)

    def _write_console(self) -> None:
        ports = (f"com{number}" for number in range(1, 5))
        found = ((port, self._config.get(f"lpc.{port}.path")) for port in ports)
        text = "".join(f"{port}={path}\n" for port, path in found if path)
        (self._guest / CONSOLE).write_text(text)

    def _confirm_stopped(self) -> None:
        """Raise GuestError if the guest runs, here or on another host.

        Source: freebsd/vm-bhyve lib/vm-run, vm::confirm_stopped.
        """
        lock = self._guest / RUN_LOCK
        holder = lock.read_text().partition("\n")[0].strip() if lock.exists() else ""
        if holder and holder != os.uname().nodename:
            raise GuestError(f"{self._name} appears to be running on {holder}")
        if self._host.exists(self._name):
            raise GuestError(f"{self._name} appears to be running already (vmm exists)")

    def _loop(self) -> None:
        arguments = list(self._arguments)
        for run in count(1):
            if not self._has_rom:  # the loader makes the VM anew
                self._host.destroy(self._name)
                self._host.create(self._name)
            self._log_arguments(arguments)
            self._log(f"starting bhyve (run {run})")
            status = self._run_guest(arguments)
            self._log(f"bhyve exited with status {status}")
            if not self._starts_again(status):
                return
            self._log("restarting")
            arguments = _without_restore(arguments)

    def _starts_again(self, status: int) -> bool:
        if self._host.knows_suspending_lock() and (self._guest / SUSPENDING_LOCK).exists():
            return False
        if status in _OFF:
            return False
        if status == 0:
            return self._asked("on_restart", "restart") == "restart"
        time.sleep(_AGAIN_S)
        return self._asked("on_fault", "shutdown") == "restart"

    def _asked(self, key: str, default: str) -> str:
        """Return the value of a key in NAME.conf, vm-bhyve's configuration of the guest."""
        path = self._guest / f"{self._name}.conf"
        found = default
        for line in path.read_text().splitlines() if path.exists() else ():
            name, _, value = line.partition("=")
            if name.strip() == key:
                found = value.strip().strip('"')
        return found

    def _run_guest(self, arguments: list[str]) -> int:
        """Run bhyve once; return its exit status, or 128 plus the signal that killed bhyve."""
        found = shutil.which("bhyve")
        program = [found] if found else self._host.program()
        with (self._guest / "bhyve.log").open("ab") as log:
            status = subprocess.run(
                [*program, *arguments, self._name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            ).returncode
        return 128 - status if status < 0 else status

    def _log_arguments(self, arguments: Sequence[str]) -> None:
        """Log the argument vector in the three parts of vm-bhyve: options, devices, console."""
        parts: dict[str, list[str]] = {"options": [], "devices": [], "console": []}
        for words in _pairs(arguments):
            is_device = words[0] == "-s"
            is_console = words[0] == "-l" and words[-1].startswith("com")
            part = "devices" if is_device else "console" if is_console else "options"
            parts[part] += words
        for part, words in parts.items():
            self._log(f" [bhyve {part}: {' '.join(words)}]")

    def _log(self, text: str) -> None:
        stamp = time.strftime("%b %d %H:%M:%S")
        with (self._guest / LOG).open("a") as log:
            log.write(f"{stamp}: {text}\n")


def _pairs(arguments: Sequence[str]) -> list[list[str]]:
    """Return each option with its value."""
    found: list[list[str]] = []
    for word in arguments:
        if word.startswith("-") or not found or len(found[-1]) == 2:
            found.append([word])
        else:
            found[-1].append(word)
    return found


def _without_restore(arguments: Sequence[str]) -> list[str]:
    return [word for words in _pairs(arguments) if words[0] != "-r" for word in words]


if __name__ == "__main__":
    sys.exit(main())
