"""Bugs of the guest's clocks: too far, too little, or in a place that is not known."""

from __future__ import annotations

from planted.bug import Bug, Kind

CLOCKS = "backend/bhyve/clocks.py"
TESTS = "backend/test_bhyve_clocks.py::"

BUGS = (
    Bug(
        Kind.CLOCK,
        "the clocks are moved by what they went on after the stop, too",
        CLOCKS,
        "return ns - self.ran_on_ns",
        "return ns",
        (
            "backend/test_bhyve_release.py::"
            "test_the_clocks_are_not_moved_by_what_they_went_on_after_the_stop[False]",
        ),
    ),
    Bug(
        Kind.CLOCK,
        "a timer that the counter has passed waits for the counter's next turn",
        CLOCKS,
        "if not period and (comparator - counter) % _TURN <= ticks:",
        "if False:",
        (f"{TESTS}test_a_comparator_stays_ahead_when_the_counter_turns_over",),
        is_quick=True,
    ),
    Bug(
        Kind.CLOCK,
        "a HPET that stands still is moved on",
        CLOCKS,
        '    if not config & _HPET_ENABLE:\n        return b""\n',
        "",
        (f"{TESTS}test_a_hpet_that_stands_still_is_left",),
        is_quick=True,
    ),
    Bug(
        Kind.CLOCK,
        "the source may have another kernel",
        CLOCKS,
        'source.get("kern.osreldate") != integer(host.sysctl("kern.osreldate"))',
        "False",
        (f"{TESTS}test_what_is_not_known_for_sure_is_left",),
        is_quick=True,
    ),
    Bug(
        Kind.CLOCK,
        "the sizes of the structures are not compared",
        CLOCKS,
        "        if len(blob) != expected:\n",
        "        if False:\n",
        (f"{TESTS}test_what_is_not_known_for_sure_is_left",),
        also=("error",),
        is_quick=True,
    ),
    Bug(
        Kind.CLOCK,
        "TIME is written before the command of -p has ended",
        "send/outgoing.py",
        "        if not job.opts.keep:\n            sampled = self._end_hook(custody)\n"
        "        with signals.watching(rounds.done, STALL_SECONDS):\n"
        "            self._write_time(begun.writer)\n",
        "        with signals.watching(rounds.done, STALL_SECONDS):\n"
        "            self._write_time(begun.writer)\n"
        "        if not job.opts.keep:\n            sampled = self._end_hook(custody)\n"
        "        with signals.watching(rounds.done, STALL_SECONDS):\n",
        ("cli/test_clocks.py::test_with_the_option_they_go_on[g5]",),
    ),
)
