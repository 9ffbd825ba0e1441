"""The command line of bhyrecv(8)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from bhystream import commandline, hypervisors, inherited
from bhystream.errors import IncompatibleError, UsageError
from bhystream.guest import Head
from bhystream.recv import forced
from bhystream.stream.format import Form
from bhystream.units import size, size_bytes

if TYPE_CHECKING:
    from bhystream.backend.base import Sink
    from bhystream.stream.verify import Walk

USAGE = """\
usage: bhyrecv [-fnPuv] [--advance-clock] [--again] [--below directory]...
               [--forced] [-m size] [-o key=value]... [-S directory] [-x key]...
               [guest]
       bhyrecv -l [guest]
       bhyrecv -q id
       bhyrecv --discard guest
       bhyrecv --resume guest"""


class Options(NamedTuple):
    """The command line, parsed.

    below: the directories of --below, absolute.  most_bytes: -m, None for no limit.
    """

    guest: str | None = None
    force: bool = False
    dry_run: bool = False
    machine: bool = False
    unstarted: bool = False
    verbose: bool = False
    again: bool = False
    advance_clock: bool = False
    resources: Mapping[str, str] = MappingProxyType({})
    dropped: tuple[str, ...] = ()
    directory: str | None = None
    below: tuple[str, ...] = ()
    most_bytes: int | None = None

    def refuse_answered(self) -> None:
        """Raise IncompatibleError for an option that the answered form does not allow.

        Its source waits for an answer to GO, and -u and -S start nothing.
        """
        for option, given in (("-u", self.unstarted), ("-S", self.directory)):
            if given:
                raise IncompatibleError(f"{option}: the answered form always starts the guest")

    def reasons(self, sink: Sink, head: Head) -> list[str]:
        """Return the reasons against the guest: the sink's, and the limits here."""
        found = list(sink.check(head))
        if self.most_bytes is not None and head.layout.size_bytes > self.most_bytes:
            wanted, most = size(head.layout.size_bytes), size(self.most_bytes)
            found.append(f"memory: the guest has {wanted}, -m allows {most}")
        limit = inherited.deadly_limit() if self.directory is None else ""
        return [*found, limit] if limit else found

    def receiving(self, base: Path, walk: Walk) -> hypervisors.Receiving:
        """Return what hypervisors.open_sink() needs to know."""
        return hypervisors.Receiving(
            self.guest,
            base,
            walk.header.stream_id.hex(),
            self.resources,
            self.dropped,
            self.directory,
            self.force,
            walk.header.form == Form.KEPT,
            self.unstarted,
            self.below,
        )


def parse_options(argv: Sequence[str]) -> Options | commandline.Verb:
    """Parse the command line.  Raises UsageError."""
    found, operands = commandline.parse(
        argv,
        "flm:no:PqS:uvx:",
        ["advance-clock", "again", "below=", "discard", "forced", "resume"],
        USAGE,
    )
    names = [name for name, _ in found]
    verb = commandline.parse_verb(names, operands, USAGE)
    if verb:
        return verb
    if len(operands) > 1:
        raise UsageError("name at most one guest", USAGE)
    _refuse_mixtures(names)
    asked = forced.asked() if "--forced" in names else forced.Asked()
    if asked.query is not None:
        return commandline.Verb("-q", asked.query)
    below = tuple(os.path.abspath(value) for name, value in found if name == "--below")
    resources = _resources([value for name, value in found if name == "-o"])
    names += asked.flags
    given = dict(found)
    return Options(
        guest=forced.require_ours(operands[0] if operands else None, asked.guest),
        force="-f" in names,
        dry_run="-n" in names,
        machine="-P" in names,
        unstarted="-u" in names,
        verbose="-v" in names,
        again="--again" in names,
        advance_clock="--advance-clock" in names,
        resources=forced.lend(resources, asked.disks, has_below=bool(below)),
        dropped=tuple(value for name, value in found if name == "-x"),
        directory=given.get("-S"),
        below=below,
        most_bytes=size_bytes(given["-m"], "-m") if "-m" in given else None,
    )


def _resources(given: Sequence[str]) -> dict[str, str]:
    """Return the keys and values of -o.  Raises UsageError."""
    resources: dict[str, str] = {}
    for word in given:
        key, equals, text = word.partition("=")
        if not equals or key in resources:
            # The value is left out, because it may be a password.
            raise UsageError(f"-o {key}: not a key=value, or given twice", USAGE)
        resources[key] = text
    return resources


def _refuse_mixtures(names: Sequence[str]) -> None:
    """Raise UsageError for an option that has a meaning only for a started guest."""
    for name in ("-o", "-u", "-x", "--advance-clock", "--again", "--below"):
        if "-S" in names and name in names:
            raise UsageError(f"-S makes files and starts nothing: not with {name}", USAGE)
    if "-u" in names and "--advance-clock" in names:
        raise UsageError("--advance-clock: -u leaves the guest paused, for a time unknown", USAGE)
