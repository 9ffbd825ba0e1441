"""What may start a hypervisor again that was ended, judged by the command of a process above it.

A guest that has moved is ended at its source.  What starts it again after that
makes a second copy, so a program is harmless only where it is known to be.
"""

from __future__ import annotations

from collections.abc import Collection


def words(*lines: str) -> frozenset[str]:
    """Return the words of these lines."""
    return frozenset(" ".join(lines).split())


# Of a hypervisor that was started by hand.
_SHELLS = words("sh ash csh tcsh bash zsh ksh mksh fish dash")
_HARMLESS = words(
    "SCREEN doas dropbear init login screen script sshd sshd-session su sudo tmux",
) | {""}
_MAX_SHOWN_CHARS = 60


def may_start_again(command: str, harmless: Collection[str] = ()) -> bool:
    """Say whether a process is more than a terminal's: a script, or a program not known.

    command: its command line; "" is init's.  harmless: programs, and scripts,
    that are known for one hypervisor.
    """
    name = program_of(command)
    if name in _SHELLS:
        scripts = [word for word in command.split()[1:] if not word.startswith("-")]
        return bool(scripts) and scripts[0].rpartition("/")[2] not in (*_HARMLESS, *harmless)
    return name not in _HARMLESS and name not in harmless


def is_shell(command: str) -> bool:
    """Say whether a command line is a shell's."""
    return program_of(command) in _SHELLS


def reason(hypervisor: str, command: str) -> str:
    """Return the reason against a guest whose hypervisor such a process has started."""
    return (
        f"supervisor: the guest's {hypervisor} was started by"
        f" {ascii(command)[:_MAX_SHOWN_CHARS]}, which may start it again when it is killed:"
        " a second copy; end that first, or -f if it does not"
    )


def program_of(command: str) -> str:
    """Return the name of a command line's program: also of a login shell, and of a title."""
    words = command.split()
    return words[0].rpartition("/")[2].lstrip("-").rstrip(":") if words else ""
