"""Everything that can happen next in a World of handshake_model.py.

Each function here yields the steps of one party, or does one thing in the world
and returns what comes of it.  A step is (kind, what happens, the World after).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from bhystream import handshake
from bhystream.handshake import Act, At, Event, Machine, There
from handshake_model import (
    ANSWERS,
    DESTINATION_RECORDS,
    ENDED,
    FINALS,
    FINALS_THERE,
    HEARD,
    KILLED,
    LOADED,
    NONE,
    OVER,
    RAN,
    RUNS,
    SOURCE_RECORDS,
    STANDS,
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
Step = tuple[str, str, World]
S = TypeVar("S", At, There)


def steps(world: World, rules: Rules) -> Iterator[Step]:
    """Yield everything that may happen next."""
    yield from sender_steps(world, rules)
    yield from hand_steps(world, rules)
    yield from receiver_steps(world, rules, world.receiver)
    if rules.plain:
        yield from plain_operator_steps(world, rules)
        return
    yield from third_steps(world, rules)
    if world.replay is not None:
        yield from receiver_steps(world, rules, world.replay)
    yield from wire_steps(world)
    yield from operator_steps(world, rules)


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


# ---- host S: bhysend, and who acts in its place ------------------------------


def is_closed(world: World) -> bool:
    """Say whether what bhysend writes now cannot arrive."""
    return world.forward_cut or world.receiver.at is None


def at_source(world: World, act: Act) -> World:
    """Do one act of bhysend's, or of one who acts in its place."""
    if act in SOURCE_RECORDS:
        return world._replace(record=SOURCE_RECORDS[act])
    if act is Act.FORGET:
        return world._replace(record=None)
    if act in WRITES:
        tape = (*world.tape, WRITES[act])
        if is_closed(world):  # a buffer takes it, and it is lost
            return world._replace(tape=tape)
        return world._replace(tape=tape, forward=(*world.forward, WRITES[act]))
    if world.guest == OVER:
        return world
    return world._replace(guest={Act.PAUSE: STANDS, Act.RESUME: RUNS, Act.DISCARD: OVER}[act])


def sender_on(world: World, rules: Rules, event: Event) -> World:
    """Let an event happen to bhysend."""
    assert world.sender.at is not None
    return world._replace(sender=Sender(*fire(rules, rules.source, world.sender.at, event)))


def sender_hears(world: World, rules: Rules, word: str) -> World:
    """Hand an answer to bhysend.  One that is not due is a failure, if that is one."""
    for event in (HEARD[word], Event.FAILURE):
        if (world.sender.at, event) in rules.source:
            return sender_on(world, rules, event)
    return world


def sender_fails(world: World, rules: Rules) -> World:
    """An act of bhysend's fails, and those after it are not done."""
    for event in (Event.UNSENT, Event.FAILURE):
        if (world.sender.at, event) in rules.source:
            return sender_on(world, rules, event)
    return sender_dies(world)


def sender_dies(world: World) -> World:
    """bhysend is gone, and the keeper does not know why."""
    return world._replace(sender=Sender(None))


def sender_steps(world: World, rules: Rules) -> Iterator[Step]:
    """bhysend goes on, fails, runs into a limit, or is killed."""
    at = world.sender.at
    if at is None:
        return
    yield FAULT, "bhysend is killed", sender_dies(world)
    if world.sender.todo:
        yield from sender_acts(world, rules)
    elif at in FINALS:
        rules.used.add(at)
        yield FREE, f"bhysend ends: {at.name}", sender_dies(world)._replace(keeper=ENDED)
    else:
        copied = Event.COPIED_PLAIN if rules.plain else Event.COPIED
        for event in (Event.PAUSE, copied):
            if (at, event) in rules.source:
                yield FREE, f"bhysend: {event.name}", sender_on(world, rules, event)
        # No more answers, or a limit, an interrupt, a broken disk.
        failure = Event.DOUBT if at is At.COMMITTED else Event.FAILURE
        closed = not world.back and (world.back_cut or world.receiver.at is None)
        yield FREE if closed else FAULT, f"bhysend: {failure.name}", sender_on(world, rules, failure)


def sender_acts(world: World, rules: Rules) -> Iterator[Step]:
    """bhysend does the next act, or cannot."""
    at, (act, *rest) = world.sender
