"""The prediction of the pause: each part from a measurement of this move, and from experience.

    state       what prepare() measured, or what is usual for the hypervisor
    last pages  the last live scan, by the threads that the pause has; and the pages
                that precopy.outlook() expects, at the rate so far
    -p          only what earlier runs of the same command took
    answers     two trips to the destination and back, for END and GO; and the usual load

experience.py corrects each estimate by how far it was off in earlier moves of the same kind.
"""

from __future__ import annotations

import hashlib

from bhystream.send.experience import Experience
from bhystream.send.job import SendJob
from bhystream.send.precopy import Outlook
from bhystream.send.stopwatch import Parts
from bhystream.units import NS, counted


class Prediction:
    """The predicted pause of one move, and what that move teaches."""

    def __init__(
        self, job: SendJob, kind: str, where: str, nthreads: int, *, is_early: bool
    ) -> None:
        """Read what earlier moves have taught.

        kind: the hypervisor, "bhyve".  where: the destination's host; "" in the forms without
        answers.  nthreads: how many scan in the pause.  is_early: the destination starts its
        hypervisor before the pause.
        """
        self._source = job.source
        self._nthreads = nthreads
        self._experience = Experience(job.base)
        late = "" if is_early else ", started late"
        self._state = f"state of {kind}"
        self._last = f"last pages of {kind} by {counted(nthreads, 'thread')}"
        self._answers = f"answers of {kind} on {where}{late}" if where else ""
        self._hook = ""
        if job.opts.hook is not None:
            # The command may contain a secret, so only its digest is noted.
            self._hook = f"-p {hashlib.sha256(job.opts.hook.encode(errors='replace')).hexdigest()}"
        self._estimates: dict[str, float] = {}

    def parts(self, view: Outlook, trip_ns: int) -> Parts:
        """Return the parts of a pause that begins now.

        view: what the live rounds say.  trip_ns: the time to the destination and back.
        """
        fixed = self._source.fixed()
        self._estimates = {
            self._state: fixed.state_ns,
            self._last: view.copy_ns + view.scan_ns / self._nthreads,
        }
        if self._answers:
            self._estimates[self._answers] = 2 * trip_ns + fixed.load_ns
        found = {
            part: int(estimate * self._experience.factor(part))
            for part, estimate in self._estimates.items()
        }
        last_ns = found[self._last]
        hook_ns = int(NS * (self._experience.noted(self._hook) or 0.0))
        return Parts(
            state_ns=found[self._state],
            last_ns=last_ns,
            hook_ns=max(hook_ns - last_ns, 0),
            answers_ns=found.get(self._answers, 0),
        )

    def learn(self, measured: Parts) -> None:
        """Note what the parts that were predicted have taken in this move."""
        taken = {
            self._state: measured.state_ns,
            self._last: measured.last_ns,
            self._answers: measured.answers_ns,
        }
        for part, estimate in self._estimates.items():
            self._experience.learn(part, estimate, taken[part])
        if self._hook:
            # The command runs beside the last pages: its own end is not seen before theirs.
            self._experience.learn(self._hook, NS, measured.last_ns + measured.hook_ns)
        self._experience.save()
