"""The prediction of the pause: each part from a measurement, and from experience.

    state       what prepare() measured, or what is usual for the hypervisor
    last pages  the last live scan, by the threads that the pause has; and the pages
                that precopy.outlook() expects, at the rate so far; with --verify,
                one more scan, by one thread
    -p          only what earlier runs of the same command took
    answers     what they took in earlier moves; before the first, two trips to the
                destination and back, for END and GO, and the usual load

experience.py corrects the estimates of state and last pages by how far they were off in
earlier moves of the same kind.  The answers are taken as they were, but for the trips that this
move has measured: a short trip changes more from one look to the next than the answers do, so
only what is longer counts.  Moves on a busy host and moves on an idle one are two kinds, see
hostload.py; the first of its kind learns from the other.

A dry run has neither rehearsed nor sent anything.  It foretells the parts that it can: from
its own scan, and from how long the state and the answers of earlier moves have taken.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bhystream.guest import Fixed
from bhystream.send.experience import Experience, Like
from bhystream.send.hostload import HostLoad
from bhystream.send.precopy import Outlook
from bhystream.send.stopwatch import Parts
from bhystream.send.strides import threads_for
from bhystream.units import NS, counted, size

# How many times as long a part takes on a busy host.  Measured with a busy loop for each CPU:
# the state 1.4 times, the last pages 2.0, the answers 1.6.
_BUSY = 1.6
# The two trips of a near destination, which are a part of its answers.
_NEAR_NS = 20_000_000

MEASURED, EARLIER, ASSUMED, UNKNOWN = "measured", "earlier", "assumed", "unknown"


class Foretold(NamedTuple):
    """A part of a pause that may come: its name, its time (-1 if unknown), how it is known."""

    part: str
    time_ns: int
    basis: str


class Prediction:
    """The predicted pause of one move, and what that move teaches."""

    def __init__(
        self,
        fixed: Callable[[], Fixed],
        base: Path,
        kind: str,
        where: str,
        hook: str | None,
        memory_bytes: int,
        *,
        is_early: bool,
        is_verified: bool = False,
    ) -> None:
        """Read what earlier moves have taught.

        fixed: the source's.  base: the state directory.  kind: the hypervisor, "bhyve".
        where: the destination's host; "" if nobody answers.  hook: -p.  memory_bytes: the
        guest's memory size.  is_early: the destination starts its hypervisor before the pause.
        is_verified: --verify.
        """
        self._fixed = fixed
        self.nthreads = threads_for(fixed().vcpus)
        self._experience = Experience(base)
        self._load = HostLoad()
        self._is_busy = False
        late = "" if is_early else ", started late"
        self._state = f"state of {kind}"
        hashed = ", verified" if is_verified else ""
        self._last = f"last pages of {kind} by {counted(self.nthreads, 'thread')}{hashed}"
        # How many scans by one thread take as long as those of the pause.
        self._scans = 1 / self.nthreads + is_verified
        # The destination may still compare the memory when END is written, or then load it.
        of = f", up to {size(1 << (memory_bytes - 1).bit_length())}" if late or hashed else ""
        self._answers = f"answers of {kind} on {where}{late}{hashed}{of}" if where else ""
        self._hook = "" if hook is None else _digest(hook)
        self._estimates: dict[str, float] = {}
        self._far_ns = 0

    def parts(self, view: Outlook, trip_ns: int) -> Parts:
        """Return the parts of a pause that begins now.

        view: what the live rounds say.  trip_ns: the time to the destination and back.
        """
        fixed = self._fixed()
        self._is_busy = self._load.is_busy()
        self._estimates = {
            self._state: fixed.state_ns,
            self._last: view.copy_ns + view.scan_ns * self._scans,
        }
        state_ns, last_ns = (
            int(estimate * self._experience.factor(*self._kinds(part)))
            for part, estimate in self._estimates.items()
        )
        answers_ns = max(self._foretell_answers(trip_ns, fixed).time_ns, 0)
        hook_ns = int(NS * (self._experience.noted(self._hook) or 0.0)) if self._hook else 0
        return Parts(state_ns, last_ns, max(hook_ns - last_ns, 0), answers_ns)

    def foretell(self, scan_ns: int, trip_ns: int) -> list[Foretold]:
        """Return the parts of the pause of a move that may come, but for the last pages.

        scan_ns: the CPU time of a scan by one thread.  trip_ns: as for parts(), of the
        destination that was asked.
        """
        fixed = self._fixed()
        self._is_busy = self._load.is_busy()
        known = self._kinds(self._last)
        scan_ns = int(scan_ns * self._scans * self._experience.factor(*known))
        found = [
            self._as_before("state", self._state, fixed.state_ns),
            Foretold("scan", scan_ns, EARLIER if self._experience.noted(*known) else MEASURED),
            self._foretell_answers(trip_ns, fixed),
        ]
        if self._hook:
            noted = self._experience.noted(self._hook)
            hook = Foretold("hook", -1, UNKNOWN)
            found.append(hook if noted is None else Foretold("hook", int(NS * noted), EARLIER))
        return found

    def learn(self, measured: Parts) -> None:
        """Note what the parts that were predicted have taken in this move."""
        taken = {
            self._state: measured.state_ns,
            self._last: measured.last_ns,
            self._answers: measured.answers_ns - self._far_ns,
        }
        if self._estimates:
            for part, estimate in self._estimates.items():
                self._experience.learn(self._kinds(part)[0], estimate, taken[part])
            for part in filter(None, (self._state, self._answers)):
                self._experience.learn(self._kinds(_in_seconds(part))[0], NS, taken[part])
        if self._hook:
            # The command runs beside the last pages: its own end is not seen before theirs.
            self._experience.learn(self._hook, NS, measured.last_ns + measured.hook_ns)
        self._experience.save()

    def _kinds(self, part: str) -> tuple[str, Like]:
        """Return the name of a part's notes under the load of now, and what will do instead."""
        idle, busy = part, f"{part}, busy host"
        return (busy, Like(idle, _BUSY)) if self._is_busy else (idle, Like(busy, 1 / _BUSY))

    def _foretell_answers(self, trip_ns: int, fixed: Fixed) -> Foretold:
        """Return the time of the answers; remember how much of it is a long way."""
        if not self._answers:
            return Foretold("answers", -1, UNKNOWN)
        self._far_ns = max(2 * trip_ns - _NEAR_NS, 0)
        usual_ns = min(2 * trip_ns, _NEAR_NS) + fixed.load_ns
        near = self._as_before("answers", self._answers, usual_ns)
        return near._replace(time_ns=near.time_ns + self._far_ns)

    def _as_before(self, name: str, part: str, usual_ns: int) -> Foretold:
        """Return how long a part took in earlier moves, or else what is usual."""
        noted = self._experience.noted(*self._kinds(_in_seconds(part)))
        if noted is None:
            return Foretold(name, usual_ns, ASSUMED)
        return Foretold(name, int(NS * noted), EARLIER)


def _in_seconds(part: str) -> str:
    """Return under which name the time of a part is noted, whatever its estimate was."""
    return f"{part}, in seconds"


def _digest(hook: str) -> str:
    """Return the name of a -p command, which may contain a secret: only a digest is noted."""
    import hashlib  # loads OpenSSL

    return f"-p {hashlib.sha256(hook.encode(errors='replace')).hexdigest()}"
