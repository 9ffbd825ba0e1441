"""Bugs of signals: what a handler raises gets lost on the way, or a signal ends the keeper."""

from __future__ import annotations

from planted.bug import Bug, Kind

_TEST = "test_handlers.py::test_"

BUGS = (
    Bug(
        Kind.LOST,
        "what Python drops is not raised again",
        "handlers.py",
        "        put_off()\n",
        "",
        (f"{_TEST}a_program_that_may_be_ended_ends[callback-early]",),
    ),
    Bug(
        Kind.LOST,
        "the next signal is ignored although the first was dropped",
        "signals.py",
        "handlers.install(number, end, obey)",
        "handlers.install(number, end)",
        (f"{_TEST}a_program_that_may_be_ended_ends[finalizer-early]",),
    ),
    Bug(
        Kind.LOST,
        "a block takes a dropped one for the one that ended it",
        "signals.py",
        "handlers.install(number, self._interrupt, self._reopen)",
        "handlers.install(number, self._interrupt)",
        (f"{_TEST}a_block_is_interrupted[callback]",),
    ),
    Bug(
        Kind.LOST,
        "a handler raises in an import",
        "handlers.py",
        "if _drops.is_reporting or _imports(frame):",
        "if _drops.is_reporting:",
        (f"{_TEST}a_block_is_interrupted[class]",),
        also=("RuntimeError",),
    ),
    Bug(
        Kind.LOST,
        "a handler raises in the report of what was dropped",
        "handlers.py",
        "if _drops.is_reporting or _imports(frame):",
        "if _imports(frame):",
        (f"{_TEST}a_second_signal_meanwhile_is_not_lost_either",),
        also=("TimeoutError",),
    ),
    Bug(
        Kind.LOST,
        "an early one is not told apart from one after the start",
        "signals.py",
        "    handlers.deliver()\n",
        "",
        (
            "cli/test_interrupts.py::test_before_it_has_begun_a_program_says_that"
            "[bhyrecv-bhystream.recv.query-argv5-1]",
        ),
    ),
    Bug(
        Kind.LOST,
        "it ends a keeper that has no session yet",
        "send/keeper.py",
        "with theirs, _blocked():",
        "with theirs:",
        ("send/test_keeper.py::test_a_keeper_that_starts_survives_it_too",),
    ),
    Bug(
        Kind.LOST,
        "it ends a keeper that does not ignore it yet",
        "send/keeper.py",
        "    _ignore()  # take()",
        "    # take()",
        ("send/test_keeper.py::test_a_keeper_that_starts_survives_it_too",),
    ),
)
