"""A paused guest of QEMU: bhysend and bhyrecv against QEMU's own migration.

The guest is the proof guest of tests/guest, whose area holds noise.  It hardly changes pages,
and both ways send the same ones: every page that is not zero.  The same clock times both ways:
from just before the guest is stopped

    to /dev/null     until the last byte is written to `cat >/dev/null`
    to a QEMU        until the guest runs in a fresh QEMU of this host

so the stop of the guest, its device state and the start at the destination are in it.  For
bhysend that is the pause in its closing line; for QEMU it is what QMP's stop, migrate, MIGRATION
(completed) and cont take, without the 128 MiB/s that QEMU allows itself by default.  The start of
the programs is not in it: QEMU's destination waits before the clock runs, and bhysend pauses the
guest when bhyrecv has accepted the head.  (bhyrecv then still has to start its QEMU, in the
pause.)

`cat` gives no answers, so bhysend copies the pages for it.  The command form, in the second row,
passes them with vmsplice(2); the plain form, in the third, copies them again.

The limit of these rows is the bare loop of streams.py over as many bytes, with the same `cat`, or
into an empty file in memory: it starts no hypervisor, and verifies nothing.
Source: docs/devel/migration.rst and qapi/migration.json in QEMU.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bhystream import commandline
from cli.pipeline import BHYSEND, Ended, report, run
from cli.qemu import QemuTraveller
from cli.travel import Host
from guest import Guest, Spec, ram
from guest.qmp import Session

from . import streams
from .closing import closing, received_s
from .rows import Row, pairs, ratio_row

_UNLIMITED = 10**12  # bytes a second
_TARGET = 3.0
_CHUNK = 256 << 10  # the best piece of the bare loop, as streams.py measures it


@dataclass(frozen=True)
class Native:
    """One migration by QEMU itself.  clock_s: see above.  sent_bytes: of the guest's memory."""

    clock_s: float
    sent_bytes: int


@contextmanager
def travelling(spec: Spec) -> Iterator[tuple[Host, QemuTraveller]]:
    """Boot a guest on a host that has a state directory of its own; end it wherever it is."""
    with tempfile.TemporaryDirectory(prefix="bhyc-", dir="/dev/shm") as directory:
        host, guest = Host(Path(directory)), QemuTraveller(spec)
        try:
            yield host, guest
        finally:
            guest.close()


def moved(host: Host, guest: QemuTraveller, *options: str) -> Ended:
    """Move the guest in the command form; return what bhysend has said."""
    to = guest.next()
    [ended] = run([*guest.send(*options), *guest.receive(to)], env=host.env)
    if ended.status:
        raise SystemExit(report(ended))
    guest.arrive(to)
    return ended


def piped(host: Host, guest: QemuTraveller, *options: str) -> list[Ended]:
    """Move the guest in the plain form; return what both programs have said."""
    to = guest.next()
    ended = run(guest.send(*options), guest.receive(to), env=host.env)
    if [one.status for one in ended] != [80, 0]:
        raise SystemExit(report(*ended))
    guest.settle(host, to)
    return ended


def state_alone(guest: QemuTraveller) -> float:
    """Return how many seconds QEMU takes for the pause alone: stop, device state, start.

    As far as QEMU knows the memory is shared, so QEMU leaves it out.  The destination has a copy
    that was made while the guest ran: enough to load the state, and of no use to the guest, which
    goes on here.
    """
    with Guest(guest.spec, incoming=True) as there:
        ram.copy_sparse(guest.memory_file(), there.ram_path)
        return _native(guest, there, "x-ignore-shared").clock_s


def into_qemu(guest: QemuTraveller) -> Native:
    """Migrate the paused guest into a fresh QEMU, where it runs; then let it go on here."""
    with Guest(guest.spec, incoming=True) as there:
        found = _native(guest, there)
        there.serial.await_heartbeats(2)
    return found


def _native(guest: QemuTraveller, there: Guest, *capabilities: str) -> Native:
    uri = f"unix:{there.directory / 'migration'}"
    with Session(guest.at.qmp) as source, Session(there.qmp_path) as target:
        for session in (source, target):
            _prepare(session, *capabilities)
        target.ask("migrate-incoming", {"uri": uri})
        start = time.perf_counter()
        source.ask("stop")
        source.ask("migrate", {"uri": uri})
        _await_completed(target)
        target.ask("cont")
        clock_s = time.perf_counter() - start
        return Native(clock_s, _go_on(source, *capabilities))


def to_cat(guest: QemuTraveller) -> Native:
    """Let QEMU write the paused guest to `cat >/dev/null`; then let it go on."""
    with Session(guest.at.qmp) as source:
        _prepare(source)
        start = time.perf_counter()
        source.ask("stop")
        source.ask("migrate", {"uri": "exec:cat >/dev/null"})
        _await_completed(source)
        clock_s = time.perf_counter() - start
        return Native(clock_s, _go_on(source))


