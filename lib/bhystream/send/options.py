"""The command line of bhysend(8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bhystream import commandline
from bhystream.errors import UsageError
from bhystream.send.precopy import MAX_THROTTLE, Limits
from bhystream.stream.format import Feature, Form
from bhystream.units import rate_bytes, time_ns

USAGE = """\
usage: bhysend [-afknPv] [-B rate] [-C config] [-d time] [-p hook] [-r rounds]
               [-T time] [--throttle percent] [--verify] [-z level]
               guest [command [argument ...]]
       bhysend -A [guest]
       bhysend -l [guest]
       bhysend --discard guest
       bhysend --resume [--in-doubt] guest"""

# The umask argument by which subprocess leaves a child the umask of bhysend.
AS_IT_IS = -1


class SendOptions(NamedTuple):
    """The command line of bhysend, parsed.

    guest: the operand.  command: the words of the command form, else empty.  hook: -p.
    level: -z, 1 to 19.  config: -C.  umask: the umask that bhysend inherited, for the
    command and the hook; or AS_IT_IS.  verify: --verify.
    """

    guest: str
    limits: Limits
    answered: bool = False
    command: tuple[str, ...] = ()
    keep: bool = False
    dry_run: bool = False
    machine: bool = False
    verbose: bool = False
    hook: str | None = None
    level: int | None = None
    config: str | None = None
    umask: int = AS_IT_IS
    verify: bool = False

    @property
    def form(self) -> Form:
        """Return the form of the stream."""
        if self.keep:
            return Form.KEPT
        return Form.ANSWERED if self.answered or self.command else Form.PLAIN

    @property
    def features(self) -> Feature:
        """Return the features of a stream with memory."""
        return Feature.ZSTD if self.level is not None else Feature(0)


def parse_options(argv: Sequence[str]) -> SendOptions | commandline.Verb:
    """Parse the command line of a move or of a verb.  Raises UsageError if it is wrong."""
    found, operands = commandline.parse(
        argv,
        "AaB:C:d:fklnPp:r:T:vz:",
        ["discard", "in-doubt", "resume", "throttle=", "verify"],
        USAGE,
    )
    given = dict(found)
    verb = commandline.parse_verb([name for name, _ in found], operands, USAGE)
    if verb:
        return verb
    if not operands:
        raise UsageError("name a guest", USAGE)
    guest, *command = operands
    _refuse_mixtures(given, bool(command))
    default = Limits()
    limits = Limits(
        downtime_ns=time_ns(given["-d"], "-d") if "-d" in given else default.downtime_ns,
        rounds=commandline.number(given["-r"], "-r", 0, 1000) if "-r" in given else default.rounds,
        time_ns=time_ns(given["-T"], "-T") if "-T" in given else default.time_ns,
        finish="-f" in given,
        rate_bytes=rate_bytes(given["-B"], "-B") if "-B" in given else None,
        throttle=commandline.number(given["--throttle"], "--throttle", 1, MAX_THROTTLE)
        if "--throttle" in given
        else default.throttle,
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
        level=commandline.number(given["-z"], "-z", 1, 19) if "-z" in given else None,
        config=given.get("-C"),
        verify="--verify" in given,
    )


def _refuse_mixtures(given: Mapping[str, str], is_command: bool) -> None:
    """Refuse options that exclude each other.  Raises UsageError."""
    answered = ["-a"] if "-a" in given else []
    answered += ["a command"] if is_command else []
    if len(answered) > 1:
        raise UsageError("-a and a command exclude each other", USAGE)
    if "-k" in given and answered:
        raise UsageError(f"-k and {answered[0]} exclude each other", USAGE)
    if "-k" in given and "-n" in given:
        raise UsageError("-k and -n exclude each other", USAGE)
    if {"-a", "-n", "-P"} <= given.keys():
        raise UsageError("-n -P reports on standard output, and -a sends a stream there", USAGE)
    if "--in-doubt" in given:
        raise UsageError("--in-doubt goes with --resume only", USAGE)
