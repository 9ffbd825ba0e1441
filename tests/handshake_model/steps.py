"""Everything that can happen next in a World of model.py.

Each function here yields the steps of one party, or does one thing in the world
and returns the world after it.  A step is (kind, what happens, the World after).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from bhystream.guest import DEAD, GO, HELD, MOVED, READY, STARTED
from bhystream.handover.handshake import Act, DestinationState, Event, Machine, SourceState
from handshake_model.model import (
    ANSWERS,
    ASKED,
    BUILT,
    DESTINATION_RECORDS,
    ENDED,
    FINALS,
    FINALS_THERE,
    HEARD,
    KILLED,
    LOST,
    NONE,
    OVER,
    RAN,
    RUNS,
    SOURCE_RECORDS,
    STANDS,
    SWEPT,
    TOLD,
    WAITS,
    WRITES,
    Receiver,
    Rules,
    Sender,
    World,
    disk,
    lock_is_free,
)

FREE, CHANCE, FAULT = "free", "chance", "fault"
FINAL_WORDS = ("RUNNING", "FAILED")
Step = tuple[str, str, World]
S = TypeVar("S", SourceState, DestinationState)


def steps(world: World, rules: Rules) -> Iterator[Step]:
    """Yield everything that may happen next."""
    yield from sender_steps(world, rules)
    yield from hand_steps(world, rules)
    yield from hypervisor_steps(world)
    yield from receiver_steps(world, rules, world.receiver)
    yield from operator_steps(world, rules)
    if rules.plain:
        yield from plain_operator_steps(world, rules)
        return
    yield from third_steps(world, rules)
    if world.replay is not None:
        yield from receiver_steps(world, rules, world.replay)
    yield from wire_steps(world, rules)


def fire(
    rules: Rules,
    table: Mapping[tuple[S, Event], tuple[S, tuple[Act, ...]]],
    at: S,
    event: Event,
) -> tuple[S, tuple[Act, ...]]:
    """Let the real Machine say where an event leads, and by which acts."""
    acts: list[Act] = []
    machine = Machine(table, at, acts.append)
    machine.on(event)
    rules.used.add((at, event))
    return machine.at, tuple(acts)


# ---- host S: bhysend, and the parties that act in its place ------------------


def at_source(world: World, act: Act) -> World:
    """Do one act of bhysend, or of a party that acts in its place."""
    if act in SOURCE_RECORDS:
        return world._replace(record=SOURCE_RECORDS[act])
    if act is Act.FORGET:
        return unheard(world._replace(record=None))
    if act in WRITES:
        tape = (*world.tape, WRITES[act])
        if world.forward_ends:  # a buffer takes the message, and loses it
            return world._replace(tape=tape)
        return world._replace(tape=tape, forward=(*world.forward, WRITES[act]))
    if world.guest in (OVER, LOST):
        return world
    return world._replace(guest={Act.PAUSE: STANDS, Act.RESUME: RUNS, Act.DISCARD: OVER}[act])


def sender_on(world: World, rules: Rules, event: Event) -> World:
    """Let an event happen to bhysend."""
    assert world.sender.at is not None
    return world._replace(sender=Sender(*fire(rules, rules.source, world.sender.at, event)))


def sender_hears(world: World, rules: Rules, word: str) -> World:
    """Hand an answer to bhysend.  An answer that is not due is a FAILURE, if that is expected."""
    due = asked(world, rules, HEARD[word])
    for event in (due, Event.FAILURE):
        if (world.sender.at, event) in rules.source:
            return sender_on(world, rules, event)
    return world


def asked(world: World, rules: Rules, event: Event) -> Event:
    """Ask the hypervisor before a second copy may start; FAILURE if the guest does not stand."""
    if event in (Event.COPIED_PLAIN, Event.READY) and rules.asks and world.guest != STANDS:
        return Event.FAILURE
    return event


def sender_fails(world: World, rules: Rules) -> World:
    """Let an act of bhysend fail; the acts after it are not done."""
    for event in (Event.UNSENT, Event.FAILURE):
        if (world.sender.at, event) in rules.source:
            return sender_on(world, rules, event)
    return sender_dies(world)


def sender_dies(world: World) -> World:
    """Let bhysend be gone, whatever the reason."""
    world = world._replace(sender=Sender(None), forward_ends=True)
    return world if world.record else unheard(world)


def unheard(world: World) -> World:
    """Drop the answers: the record that they could be about is gone."""
    return world._replace(third=False, seen=None, back=(), back_ends=True, answers=frozenset())


def sender_steps(world: World, rules: Rules) -> Iterator[Step]:
    """bhysend goes on, runs into a limit, or is killed."""
    at = world.sender.at
    if at is None:
        return
    yield FAULT, "bhysend is killed", sender_dies(world)
    if world.sender.todo:
        yield from sender_acts(world, rules)
        return
    if at in FINALS:
        rules.used.add(at)
        yield FREE, f"bhysend ends: {at.name}", sender_dies(world)._replace(keeper=ENDED)
    if at is SourceState.THROTTLED and world.guest in (RUNS, STANDS):
        held = {RUNS: STANDS, STANDS: RUNS}[world.guest]
        yield FREE, "bhysend: throttles the guest", world._replace(guest=held)
    # The throttle has let the guest run before the pause.
    may_pause = at is not SourceState.THROTTLED or world.guest != STANDS
    for event in (Event.THROTTLE, Event.PAUSE, rules.copied):
        if (at, event) in rules.source and (may_pause or event is not Event.PAUSE):
            due = asked(world, rules, event)
            yield FREE, f"bhysend: {due.name}", sender_on(world, rules, due)
    # No more answers; or a limit, an interrupt, a disk that is full.
    for event in (Event.FAILURE, Event.DOUBT):
        if (at, event) in rules.source:
            kind = FREE if world.back_ends and not world.back else FAULT
            yield kind, f"bhysend: {event.name}", sender_on(world, rules, event)


def sender_acts(world: World, rules: Rules) -> Iterator[Step]:
    """bhysend does the next act, or cannot do it."""
    act, *rest = world.sender.todo
    refused = is_refused(world, act)
    if act is Act.PAUSE and world.guest == RUNS:
        yield FREE, f"bhysend: asks to {act.value}", world._replace(guest=ASKED)
    elif not refused and (act is not Act.PAUSE or world.guest == STANDS):
        done = at_source(world, act)._replace(sender=world.sender._replace(todo=tuple(rest)))
        yield FREE, f"bhysend: {act.value}", done
    kind = FREE if refused or (act in WRITES and world.forward_ends) else FAULT
    yield kind, f"bhysend: cannot {act.value}", sender_fails(world, rules)


def is_refused(world: World, act: Act) -> bool:
    """Say whether the hypervisor refuses to end a guest that runs, or to pause a lost one."""
    return (act, world.guest) in ((Act.DISCARD, RUNS), (Act.PAUSE, LOST))


def hypervisor_steps(world: World) -> Iterator[Step]:
    """The source's hypervisor does what it was asked, or what somebody else wants."""
    if world.guest == ASKED:
        yield FREE, "the guest stands", world._replace(guest=STANDS)
    if world.guest == STANDS:
        run = world._replace(guest=RUNS)
        if world.late or was_asked(world):
            # A replay makes the two copies no worse.
            run = run._replace(late=True, replay=None, tape=(), disk_e=None)
        yield FAULT, f"somebody lets the guest run{', too late' * run.late}", run
    if world.guest in (ASKED, STANDS):
        yield FAULT, "the guest's hypervisor is killed", world._replace(guest=LOST)


