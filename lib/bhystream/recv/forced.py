"""bhyrecv --forced: the command line of a key that may only send guests here.

sshd(8) runs the forced command of such a key whatever the peer types, and leaves
what the peer has typed in SSH_ORIGINAL_COMMAND.  The administrator's own words
stand in authorized_keys and always hold.  The peer may add what this module
allows, and everything else is refused: no shell and no program ever sees the
peer's words.

    bhyrecv [-nPv] [-o diskN=PATH]... [guest]     disks only with --below, and only
                                                  those that the administrator leaves out
    bhyrecv -q id
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import NamedTuple

from bhystream import commandline
from bhystream.errors import AccessError, UsageError
from bhystream.guest import GUEST_NAME

COMMAND = "SSH_ORIGINAL_COMMAND"
_MAX_CHARS = 4096
_DISK = re.compile(r"disk(0|[1-9][0-9]{0,2})")
_PATH = re.compile(r"/[A-Za-z0-9._@:+/-]{1,1000}")
_ID = re.compile(r"[0-9a-f]{32}")


class Asked(NamedTuple):
    """What the peer asks for, by words that this module allows.

    query: the stream id of -q, None for a stream to be received.  flags: "-n", "-P"
    and "-v", those that are given.  disks: the paths of -o, by key.
    """

    query: str | None = None
    guest: str | None = None
    flags: frozenset[str] = frozenset()
    disks: Mapping[str, str] = {}


def asked(environment: Mapping[str, str] = os.environ) -> Asked:
    """Return what the peer asks for.  Raises AccessError if that is not allowed."""
    words = _words(environment.get(COMMAND, ""))
    try:
        found, operands = commandline.parse(words, "no:Pqv", [], "")
    except UsageError as error:
        raise _refused(str(error)) from None
    names = [name for name, _ in found]
    if "-q" in names:
        if len(names) > 1 or len(operands) != 1 or not _ID.fullmatch(operands[0]):
            raise _refused("-q takes one stream id and nothing else")
        return Asked(query=operands[0])
    if len(operands) > 1 or not all(GUEST_NAME.fullmatch(name) for name in operands):
        raise _refused("that is no name of one guest")
    disks: dict[str, str] = {}
    for word in (value for name, value in found if name == "-o"):
        key, _, path = word.partition("=")
        if not _DISK.fullmatch(key) or not _PATH.fullmatch(path) or key in disks:
            raise _refused("-o may give the path of a disk, once for each disk, and nothing else")
        disks[key] = path
    guest = operands[0] if operands else None
    return Asked(None, guest, frozenset(names) - {"-o"}, disks)


def _words(command: str) -> list[str]:
    """Split the peer's command as sh(1) does, and expand nothing; return the words after bhyrecv.

    Raises AccessError if the command is another program's.
    """
    if len(command) > _MAX_CHARS or not command.isprintable():
        raise _refused("the command is too long, or no plain text")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise _refused(str(error)) from None
    if words and words[0].rpartition("/")[2] != "bhyrecv":
        raise _refused("it runs bhyrecv and no other program")
    return words[1:]


def _refused(why: str) -> AccessError:
    return AccessError(f"the forced command of this key does not allow that: {why}")


def require_ours(given: str | None, wanted: str | None) -> str | None:
    """Return the guest's name.  given: the administrator's.  wanted: the peer's.

    Raises AccessError if the peer wants another guest than the administrator's.
    """
    if given is not None and wanted not in (None, given):
        raise _refused(f"it receives the guest {given} and no other")
    return given or wanted


def lend(given: Mapping[str, str], wanted: Mapping[str, str], *, has_below: bool) -> dict[str, str]:
    """Return the resources: the administrator's, and the disks that the peer adds.

    has_below: whether --below is given; the sink then judges each path.  Raises
    AccessError if the peer may name no disk, or not this one.
    """
    for key in wanted:
        if not has_below or key in given:
            raise _refused(f"-o {key}= is not the peer's to give")
    return {**given, **wanted}