def _prepare(session: Session, *capabilities: str) -> None:
    _set(session, True, "events", *capabilities)
    session.ask("migrate-set-parameters", {"max-bandwidth": _UNLIMITED})


def _set(session: Session, state: bool, *capabilities: str) -> None:
    found = [{"capability": name, "state": state} for name in capabilities]
    session.ask("migrate-set-capabilities", {"capabilities": found})


def _await_completed(session: Session) -> None:
    while (status := session.await_event("MIGRATION")["status"]) != "completed":
        if status == "failed":
            raise SystemExit("QEMU's own migration has failed")


def _go_on(source: Session, *capabilities: str) -> int:
    """Let the guest go on at the source; return how much of its memory QEMU has sent."""
    while (info := source.ask("query-migrate"))["status"] != "completed":
        time.sleep(0.001)
    while source.ask("query-status")["status"] == "finish-migrate":
        time.sleep(0.001)
    _set(source, False, "events", *capabilities)
    source.ask("cont")
    sent: int = info["ram"]["normal-bytes"]
    return sent


def discarded(host: Host, guest: QemuTraveller) -> float:
    """Write the paused guest to `cat >/dev/null`; let it go on here; return the pause."""
    ended = run(guest.send("-r", "0"), ["sh", "-c", "exec cat >/dev/null"], env=host.env)
    if [one.status for one in ended] != [80, 0]:
        raise SystemExit(report(*ended))
    host.act(BHYSEND, "--resume", guest.name)
    return closing(ended[0].stderr).paused_s


def bare_to_cat(fd: int, size: int) -> float:
    """Write a file in memory to `cat >/dev/null`; return the seconds."""
    start = time.perf_counter()
    with subprocess.Popen("exec cat >/dev/null", shell=True, stdin=subprocess.PIPE) as cat:
        assert cat.stdin
        commandline.widen_pipe(cat.stdin.fileno())
        streams.bare_sender(_CHUNK)(fd, size, cat.stdin.fileno())
    return time.perf_counter() - start


def bare_to_file(fd: int, size: int) -> float:
    """Move a file in memory to an empty one; return the seconds."""
    empty = streams.memory_file(size)
    try:
        receive = streams.bare_receiver(_CHUNK, is_mapped=False)
        return streams.turn(fd, empty, size, streams.bare_sender(_CHUNK), receive).clock_s
    finally:
        os.close(empty)


def measure(mib: int, turns: int, *, warm_up: bool = True) -> list[Row]:
    """Return the rows of a guest whose area is mib large."""
    spec = Spec(
        memory_mib=mib + mib // 16 + 128,
        proof={"mib": mib, "work": 16, "holes": 0, "rate": 1, "sweep": 4 * mib},
    )
    sent: list[int] = []

    def native(migrate: Callable[[QemuTraveller], Native]) -> float:
        found = migrate(guest)
        sent.append(found.sent_bytes)
        return found.clock_s

    bare = streams.memory_file(mib << 20, filled=True)
    with travelling(spec) as (host, guest):
        null = pairs(
            {
                "bare": lambda: bare_to_cat(bare, mib << 20),
                "QEMU": lambda: native(to_cat),
                "bhysend": lambda: discarded(host, guest),
            },
            turns,
            warm_up=warm_up,
        )
        cold = pairs(
            {
                "bare": lambda: bare_to_file(bare, mib << 20),
                "QEMU": lambda: native(into_qemu),
                "answered": lambda: closing(moved(host, guest, "-r", "0").stderr).paused_s,
                "plain": lambda: received_s(piped(host, guest, "-r", "0")[1].stderr),
            },
            turns,
            warm_up=warm_up,
        )
        guest.prove(1)
    os.close(bare)
    size = statistics.median(sent)

    def row(name: str, found: dict[str, list[float]], way: str) -> Row:
        if way == "bare":  # it moves the area alone
            found = {**found, way: [one * size / (mib << 20) for one in found[way]]}
        ours, theirs = (size / statistics.median(found[key]) / 1e9 for key in (way, "QEMU"))
        note = f"{ours:.2f} GB/s; QEMU {theirs:.2f} GB/s; {size / 2**20:.0f} MiB"
        target = None if way == "bare" else _TARGET
        return ratio_row(name, found["QEMU"], found[way], target, note=note)

    return [
        row("paused guest to cat >/dev/null: against QEMU", null, "bhysend"),
        row("paused guest to cat >/dev/null: its limit", null, "bare"),
        row("paused guest into a fresh QEMU: against QEMU", cold, "answered"),
        row("paused guest into a fresh QEMU, plain form: against QEMU", cold, "plain"),
        row("paused guest into a fresh QEMU: its limit", cold, "bare"),
    ]
