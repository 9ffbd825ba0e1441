"""The search: every World that can be reached, and what must hold in each.

It goes breadth first, so that a counterexample is among the shortest.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from bhystream.guest import GO, HELD, STARTED
from handshake_model.model import (
    HEARD,
    KILLED,
    LOST,
    NONE,
    OVER,
    RAN,
    RUNS,
    STANDS,
    SWEPT,
    Rules,
    World,
)
from handshake_model.steps import FAULT, FREE, at_source, query, steps, take_over

INVARIANTS = {
    "I1": "two copies run",
    "I2": "the guest runs at the source after the destination's copy has run",
    "I3": "the guest stands paused, and no record says so",
    "I4": "the guest stands paused without a doubt, and only bhysend was killed at work",
    "I5": "the source's guest was ended, and the destination's copy never ran",
    "I6": "asking the destination does not end the doubt",
    "I7": "a program waits for ever",
    "I8": "a copy that was told to run is ended as if it had been left over",
}

Origin = tuple[World, str] | None


@dataclass
class Found:
    """The result of a search.

    nworlds: the number of worlds looked at.  faults: those in the trace; if nothing
    is broken, one more than the most faults on the way to a new world.  quiet: the
    worlds in which all programs have ended.  broken: the invariant that does not
    hold, or None.  trace: the steps that led there.
    """

    nworlds: int
    faults: int
    quiet: list[World]
    broken: str | None
    trace: list[str]


def search(start: World, rules: Rules, max_faults: int | None = None) -> Found:
    """Look at every world that can be reached, until an invariant does not hold.

    Worlds that take fewer faults come first.  max_faults: None for any number.
    """
    came_from: dict[World, Origin] = {}
    quiet_worlds: list[World] = []
    level: dict[World, Origin] = {start: None}
    faults = 0
    while level and (max_faults is None or faults <= max_faults):
        new = {world: origin for world, origin in level.items() if world not in came_from}
        came_from.update(new)
        queue, level = deque(new), {}
        while queue:
            world = queue.popleft()
            quiet = True
            for kind, label, after in steps(world, rules):
                quiet = quiet and kind is not FREE
                if after in came_from:
                    continue
                if kind is FAULT:
                    level.setdefault(after, (world, label))
                else:
                    came_from[after] = world, label
                    queue.append(after)
            if quiet:
                quiet_worlds.append(world)
            name = broken(world, rules, quiet)
            if name:
                return Found(len(came_from), faults, quiet_worlds, name, trace(came_from, world))
        faults += 1
    return Found(len(came_from), faults, quiet_worlds, None, [])


def trace(came_from: dict[World, Origin], world: World) -> list[str]:
    """Return what happened on the way to a world."""
    labels = []
    step = came_from[world]
    while step is not None:
        world, label = step
        labels.append(label)
        step = came_from[world]
    return labels[::-1]


def broken(world: World, rules: Rules, quiet: bool) -> str | None:
    """Name the invariant that does not hold, if any.  quiet: no program can go on."""
    copies = [world.receiver.copy]
    if world.replay is not None:
        copies.append(world.replay.copy)
    here = world.guest == RUNS and not world.late
    if here + copies.count(RUNS) > 1:
        return "I1"
    if here and (RUNS in copies or RAN in copies):
        return "I2"
    if world.guest == STANDS and world.record is None:
        return "I3"
    if world.guest == OVER and world.receiver.copy not in (RUNS, RAN):
        return "I5"
    if SWEPT in copies:
        return "I8"
    return broken_at_the_end(world, rules) if quiet else None


def broken_at_the_end(world: World, rules: Rules) -> str | None:
    """Name the invariant that does not hold in a world in which no program can go on."""
    receivers = (world.receiver, world.replay)
    if world.sender.at or any(r is not None and r.at for r in receivers):
        return "I7"
    in_doubt = world.record in (GO, HELD)
    if world.guest == STANDS and world.keeper != KILLED and not in_doubt:
        return "I4"
    if world.record == GO and not can_be_resolved(world, rules):
        return "I6"
    return None


def can_be_resolved(world: World, rules: Rules) -> bool:
    """Say whether `bhyrecv -q | bhysend -A` leads to one copy, or to an honest doubt."""
    world, word = query(world, rules, "D")
    if world.late:
        return True  # two copies may run, which our programs cannot mend
    if word == "RAN":
        return world.disk_d == STARTED
    if word == "UNKNOWN":
        return False
    world = take_over(world, rules, HEARD[word])
    for act in world.hand:
        world = at_source(world, act)  # without a kill or a refusal in between
    if world.record is not None:
        return False
    if word == "FAILED":
        return world.guest in (RUNS, LOST) and world.receiver.copy == NONE
    return world.guest in (OVER, LOST) and world.receiver.copy == RUNS
