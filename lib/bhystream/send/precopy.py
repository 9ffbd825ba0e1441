"""The pre-copy policy: go on, stop and copy, or give up.

Pure functions of statistics: the engine measures, these functions decide, and
a test can ask for a decision without a guest.

Pre-copy pays if fewer pages change during a round than the round sent.  The
policy estimates what is left for the pause after round n from what round n
found: D pages had changed, each within an exposure of E seconds, which is the time
from the look at the page in round n-1 to the look in round n.  The exposure of the
last round ends with the pause, when all pages stand still: e seconds.  The time in which
the throttle has stopped the vCPUs does not count.

A guest that always writes to other pages changes D * e / E pages in that time, and a
guest that writes to the same pages again and again changes D.  Which of the two the
guest is like, the last two rounds show: D grows with the exposure to the power of a,
from 0 (the same pages) to 1 (always others).  As long as they do not show it, a is
taken so that the estimate is too large rather than too small.

The policy compares only the time to transfer this last set with the limit (-d).
The rest of the pause (the last scan, the device state, the destination's load)
does not get shorter by another round, so it is predicted and shown, but decides
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from bhystream.guest import PAGE_BYTES
from bhystream.units import NS

MAX_THROTTLE = 99
_STEP = 10
# A round that carries less than this share of the round before needs no more throttle.
_SHRINKS = 0.7
# How much shorter the second of two exposures has to be to show how the changes grow.  A
# longer one does not: the guest may have become busier.
_SHORTER = 0.8


class Decision(Enum):
    """What bhysend does after a live round."""

    GO_ON = "go on"
    STOP = "stop and copy"
    GIVE_UP = "give up"


class Limits(NamedTuple):
    """What the operator allows.

    downtime_ns: time to send the last dirty set.  rounds: how many live rounds
    bhysend may send before it stops the guest or gives up.  time_ns: how long the
    live rounds may take, likewise.  finish: at these two limits stop the guest
    instead of giving up.  rate_bytes: bytes per second of the live rounds, or None.
    throttle: for how many percent of the time the vCPUs may stand in the live rounds.
    """

    downtime_ns: int = 300_000_000
    rounds: int = 30
    time_ns: int = 600 * NS
    finish: bool = False
    rate_bytes: int | None = None
    throttle: int = 0


class Round(NamedTuple):
    """What one live round measured.

    start_ns, end_ns: monotonic clock.  data_pages: sent with bytes.
    zero_pages: stated as zero.  sent_bytes: stream bytes.  write_ns: the time of
    the round in write(2), in compressing, and in waiting for -B, which grows with
    the number of pages sent, not with the size of the guest.  scan_ns: the CPU time of the
    rest, which finds the pages: other processes do not make it longer, and neither do reads of
    memory that was swapped out.  settle_ns: how long after
    the round the destination had read the bytes that write(2) had taken; 0 if
    nobody has asked.  throttle: for how many percent of the round the vCPUs stood.
    """

    start_ns: int
    end_ns: int
    data_pages: int
    zero_pages: int
    sent_bytes: int
    write_ns: int
    scan_ns: int
    settle_ns: int = 0
    throttle: int = 0

    @property
    def changed_pages(self) -> int:
        """Return the pages that the round found changed.

        Pages that became zero count: they cost no bytes now, but may at the pause.
        """
        return self.data_pages + self.zero_pages

    def ran_ns(self, time_ns: float) -> float:
        """Return for how long the vCPUs have run in time_ns, throttled as in this round."""
        return time_ns * (100 - self.throttle) / 100


class Outlook(NamedTuple):
    """What a stop now would mean.

    last_pages: the pages expected in the last dirty set.  copy_ns: the time to send
    these pages.  scan_ns: the CPU time to find them.
    """

    last_pages: int
    copy_ns: int
    scan_ns: int


def bandwidth_bytes(rounds: Sequence[Round], limits: Limits) -> float:
    """Return the bytes per second that the transport takes, 0.0 if unknown.

    The mean of all rounds, not the rate of the last: a short round fits into pipes
    and socket buffers, and is "sent" at the speed of memory.  At most the rate of -B.
    """
    sent = sum(r.sent_bytes for r in rounds)
    spent_ns = sum(r.write_ns + r.settle_ns for r in rounds)
    if not sent:
        return 0.0
    measured = sent * NS / max(spent_ns, 1)
    return min(measured, float(limits.rate_bytes)) if limits.rate_bytes else measured


def page_cost_bytes(rounds: Sequence[Round]) -> float:
    """Return the stream bytes that a page with bytes takes: with -z fewer than a page has."""
    pages = sum(r.data_pages for r in rounds)
    sent = sum(r.sent_bytes for r in rounds)
    return min(sent / pages, float(PAGE_BYTES)) if pages else float(PAGE_BYTES)


def _exposure_ns(before: Round, after: Round) -> int:
    """Return how long the vCPUs ran between the looks at a page in two rounds, at least 1.

    It is the mean for all pages.  The throttle changes just before a round.
    """
    first_ns, second_ns = before.end_ns - before.start_ns, after.end_ns - after.start_ns
    ran_ns = before.ran_ns(first_ns / 2 + after.start_ns - before.end_ns)
    return max(int(ran_ns + after.ran_ns(second_ns / 2)), 1)


def _growth(rounds: Sequence[Round]) -> float | None:
    """Return the power with which the changed pages grow with the exposure, in [0, 1].

    Returns None if the last two rounds do not show it.
    """
    if len(rounds) < 3:
        return None
    first, middle, last = rounds[-3:]
    exposures = _exposure_ns(middle, last) / _exposure_ns(first, middle)
    if exposures > _SHORTER or not middle.changed_pages or not last.changed_pages:
        return None
    found = math.log(last.changed_pages / middle.changed_pages) / math.log(exposures)
    return min(max(found, 0.0), 1.0)


def outlook(rounds: Sequence[Round], npages: int, limits: Limits, *, delay_ns: int = 0) -> Outlook:
    """Estimate the last dirty set and the pause that it costs.

    rounds: the live rounds so far, not empty.  npages: the guest's size.  delay_ns: from
    the end of the last of these rounds to the pause.  After round 0 alone the rate of
    change is unknown, so all pages that round 0 sent are expected.
    """
    last = rounds[-1]
    # The median, so that one slow scan spoils nothing; of two the shorter, because the guest does
    # not compete for memory bandwidth in the pause.  Round 0 also copies its pages.
    scans = sorted(one.scan_ns for one in rounds[1:] or rounds)
    scan_ns = scans[(len(scans) - 1) // 2]
    if len(rounds) == 1:
        expected = last.data_pages
    else:
        coming = last.ran_ns((last.end_ns - last.start_ns) / 2 + delay_ns)
        exposures = coming / _exposure_ns(rounds[-2], last)
        growth = _growth(rounds)
        if growth is None:
            growth = 0.0 if exposures < 1 else 1.0
        expected = min(npages, math.ceil(last.changed_pages * exposures**growth))
    rate = bandwidth_bytes(rounds, limits)
    copy_ns = int(expected * page_cost_bytes(rounds) * NS / rate) if rate else 0
    return Outlook(expected, copy_ns, scan_ns)


def decide(rounds: Sequence[Round], view: Outlook, limits: Limits, now_ns: int) -> Decision:
    """Decide what comes after a live round.

    rounds: the live rounds so far, not empty; with -r 0 there is none, and nobody
    calls decide().  view: their outlook().  now_ns: since the start of round 0.
    """
    at_limit = len(rounds) >= limits.rounds or now_ns >= limits.time_ns
    # bhysend would give up in a round that does not end in time, even though the guest fits now.
    is_last = at_limit or now_ns + rounds[-1].end_ns - rounds[-1].start_ns >= limits.time_ns
    fits = view.copy_ns <= limits.downtime_ns
    # Two rounds after round 0 show how the guest changes.  Before that the outlook is a guess
    # on the large side, and another round makes the pause shorter even if the guess fits.
    is_known = len(rounds) > 2 or not rounds[-1].changed_pages or not rounds[0].data_pages
    if fits and (is_known or is_last):
        return Decision.STOP
    if at_limit:
        return Decision.STOP if limits.finish else Decision.GIVE_UP
    return Decision.GO_ON


def needed_throttle(rounds: Sequence[Round], limits: Limits) -> int:
    """Return by how many percent to throttle so that each round halves what is left.

    rounds: at least two.
    """
    changing = rounds[-1].changed_pages * NS / _exposure_ns(rounds[-2], rounds[-1])
    carried = bandwidth_bytes(rounds, limits) / page_cost_bytes(rounds)
    if not changing:
        return 0
    return min(max(math.ceil(100 * (1 - carried / changing / 2)), 0), MAX_THROTTLE)


def next_throttle(rounds: Sequence[Round], view: Outlook, limits: Limits) -> int:
    """Return by how many percent to throttle the guest in the next round.

    rounds: the live rounds so far, not empty.  view: their outlook().  More than now only if
    the last set does not fit and the rounds do not shrink; then what needed_throttle() says,
    but a step at least: a guest that changes the same pages again and again has to be slowed
    down more than its rate of change shows.
    """
    percent = rounds[-1].throttle
    if len(rounds) < 2 or view.copy_ns <= limits.downtime_ns:
        return percent
    if rounds[-1].data_pages <= _SHRINKS * rounds[-2].data_pages:
        return percent
    wanted = max(percent + _STEP, needed_throttle(rounds, limits))
    return max(min(wanted, limits.throttle), percent)


def cures(rounds: Sequence[Round], view: Outlook, limits: Limits) -> str:
    """Say what would make the last set fit; return "" if it fits or nothing is known yet.

    A throttle slows a guest down that always writes to other pages as it says, and one that
    writes to the same pages again and again by less.

    The arguments are those of next_throttle().
    """
    if len(rounds) < 2 or view.copy_ns <= limits.downtime_ns:
        return ""
    is_long = view.copy_ns >= 10 * NS
    limit = f"{-(-view.copy_ns // NS)}s" if is_long else f"{math.ceil(view.copy_ns / 1e6)}ms"
    found = f"-d {limit} would fit"
    needed = needed_throttle(rounds, limits)
    if needed > limits.throttle:
        found += f", --throttle {needed} may"
    return found


def forecast(
    touched_pages: int, dirty_bytes: float, scan_ns: int, rate: float, limits: Limits
) -> tuple[int, int] | None:
    """Forecast a move before it begins: (live rounds, copy_ns of the last set).

    touched_pages: the pages that round 0 sends.  dirty_bytes: the bytes that the guest
    changes per second.  scan_ns: the time of one scan.  rate: bytes per second that the
    transport takes.  Returns None if bhysend would give up at the limits.
    """
    if limits.rounds == 0:
        return 0, int(touched_pages * PAGE_BYTES * NS / rate)
    made: list[Round] = []
    at, percent, pending = 0, 0, float(touched_pages)
    while True:
        write_ns = int(pending * PAGE_BYTES * NS / rate)
        end = at + scan_ns + write_ns
        sent = int(pending)
        made.append(Round(at, end, sent, 0, sent * PAGE_BYTES, write_ns, scan_ns, throttle=percent))
        view = outlook(made, touched_pages, limits)
        decision = decide(made, view, limits, end)
        if decision == Decision.GIVE_UP:
            return None
        # The mean exposures: up to the pause half of this round, and up to the next round
        # half of both; the next round takes longer the more has changed.
        changing = dirty_bytes / PAGE_BYTES / NS / 2
        changed = changing * made[-1].ran_ns(end - at)
        if decision == Decision.STOP:
            return len(made), int(min(changed, touched_pages) * PAGE_BYTES * NS / rate)
        percent = next_throttle(made, view, limits)
        changing *= (100 - percent) / 100
        share = changing * PAGE_BYTES * NS / rate
        pending = float(touched_pages)
        if share < 1:
            pending = min((changed + changing * scan_ns) / (1 - share), pending)
        at = end