def was_asked(world: World) -> bool:
    """Say whether bhysend has asked for the last time, and END or GO may be out."""
    if world.sender.at is None:
        return world.record in (HELD, GO, MOVED)
    return world.sender.at in (
        SourceState.HELD,
        SourceState.COMMITTED,
        SourceState.RUNS_THERE,
        SourceState.DOUBT,
    )


def take_over(world: World, rules: Rules, event: Event) -> World:
    """Read the record under the guest's lock, and begin to act on it.

    An event that has no row for this record counts as no answer.
    """
    for key in ((world.record, event), (world.record, Event.ALONE)):
        if world.record is not None and key in rules.record:
            rules.used.add(key)
            return world._replace(hand=rules.record[world.record, key[1]])
    return world


def hand_steps(world: World, rules: Rules) -> Iterator[Step]:
    """The keeper takes over; the party that acts on the record goes on, or is killed."""
    if world.keeper == WAITS:
        yield FAULT, "the keeper is killed", world._replace(keeper=KILLED)
        if world.sender.at is None:
            alone = take_over(world._replace(keeper=ENDED), rules, Event.ALONE)
            yield FREE, "the keeper takes over", alone
    if world.hand:
        act, *rest = world.hand
        if is_refused(world, act):
            yield FREE, f"on the record: cannot {act.value}", world._replace(hand=())
        else:
            is_left = act is Act.RESUME and world.guest == ASKED and not rules.takes_back
            done = world if is_left else at_source(world, act)
            yield FREE, f"on the record: {act.value}", done._replace(hand=tuple(rest))
        killed = world._replace(hand=(), keeper=KILLED)
        yield FAULT, "who acts on the record is killed", killed


