"""Whether an ancestor of a hypervisor may start it again, judged by the ancestor's command line.

A guest that has moved is ended at its source.  A program that then starts the
guest again makes a second copy, so only programs on a list count as harmless.
"""

from __future__ import annotations

from collections.abc import Collection

from bhystream.errors import Reason


def words(*lines: str) -> frozenset[str]:
    """Return all the words of some lines."""
    return frozenset(" ".join(lines).split())


# The shells and programs above a hypervisor that was started by hand.
_SHELLS = words("sh ash csh tcsh bash zsh ksh mksh fish dash")
_HARMLESS = words(
    "SCREEN doas dropbear init login screen script sshd sshd-session su sudo tmux",
) | {""}
_MAX_SHOWN_CHARS = 60


def may_start_again(command: str, harmless: Collection[str] = ()) -> bool:
    """Say whether a process is a script, or a program on no list of harmless ones.

    command: the process's command line; "" for init.  harmless: further programs
    and scripts, known to be harmless to one hypervisor.
    """
    name = program_of(command)
    if name in _SHELLS:
        scripts = [word for word in command.split()[1:] if not word.startswith("-")]
        return bool(scripts) and scripts[0].rpartition("/")[2] not in (*_HARMLESS, *harmless)
    return name not in _HARMLESS and name not in harmless


def is_shell(command: str) -> bool:
    """Say whether a command line runs a shell."""
    return program_of(command) in _SHELLS


def reason(hypervisor: str, command: str) -> Reason:
    """Return the reason against a guest whose hypervisor a process of this command started.

    hypervisor: "QEMU" or "bhyve".
    """
    return Reason(
        f"supervisor: the guest's {hypervisor} was started by"
        f" {ascii(command)[:_MAX_SHOWN_CHARS]}, which may start {hypervisor} again when"
        f" {hypervisor} is killed: a second copy of the guest",
        "end that program first, or use -f if it never does",
    )


def program_of(command: str) -> str:
    """Return the name of a command line's program.

    A login shell's "-" in front, and the ":" after a process title's name, are dropped.
    """
    words = command.split()
    return words[0].rpartition("/")[2].lstrip("-").rstrip(":") if words else ""
