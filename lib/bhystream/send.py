"""bhysend(8): options, wiring, and its one error handler.

The move itself is in move.py.  What a failure means for the guest depends on
how far the move has come, not on what failed: handshake.SOURCE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bhystream import cold, hold, hypervisors, inherited, options, prune, state, third
from bhystream.backend.base import Source
from bhystream.errors import UsageError, as_error
from bhystream.move import Move
from bhystream.options import AS_IT_IS, SendOptions
from bhystream.precopy import Limits
from bhystream.recover import recover
from bhystream.report import Console
from bhystream.signals import Signals

USAGE = """\
usage: bhysend [-afknPv] [-B rate] [-C config] [-d time] [-p hook] [-r rounds]
               [-T time] [-z level] guest [command [argument ...]]
       bhysend -A [guest]
       bhysend -l [guest]
       bhysend --discard guest
       bhysend --resume [--in-doubt] guest"""

_STDOUT = 1


def parse_options(argv: Sequence[str]) -> SendOptions | hold.Verb:
    """Parse the command line.  Raises UsageError."""
    found, operands = options.parse(
        argv, "AaB:C:d:fklnPp:r:T:vz:", ["discard", "in-doubt", "resume"], USAGE
    )
    given = dict(found)
    verb = hold.parse_verb([name for name, _ in found], operands, USAGE)
    if verb:
        return verb
    if not operands:
        raise UsageError("name a guest", USAGE)
    guest, *command = operands
    _refuse_mixtures(given, bool(command))
    default = Limits()
    limits = Limits(
        downtime_ns=options.time_ns(given["-d"], "-d") if "-d" in given else default.downtime_ns,
        rounds=options.number(given["-r"], "-r", 0, 1000) if "-r" in given else default.rounds,
        time_ns=options.time_ns(given["-T"], "-T") if "-T" in given else default.time_ns,
        finish="-f" in given,
        rate_bytes=options.rate_bytes(given["-B"], "-B") if "-B" in given else None,
    )
    return SendOptions(
        guest=guest,
        limits=limits,
        answered="-a" in given,
        command=tuple(command),
        keep="-k" in given,
        dry_run="-n" in given,
        machine="-P" in given,
        verbose="-v" in given,
        hook=given.get("-p"),
        level=options.number(given["-z"], "-z", 1, 19) if "-z" in given else None,
        config=given.get("-C"),
    )


def _refuse_mixtures(given: Mapping[str, str], is_command: bool) -> None:
    """Refuse options that exclude each other."""
    answered = ["-a"] if "-a" in given else []
    answered += ["a command"] if is_command else []
    if len(answered) > 1:
        raise UsageError("-a and a command exclude each other", USAGE)
    if "-k" in given and answered:
        raise UsageError(f"-k and {answered[0]} exclude each other", USAGE)
    if "-k" in given and "-n" in given:
        raise UsageError("-k and -n exclude each other", USAGE)
    if "--in-doubt" in given:
        raise UsageError("--in-doubt goes with --resume only", USAGE)


def send(opts: SendOptions, console: Console) -> int:
    """Send one guest, or say what sending it would mean."""
    if not opts.command:
        options.refuse_closed(_STDOUT, "standard output", os.O_RDONLY)
        if os.isatty(_STDOUT) and (opts.answered or not opts.dry_run):
            raise UsageError("standard output is a terminal: a stream goes into a pipe or a file")
    signals = Signals()
    base = state.directory()
    hold.refuse_held(base, opts.guest)
    what = hypervisors.Sending(opts.guest, base, config=opts.config, force=opts.limits.finish)
    if what.is_cold:
        return send_cold(what, opts, base, console, signals)
    source = hypervisors.open_source(what)
    try:
        with state.Lock(base, source.lock_name, f"guest {source.name}") as lock:
            hold.refuse_held(base, opts.guest, source.lock_name)
            if opts.dry_run:
                from bhystream import dryrun

                status = dryrun.run(source, opts, base, console, signals)
                if not opts.machine:  # its report has them all
                    state.Told(base, source.lock_name).new(source.warnings(), everything=True)
                return status
            return move(Move(opts, base, console, signals), source, lock, signals)
    finally:
        source.close()
        prune.prune_locks(base)


def send_cold(
    what: hypervisors.Sending, opts: SendOptions, base: Path, console: Console, signals: Signals
) -> int:
    """Send snapshot files, or say what sending them would mean."""
    snapshot = hypervisors.open_snapshot(what)
    try:
        if opts.dry_run:
            from bhystream import dryrun

            return dryrun.run(snapshot, opts, base, console, signals)
        return cold.send(snapshot, opts, console, signals)
    finally:
        snapshot.close()


def move(work: Move, source: Source, lock: state.Lock, signals: Signals) -> int:
    """Run a move; on a failure bring the guest back, and say where it is."""
    try:
        status = work.run(source, lock)
    except Exception as raised:
        # A signal that comes from here on finds the guest being brought back.
        signals.forget()
        error = recover(work, as_error(raised))
        work.close(error.status)
        raise error from raised
    work.close(status)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run bhysend(8); return its exit status.

    argv: the command line, in a process that is set already; None: this
    process is the program.
    """
    console = Console("bhysend")
    try:
        if argv is None:
            with inherited.taken() as found:
                return _run(sys.argv[1:], console, found.umask)
        return _run(argv, console, AS_IT_IS)
    except Exception as raised:
        return console.fail(as_error(raised))
    finally:
        console.close()


def _run(argv: Sequence[str], console: Console, umask: int) -> int:
    parsed = parse_options(argv)
    if isinstance(parsed, hold.Verb):
        if parsed.name == "-A":
            return third.run(parsed.guest, console)
        return hold.run(parsed, "source", console)
    return send(replace(parsed, umask=umask), console)


if __name__ == "__main__":
    sys.exit(main())