def third_steps(world: World, rules: Rules) -> Iterator[Step]:
    """The third stage hands answers to bhysend, or acts by the last final one."""
    if not world.third:
        return
    killed = world._replace(third=False, seen=None, back=(), back_ends=True)
    yield FAULT, "the third stage is killed", killed
    if world.back and not world.sender.todo:
        word, *rest = world.back
        after = world._replace(back=tuple(rest))
        if word in FINAL_WORDS:
            after = after._replace(seen=word)
        if world.sender.at is not None:
            after = sender_hears(after, rules, word)
        yield FREE, f"the third stage reads {word}", after
    no_more = world.back_ends and not world.back
    if world.record and lock_is_free(world) and (world.seen or no_more):
        event = HEARD[world.seen] if world.seen else Event.ALONE
        after = take_over(world._replace(third=False, seen=None), rules, event)
        yield FREE, f"the third stage acts on {event.name}", after


# ---- a destination: bhyrecv, alive or as a replay ----------------------------


def put(world: World, before: Receiver, after: Receiver) -> World:
    """Change a bhyrecv, the live one or the replay."""
    if before is world.replay:
        if after.at or after.copy != NONE:
            return world._replace(replay=unseen(after))
        # The replay and its copy are gone: another may come, and E is then another host.
        return world._replace(replay=None, disk_e=None)
    if after.at is None:  # messages on the way to this bhyrecv are lost
        return world._replace(receiver=after, forward=(), forward_ends=True, back_ends=True)
    return world._replace(receiver=after)


def unseen(replay: Receiver) -> Receiver:
    """Do at once the next acts of a replay that nobody can see: their order does not matter."""
    while replay.todo:
        act = replay.todo[0]
        is_unheard = act is Act.SAY_READY or (act in ANSWERS and replay.host == "E")
        if not is_unheard and (act is not Act.TEAR_DOWN or replay.copy not in (NONE, BUILT)):
            break
        copy = NONE if act is Act.TEAR_DOWN else replay.copy
        replay = replay._replace(todo=replay.todo[1:], copy=copy)
    return replay


def receiver_on(world: World, rules: Rules, receiver: Receiver, event: Event) -> World:
    """Let an event happen to a bhyrecv."""
    assert receiver.at is not None
    table = rules.destination
    at, acts = fire(rules, table, receiver.at, event)
    copy = BUILT if event is Event.ENDED and receiver.copy == NONE else receiver.copy
    return put(world, receiver, receiver._replace(at=at, todo=acts, copy=copy))


def receiver_dies(world: World, receiver: Receiver) -> World:
    """Let a bhyrecv be gone.  Its copy stays, but a copy that a replay has BUILT is swept."""
    is_swept = receiver is world.replay and receiver.copy == BUILT
    copy = NONE if is_swept else receiver.copy
    return put(world, receiver, Receiver(receiver.host, None, (), copy))


def sweep(world: World, rules: Rules, host: str) -> World:
    """Remove what a dead bhyrecv has left on a host, if the record allows that."""
    receiver = world.receiver
    is_left = receiver.host == host and receiver.at is None
    if not is_left or receiver.copy in (NONE, RAN) or disk(world, host) not in rules.swept:
        return world
    copy = NONE if receiver.copy == BUILT else SWEPT
    return world._replace(receiver=receiver._replace(copy=copy))


def next_bhyrecv(world: World, rules: Rules, host: str) -> World:
    """Let another bhyrecv come for this guest: a copy that waits for GO is DEAD, then removed.

    If a bhyrecv lives, it has the guest's lock, and nothing that is READY is removed.
    """
    if disk(world, host) == READY and is_alone(world, host):
        world = record_there(world, host, DEAD)
    return sweep(world, rules, host)


def is_alone(world: World, host: str) -> bool:
    """Say whether no bhyrecv lives on a host."""
    here = (world.receiver, world.replay)
    return all(one is None or one.host != host or one.at is None for one in here)


def receiver_fails(world: World, rules: Rules, receiver: Receiver, act: Act) -> World:
    """Let an act of a bhyrecv fail; the acts after it are not done."""
    event = Event.NEVER_RAN if act is Act.RECORD_STARTED else Event.FAILURE
    if (receiver.at, event) in rules.destination:
        return receiver_on(world, rules, receiver, event)
    return receiver_dies(world, receiver)


