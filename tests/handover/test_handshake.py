"""The proof of the handshake: its tables, run through everything that can happen.

- The exhaustive search: every world of handshake_model/ that can be reached,
  with any number of faults.
- Planted faults: each rule and each order of acts that the handshake needs,
  taken away by itself, lets the search find a counterexample.
- Ten thousand random schedules of several moves, in handshake_model/random.py.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from dataclasses import replace

import pytest

from bhystream.guest import DEAD, GO, HELD, LOADED, MOVED, PAUSED, READY, STARTED
from bhystream.handover.handshake import (
    DESTINATION,
    QUERY,
    RECORD,
    SOURCE,
    Act,
    DestinationState,
    Event,
    Machine,
    SourceState,
)
from handshake_model.faults import (
    BURY,
    MUTANTS,
    SWEPT_RECORDS,
    altered,
    destination,
    one_way,
    query,
)
from handshake_model.model import (
    ASKED,
    BUILT,
    ENDED,
    FINALS,
    FINALS_THERE,
    LOST,
    NONE,
    OVER,
    RUNS,
    STANDS,
    Receiver,
    Rules,
    Sender,
    World,
)
from handshake_model.random import RecordError
from handshake_model.random import World as RandomWorld
from handshake_model.search import INVARIANTS, Found, search
from support.memory_source import seeded

NSCHEDULES = 10_000
NSTEPS = 300
# The rows that only the plain and kept forms use.
PLAIN_ROWS = {
    (SourceState.PAUSED, Event.COPIED_PLAIN),
    (SourceState.PAUSED, Event.COPIED_KEPT),
    (SourceState.HELD, Event.UNSENT),
    ("-q", LOADED),
}


def start(rules: Rules) -> World:
    """Return the world before a move: the guest runs on S."""
    return World() if rules.keeper else World(keeper=ENDED)


def counterexample(rules: Rules) -> Found:
    """Return what the search finds, which has to be a counterexample."""
    found = search(start(rules), rules)
    assert found.broken is not None, f"nothing in {found.nworlds} worlds"
    return found


# ---- the machine -------------------------------------------------------------


def test_the_state_changes_before_the_acts() -> None:
    seen = []
    machine = Machine(SOURCE, SourceState.RUNS, lambda act: seen.append((machine.at, act)))
    machine.on(Event.PAUSE)
    assert seen == [(SourceState.PAUSED, Act.RECORD_PAUSED), (SourceState.PAUSED, Act.PAUSE)]


def test_an_act_that_fails_ends_the_row() -> None:
    def do(act: Act) -> None:
        raise OSError

    machine = Machine(SOURCE, SourceState.OFFERED, do)
    with pytest.raises(OSError):
        machine.on(Event.READY)
    assert machine.at is SourceState.COMMITTED


def test_what_is_not_expected_is_refused() -> None:
    machine = Machine(DESTINATION, DestinationState.BUILDING, lambda act: None)
    assert machine.expects(Event.ENDED) and not machine.expects(Event.GO)
    with pytest.raises(KeyError):
        machine.on(Event.GO)
    assert machine.at is DestinationState.BUILDING


# ---- the exhaustive search ---------------------------------------------------

answered_rules = Rules()


@pytest.fixture(scope="module")
def answered() -> Found:
    gc.disable()  # the collector would look through all worlds again and again
    try:
        return search(World(), answered_rules)
    finally:
        gc.enable()


def test_nothing_that_can_happen_breaks_an_invariant(answered: Found) -> None:
    assert answered.broken is None, "\n".join(answered.trace)


def test_the_search_is_not_vacuous(answered: Found) -> None:
    """The limits are somewhat below the sizes when this was written."""
    print(f"{answered.nworlds} worlds, {answered.faults} faults, {len(answered.quiet)} quiet")
    assert answered.nworlds > 200_000
    assert answered.faults >= 8
    assert len(answered.quiet) > 300
    left = {(world.guest, world.receiver.copy, world.record) for world in answered.quiet}
    assert (OVER, RUNS, None) in left
    assert (STANDS, RUNS, GO) in left
    assert (STANDS, NONE, GO) in left
    assert (STANDS, BUILT, GO) in left
    assert (RUNS, NONE, None) in left


def test_every_row_is_used_and_every_end_is_reached(answered: Found) -> None:
    others = [one_way(Event.COPIED_PLAIN), one_way(Event.COPIED_KEPT)]
    for rules in others:
        search(World(), rules)
    search(held_for_a_loaded_guest(), others[0])
    queries = {("-q", phase) for phase in QUERY}
    rows = {*SOURCE, *DESTINATION, *RECORD, *queries, *FINALS, *FINALS_THERE}
    assert rows - PLAIN_ROWS - {SourceState.HELD} <= answered_rules.used
    assert rows <= answered_rules.used.union(*(rules.used for rules in others))


def test_without_faults_one_copy_runs_and_nothing_is_left() -> None:
    """This holds whatever the operator asks; if the operator asks nothing, the guest has moved."""
    found = search(World(), Rules(), max_faults=0)
    assert found.broken is None
    for world in found.quiet:
        assert world.record is None
        assert (world.guest, world.receiver.copy) in ((OVER, RUNS), (RUNS, NONE))
        assert world.guest == OVER or world.disk_d == DEAD


def held_for_a_loaded_guest() -> World:
    """Return the world after a plain move to `bhyrecv -u`."""
    return World(
        sender=Sender(None),
        keeper=ENDED,
        guest=STANDS,
        record=HELD,
        receiver=Receiver("D", None, (), BUILT),
        disk_d=LOADED,
    )


def test_the_plain_form_is_safe_if_the_operator_goes_by_the_status() -> None:
    found = search(World(), one_way(Event.COPIED_PLAIN))
    assert found.broken is None, "\n".join(found.trace)
    assert found.nworlds > 500
    left = {(world.guest, world.receiver.copy, world.record) for world in found.quiet}
    assert (STANDS, RUNS, HELD) in left


def test_a_kept_guest_runs_on() -> None:
    found = search(World(), one_way(Event.COPIED_KEPT))
    assert found.broken is None, "\n".join(found.trace)
    left = {(world.guest, world.keeper) for world in found.quiet}
    assert (RUNS, ENDED) in left and (STANDS, ENDED) not in left


def test_no_answer_decides_about_a_held_guest() -> None:
    found = search(held_for_a_loaded_guest(), one_way(Event.COPIED_PLAIN))
    assert found.broken is None
    assert {world.record for world in found.quiet} == {HELD}
    alone = search(held_for_a_loaded_guest(), one_way(Event.COPIED_PLAIN), max_faults=0)
    assert {(world.guest, world.receiver.copy) for world in alone.quiet} == {(STANDS, BUILT)}


# ---- what the hypervisors do, and what others do with them -------------------


def test_nothing_brings_back_a_guest_whose_hypervisor_was_killed(answered: Found) -> None:
    """After GO the copy may run; before GO the guest is lost, and no row can mend that."""
    lost = {(world.receiver.copy, world.record) for world in answered.quiet if world.guest == LOST}
    assert {(RUNS, None), (NONE, None), (RUNS, GO)} <= lost


def test_a_request_under_way_is_taken_back_without_bhysend() -> None:
    world = World(sender=Sender(None), guest=ASKED, record=PAUSED, forward_ends=True)
    found = search(world, Rules(), max_faults=0)
    assert found.broken is None
    assert {(quiet.guest, quiet.record) for quiet in found.quiet} == {(RUNS, None)}


def test_a_request_under_way_that_is_not_taken_back_stops_a_guest_that_was_resumed() -> None:
    found = counterexample(Rules(takes_back=False))
    assert (found.broken, found.faults) == ("I3", 1)
    acts = [f"on the record: {act.value}" for act in RECORD[PAUSED, Event.ALONE]]
    assert found.trace[-5:] == [
        *("bhysend is killed", "the keeper takes over"),
        *(*acts, "the guest stands"),
    ]


@pytest.mark.parametrize("copied", [Event.COPIED, Event.COPIED_PLAIN])
def test_a_guest_that_somebody_let_run_is_found_by_asking(copied: Event) -> None:
    """Somebody lets the guest run before the last question; after it nothing helps."""
    rules = Rules() if copied is Event.COPIED else one_way(copied)
    found = counterexample(replace(rules, asks=False))
    assert (found.broken, found.faults) == ("I1", 1)
    last = "the third stage reads READY" if copied is Event.COPIED else f"bhysend: {copied.name}"
    assert found.trace.index("somebody lets the guest run") < found.trace.index(last)


def test_who_lets_the_guest_run_too_late_has_made_two(answered: Found) -> None:
    """Nothing more can be done: the copy here is not ended, and the record stays."""
    late = {world for world in answered.quiet if world.late}
    assert {world.guest for world in late} == {RUNS}
    assert (RUNS, MOVED) in {(world.receiver.copy, world.record) for world in late}


def test_what_a_killed_bhyrecv_leaves_is_held_until_it_is_removed() -> None:
    world = World(
        sender=Sender(None),
        keeper=ENDED,
        guest=STANDS,
        record=GO,
        receiver=Receiver("D", None, (), BUILT),
        disk_d=READY,
    )
    found = search(world, Rules(), max_faults=0)
    assert found.broken is None
    left = {(quiet.guest, quiet.receiver.copy) for quiet in found.quiet}
    assert left == {(STANDS, BUILT), (STANDS, NONE), (RUNS, NONE)}


def test_a_hypervisor_that_is_started_early_must_be_held() -> None:
    found = counterexample(Rules(is_held=False))
    assert (found.broken, found.faults) == ("I1", 0)
    assert "bhyrecv on D starts its hypervisor early" in found.trace


# ---- the six planted faults --------------------------------------------------


def test_without_the_nonce_a_recorded_go_starts_a_second_copy() -> None:
    found = counterexample(Rules(nonce=False))
    assert found.broken == "I1"
    assert "the replay on E reads an old GO" in found.trace


def test_without_the_tombstone_failed_is_said_of_what_still_starts() -> None:
    """No fault is needed: the operator asks while GO is on its way."""
    found = counterexample(query(READY, "FAILED"))
    assert (found.broken, found.faults) == ("I1", 0)
    assert "the operator asks D for this stream: FAILED" in found.trace


def test_without_the_keeper_a_paused_guest_stays_paused() -> None:
    found = counterexample(Rules(keeper=False))
    assert found.broken == "I4"
    assert "bhysend is killed" in found.trace


def test_it_is_the_keeper_who_resumes_before_go() -> None:
    """bhysend and the third stage died together, as they do if their terminal goes away."""
    world = World(
        sender=Sender(None),
        guest=STANDS,
        record=PAUSED,
        forward_ends=True,
        back_ends=True,
        third=False,
    )
    kept = search(world, Rules(), max_faults=0)
    assert kept.broken is None
    assert any(quiet.guest == RUNS for quiet in kept.quiet)
    alone = search(world._replace(keeper=ENDED), Rules(), max_faults=0)
    assert alone.broken == "I4"


def test_without_the_stream_id_an_older_answer_is_believed() -> None:
    found = counterexample(Rules(naming=False))
    assert (found.broken, found.faults) == ("I1", 0)
    assert "the operator asks D for an older stream: FAILED" in found.trace


def test_failed_of_a_guest_that_may_have_run_makes_two() -> None:
    key = DestinationState.STARTING, Event.MAY_HAVE_RAN
    found = counterexample(Rules(destination=altered(DESTINATION, key, BURY)))
    assert (found.broken, found.faults) == ("I1", 1)


def test_unknown_taken_for_failed_makes_two() -> None:
    """This happens on the wrong host, and on the right host if it is asked before READY."""
    wrong = counterexample(Rules(unknown_is_failed=True, same_host=False))
    assert (wrong.broken, wrong.faults) == ("I1", 0)
    assert "the operator asks E for this stream: UNKNOWN" in wrong.trace
    right = counterexample(Rules(unknown_is_failed=True))
    assert (right.broken, right.faults) == ("I1", 0)
    assert "the operator asks D for this stream: UNKNOWN" in right.trace


def test_the_host_of_an_answer_counts() -> None:
    """A replay on E that was never started says FAILED, which means nothing for D."""
    found = counterexample(Rules(same_host=False))
    assert found.broken == "I1"
    assert "a replay on E" in found.trace


# ---- the orders of the acts, and single rows ---------------------------------


@pytest.mark.parametrize("name", MUTANTS)
def test_the_orders_and_rows_are_needed(name: str) -> None:
    invariant, rules = MUTANTS[name]
    assert counterexample(rules).broken == invariant


def test_every_invariant_is_broken_by_something() -> None:
    assert {invariant for invariant, _ in MUTANTS.values()} == set(INVARIANTS)


# ---- random schedules --------------------------------------------------------


def play(rules: Rules, rng: random.Random, nschedules: int) -> tuple[str, Counter[object]]:
    """Run schedules until one breaks an invariant; return that, or "", and what happened."""
    seen: Counter[object] = Counter()
    for schedule in range(nschedules):
        world = RandomWorld(random.Random(rng.getrandbits(64)), rules, seen)
        try:
            world.run(NSTEPS)
        except RecordError as error:
            return f"{error} in schedule {schedule}", seen
        seen["twice"] += sum(move.has_run() for move in world.moves) > 1
    return "", seen


def test_ten_thousand_random_schedules() -> None:
    broken, seen = play(Rules(), seeded(), NSCHEDULES)
    assert broken == ""
    assert seen["twice"] > NSCHEDULES / 20
    for end in (*FINALS, *FINALS_THERE):
        assert end is SourceState.HELD or seen[end] > NSCHEDULES / 20


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(Rules(nonce=False), id="nonce"),
        pytest.param(query(READY, "FAILED"), id="tombstone"),
        pytest.param(Rules(keeper=False), id="keeper"),
        pytest.param(Rules(naming=False), id="stream id"),
        pytest.param(
            destination(DestinationState.STARTING, Event.MAY_HAVE_RAN, *BURY[:1], *BURY[1]),
            id="ran",
        ),
        pytest.param(Rules(same_host=False), id="host"),
        pytest.param(Rules(asks=False), id="question"),
        pytest.param(Rules(takes_back=False), id="request under way"),
        pytest.param(Rules(is_held=False), id="early start"),
        pytest.param(Rules(swept=frozenset()), id="leftovers"),
        pytest.param(Rules(swept=SWEPT_RECORDS | {STARTED}), id="swept"),
        # The question before GO finds most of what an old record can spoil.
        pytest.param(
            Rules(refuse=False, asks=False, meddling=False), id="a move over an old record"
        ),
    ],
)
def test_random_schedules_find_the_planted_faults(rules: Rules) -> None:
    broken, _ = play(rules, seeded(), 10 * NSCHEDULES)
    assert broken
