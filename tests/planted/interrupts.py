"""Bugs of signals: what a handler raises gets lost on the way, or a signal ends the keeper."""

from __future__ import annotations

from planted.bug import Bug, Kind

_TEST = "test_handlers.py::test_"

BUGS = (
    Bug(
        Kind.LOST,
        "what Python drops is not raised again",
        "signals.py",
        "        signal.setitimer(signal.ITIMER_REAL, SOON_S, SOON_S)\n        if not is_handled",
        "        if not is_handled",
        (f"{_TEST}a_program_that_may_be_ended_ends[in_callback-True]",),
    ),
    Bug(
        Kind.LOST,
        "a block that was ended in vain goes on",
        "signals.py",
        "                raise self._raised  # Python has dropped it\n",
        "                pass\n",
        (f"{_TEST}a_block_that_ends_first_is_interrupted_at_its_end[in_silence]",),
    ),
    Bug(
        Kind.LOST,
        "a block that waits is not interrupted again",
        "signals.py",
        "if self._open and self._raised is not None and not is_handled(self._raised):",
        "if False:",
        (f"{_TEST}a_block_is_interrupted[in_finalizer]",),
    ),
    Bug(
        Kind.LOST,
        "what cleans up is interrupted once more",
        "handlers.py",
        "    return found is error",
        "    return False",
        (f"{_TEST}what_cleans_up_in_a_block_is_left_alone[in_module]",),
        also=("Interrupted",),
    ),
    Bug(
        Kind.LOST,
        "a handler raises in an import",
        "handlers.py",
        "        if frame is None:\n",
        "        if True:\n",
        (f"{_TEST}a_program_that_may_be_ended_ends[in_class-True]",),
        also=("RuntimeError",),
    ),
    Bug(
        Kind.LOST,
        "an import that hangs is never interrupted",
        "handlers.py",
        "now_s - self._since_s < _IMPORT_S",
        "True",
        (f"{_TEST}an_import_that_never_ends_is_interrupted[True]",),
    ),
    Bug(
        Kind.LOST,
        "an early one is not told apart from one after the start",
        "signals.py",
        "    if _ending:\n",
        "    if False:\n",
        (f"{_TEST}an_early_signal_is_raised_before_the_next_step[in_module-Interrupts]",),
    ),
    Bug(
        Kind.LOST,
        "it ends a keeper that has no session yet",
        "send/keeper.py",
        "with theirs, _blocked():",
        "with theirs:",
        ("send/test_keeper.py::test_a_keeper_survives_what_ends_a_pipeline_also_while_it_starts",),
    ),
    Bug(
        Kind.LOST,
        "it ends a keeper that does not ignore it yet",
        "send/keeper.py",
        "    _ignore()  # take()",
        "    # take()",
        ("send/test_keeper.py::test_a_keeper_survives_what_ends_a_pipeline_also_while_it_starts",),
    ),
    Bug(
        Kind.LOST,
        "one that ends a wait ends no more than that",
        "send/conversation.py",
        "            self._signals.put_back()  #",
        "            pass  #",
        (
            "send/test_conversation.py::"
            "test_a_signal_ends_the_wait_for_an_explanation_and_for_the_command[True]",
        ),
    ),
)