def receiver_steps(world: World, rules: Rules, receiver: Receiver) -> Iterator[Step]:
    """A bhyrecv goes on, or is killed; its copy runs, or dies."""
    live = receiver is world.receiver
    name = f"{'bhyrecv' if live else 'the replay'} on {receiver.host}"
    if receiver.copy == TOLD:
        yield CHANCE, f"{name}: its copy runs", put(world, receiver, receiver._replace(copy=RUNS))
    if receiver.copy == RUNS:
        yield FAULT, f"{name}: its copy dies", put(world, receiver, receiver._replace(copy=RAN))
    if receiver.at is None:
        swept = next_bhyrecv(world, rules, receiver.host) if live else world
        if swept != world:
            yield CHANCE, f"another bhyrecv on {receiver.host}", swept
        return
    yield FAULT, f"{name} is killed", receiver_dies(world, receiver)
    if receiver.todo:
        yield from receiver_acts(world, rules, receiver, name)
    elif receiver.at in FINALS_THERE:
        rules.used.add(receiver.at)
        ended = receiver_dies(world, receiver)
        if rules.plain:
            ended = ended._replace(status=receiver.at)
        yield FREE, f"{name} ends: {receiver.at.name}", ended
    elif live:
        yield from live_input(world, rules, name)
    else:
        yield from taped_input(world, rules, receiver, name)


def live_input(world: World, rules: Rules, name: str) -> Iterator[Step]:
    """bhyrecv reads a message of the stream, or its end, or runs into a limit."""
    receiver = world.receiver
    if receiver.copy == NONE:
        early = receiver._replace(copy=BUILT if rules.is_held else TOLD)
        yield CHANCE, f"{name} starts its hypervisor early", put(world, receiver, early)
    due, event = ("GO", Event.GO) if receiver.at is DestinationState.READY else ("END", Event.ENDED)
    if world.forward and world.forward[0] == due:
        after = world._replace(forward=world.forward[1:])
        yield FREE, f"{name} reads {due}", receiver_on(after, rules, receiver, event)
    closed = world.forward_ends and not world.forward
    failed = receiver_on(world, rules, receiver, Event.FAILURE)
    yield FREE if closed else FAULT, f"{name}: FAILURE", failed


def taped_input(world: World, rules: Rules, replay: Receiver, name: str) -> Iterator[Step]:
    """A replay reads END; then the end of the tape, or GO with an old nonce: both are a FAILURE."""
    if replay.at is DestinationState.BUILDING:
        yield FREE, f"{name} reads END", receiver_on(world, rules, replay, Event.ENDED)
        yield FAULT, f"{name}: FAILURE", receiver_on(world, rules, replay, Event.FAILURE)
        return
    if "GO" in world.tape and not rules.nonce:
        yield FREE, f"{name} reads an old GO", receiver_on(world, rules, replay, Event.GO)
    yield FREE, f"{name}: FAILURE", receiver_on(world, rules, replay, Event.FAILURE)


def receiver_acts(world: World, rules: Rules, receiver: Receiver, name: str) -> Iterator[Step]:
    """A bhyrecv does the next act, or cannot do it, or learns the result of the last act."""
    act, *rest = receiver.todo
    if isinstance(act, Event):
        yield FREE, f"{name}: {act.value}", receiver_on(world, rules, receiver, act)
    elif act is Act.START:
        for kind, copy, event in (
            (FREE, RUNS, Event.STARTED),
            (FAULT, BUILT, Event.NEVER_RAN),
            (FAULT, TOLD, Event.MAY_HAVE_RAN),
        ):
            after = receiver._replace(copy=copy, todo=(*rest, event))
            yield kind, f"{name}: {act.value}: {event.name}", put(world, receiver, after)
    else:
        refused = act is Act.RECORD_STARTED and not may_start(world, rules, receiver.host)
        if not refused:
            left = receiver._replace(todo=tuple(rest))
            yield FREE, f"{name}: {act.value}", at_destination(world, receiver, left, act)
        failed = receiver_fails(world, rules, receiver, act)
        yield FREE if refused else FAULT, f"{name}: cannot {act.value}", failed


def may_start(world: World, rules: Rules, host: str) -> bool:
    """Say whether the record may become STARTED."""
    due = None if rules.plain else READY
    return not rules.recheck or disk(world, host) == due


