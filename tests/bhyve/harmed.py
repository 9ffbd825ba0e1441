"""A move in the command form on a FreeBSD host, during which a test kills processes.

    with Harmed(host, "READY") as move_of:
        move_of.kill("bhyrecv")
        status = move_of.wait()

A point is one at which the move is held up: "round-0" while pages are on their way, an answer's
word before bhysend has the answer, or "nowhere" if nothing holds the move up.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from pathlib import Path

from .rom import DEADLINE_S, Host, program, until

# The shell keeps no pipe open, so that each process sees when the other one ends.
_WAY = (
    "exec 3<&0; sh -c 'echo $$ > {directory}/there; exec cat' <&3 3<&-"
    " | {receive} 3<&- | sh -c {back} 3<&- & exec <&- >&- 3<&-; wait $!"
)
# The first SEEN answer the head and the pages pushed after it; bhysend then prepares the pause.
_HOLD = """
echo $$ > {directory}/back
while read -r answer; do
    is_reached=
    case {point}$answer in
    round-0*" ACCEPT"*) : > {directory}/reached;;
    SEEN*" SEEN "*) ls {directory}/a/held/* > /dev/null 2>&1 && is_reached=1;;
    SEEN*) ;;
    {point}*" {point}"*) is_reached=1;;
    esac
    if test $is_reached; then
        : > {directory}/reached
        until test -e {directory}/go; do sleep 0.1; done
    fi
    echo "$answer"
done
"""


KEEPER, BHYRECV = "bhystream.send.keeper", "bhystream.recv"


class Harmed:
    """A move in the command form, stopped at a point so that the test can kill a process."""

    def __init__(self, host: Host, point: str) -> None:
        self.host, self.to, self.point = host, host.other(), point
        self.was = host.pid()
        directory = host.directory
        back = _HOLD.format(directory=directory, point=point)
        receive = host.receive(self.to)
        way = _WAY.format(directory=directory, receive=shlex.join(receive), back=shlex.quote(back))
        # The bandwidth is low enough that the move is still in its first round at the kill.
        options = ("-B", "2M") if point == "round-0" else ()
        self.log = directory / "bhysend.log"
        with self.log.open("wb") as log:
            self.sender = subprocess.Popen(
                [*host.send(*options), "sh", "-c", way],
                env=host.environment("a"),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        if point != "nowhere":
            until((directory / "reached").exists, point)

    def __enter__(self) -> Harmed:
        return self

    def __exit__(self, *_: object) -> None:
        (self.host.directory / "go").touch()
        self.sender.kill()
        self.sender.wait()
        for end in ("there", "back"):  # a move that has failed early has neither
            if found := self._pid_now(end):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found, signal.SIGKILL)

    def pid(self, who: str) -> int:
        """Return the id of a process; wait for the process, which in round 0 may still start."""
        if who == "bhysend":
            return self.sender.pid
        if who in ("there", "back"):
            return int((self.host.directory / who).read_text())
        if who in ("source", "destination"):
            name = self.host.at if who == "source" else self.to
            until(lambda: self.host.pid(name), who)
            return self.host.pid(name)
        module = KEEPER if who == "keeper" else BHYRECV
        until(lambda: _programs(module), who)
        [pid] = _programs(module)
        return pid

    def kill(self, *who: str) -> None:
        pids = [self.pid(one) for one in who]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if "bhysend" in who:
            self.sender.wait()
        for pid in pids:
            until(lambda pid=pid: not _is_there(pid), "end of the killed")  # type: ignore[misc]

    def kill_if_there(self, who: str) -> bool:
        """Kill a process, if there is one at this moment; say whether there was."""
        found = self._pid_now(who)
        if not found:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(found, signal.SIGKILL)
            until(lambda: not _is_there(found) or who == "bhysend", "end of the killed")
            return True
        return False

    def _pid_now(self, who: str) -> int:
        """Return the id of a process, 0 if there is none."""
        if who == "bhysend":
            return 0 if self.sender.poll() is not None else self.sender.pid
        if who in ("there", "back"):
            with contextlib.suppress(OSError, ValueError):
                return int((self.host.directory / who).read_text())
            return 0
        if who in ("source", "destination"):
            return self.host.pid(self.host.at if who == "source" else self.to)
        found = _programs(KEEPER if who == "keeper" else BHYRECV)
        return found[0] if found else 0

    def wait(self) -> int:
        """Let the answer pass, and wait until all programs have ended; return bhysend's status."""
        (self.host.directory / "go").touch()
        status = self.sender.wait(DEADLINE_S)
        until(lambda: not _programs(KEEPER), "end of the keeper")
        until(lambda: not _programs(BHYRECV), "end of bhyrecv")
        print(self.log.read_text())
        return status

    def phase(self) -> str:
        """Return the guest's phase in `bhysend -l`, "" if the guest is not listed."""
        words = [*program("bhysend"), "-l"]
        listed = subprocess.run(
            words, env=self.host.environment("a"), capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split("\t") for line in listed.splitlines()]
        return next((row[1] for row in rows if row[0] == self.host.at), "")

    def ask(self) -> int:
        """Ask where the guest is, by the command that bhysend prints; return its status."""
        [record] = records(self.host)
        asking = (
            f"env BHYSEND_STATE_DIR={self.host.state('b')}"
            f" {shlex.join(program('bhyrecv'))} -q {record.stem}"
        )
        return self.host.shell(f"{asking} | {shlex.join(program('bhysend'))} -A").status


def _programs(module: str) -> list[int]:
    """Return the ids of the processes that run one of our modules."""
    words = ["/bin/ps", "-axww", "-o", "pid=", "-o", "args="]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in found.splitlines()]
    # bhysend's own arguments, which also name a module, come after these words.
    return [int(words[0]) for words in lines if "python" in words[1] and module in words[2:7]]


def _is_there(pid: int) -> bool:
    words = ["/bin/ps", "-o", "state=", "-p", str(pid)]
    state = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return state.strip() != "" and not state.startswith("Z")


def records(host: Host) -> list[Path]:
    return list((host.state("a") / "source").glob("*.json"))