def at_destination(world: World, before: Receiver, after: Receiver, act: Act) -> World:
    """Do one act of a bhyrecv, which changes it from `before` to `after`."""
    if act is Act.TEAR_DOWN:
        after = after._replace(copy=RAN if after.copy in (RUNS, RAN) else NONE)
    is_replay = before is world.replay
    world = put(world, before, after)
    if act in DESTINATION_RECORDS:
        return record_there(world, before.host, DESTINATION_RECORDS[act])
    if is_replay and before.host == "D" and ANSWERS.get(act) in FINAL_WORDS:
        return world._replace(answers=world.answers | {ANSWERS[act]})
    if act not in ANSWERS or is_replay or world.back_ends:
        return world
    return world._replace(back=(*world.back, ANSWERS[act]))


def record_there(world: World, host: str, phase: str) -> World:
    """Write the record of this stream on a host."""
    return world._replace(disk_d=phase) if host == "D" else world._replace(disk_e=phase)


# ---- the wires and the operator ----------------------------------------------


def wire_steps(world: World, rules: Rules) -> Iterator[Step]:
    """A channel is cut; what was recorded on the way is replayed.

    A replay is refused on a host that has a record, or another bhyrecv with the
    lock of the stream.
    """
    if world.forward or not world.forward_ends:
        yield FAULT, "the way in is cut", world._replace(forward=(), forward_ends=True)
    if world.back or not world.back_ends:
        yield FAULT, "the way back is cut", world._replace(back=(), back_ends=True)
    if world.replay is not None or not world.tape or world.late:
        return
    if world.disk_e is None:
        yield FAULT, "a replay on E", world._replace(replay=Receiver("E"))
    if world.disk_d is None and world.receiver.at is None:
        swept = sweep(world, rules, "D")
        yield FAULT, "a replay on D", swept._replace(replay=Receiver("D"))


def query(world: World, rules: Rules, host: str, old: bool = False) -> tuple[World, str]:
    """Ask by `bhyrecv -q`: return the world after it, and the answer.

    old: ask for an older stream of this guest, which FAILED on D.
    """
    phase = DEAD if old else disk(world, host)
    acts, word = rules.query[phase]
    rules.used.add(("-q", phase))
    for act in acts:
        world = record_there(world, host, DESTINATION_RECORDS[act])
    here = (world.receiver, world.replay)
    runs = any(r is not None and r.host == host and r.copy == RUNS for r in here)
    if phase == STARTED and runs:
        word = "RUNNING"
    elif phase == STARTED and is_alone(world, host):
        # -q sees that bhyrecv was killed before START, and that nobody can start the copy.
        copies = {r.copy for r in here if r is not None and r.host == host}
        if BUILT in copies and copies <= {BUILT, NONE}:
            world, word = record_there(world, host, DEAD), "FAILED"
    # Without a record -q does not know that anything is left.
    return (world if phase is None or old else sweep(world, rules, host)), word


def operator_steps(world: World, rules: Rules) -> Iterator[Step]:
    """The operator asks, or hands an answer to `-A`."""
    if not world.record:
        return
    for host, old in (("D", False), ("D", True), ("E", False)):
        believed = (not old or not rules.naming) and (host == "D" or not rules.same_host)
        if not believed and (old or disk(world, host) != READY):
            continue  # this would change nothing
        after, word = query(world, rules, host, old)
        said = "FAILED" if word == "UNKNOWN" and rules.unknown_is_failed else word
        if believed and said in HEARD and said not in world.answers:
            after = after._replace(answers=world.answers | {said})
        if after != world:
            what = "an older stream" if old else "this stream"
            yield CHANCE, f"the operator asks {host} for {what}: {word}", after
    if lock_is_free(world):
        yield CHANCE, "-A acts on what it does not believe", take_over(world, rules, Event.ALONE)
    for word in world.answers:
        if lock_is_free(world):
            yield CHANCE, f"-A acts on {word}", take_over(world, rules, HEARD[word])
        elif world.sender.at and not world.sender.todo and not rules.plain:
            yield CHANCE, f"-A hands on {word}", sender_hears(world, rules, word)


def plain_operator_steps(world: World, rules: Rules) -> Iterator[Step]:
    """The operator sees bhyrecv's exit status, and discards or resumes a held guest."""
    if world.record != HELD or not lock_is_free(world):
        return
    if world.status is DestinationState.RUNS:
        discard = rules.record[MOVED, Event.ALONE]
        yield CHANCE, "bhysend --discard", world._replace(hand=discard)
    if world.status is DestinationState.NOTHING:
        _, resume = rules.source[SourceState.HELD, Event.UNSENT]
        yield CHANCE, "bhysend --resume", world._replace(hand=resume)
