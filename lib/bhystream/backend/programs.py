"""Run a program of the base system and take what it prints."""

from __future__ import annotations

import subprocess

from bhystream.errors import GuestError, ending

LIMIT_S = 30.0


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its status is the caller's to judge.

    argv: the program by its absolute path; no shell.  It sees nothing of our
    environment: the C locale, UTC, and no LIBXO_OPTIONS, which would turn
    text into something else.  Raises GuestError where it cannot be run.
    """
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
            encoding="utf-8",
            errors="surrogateescape",
            env={"LC_ALL": "C", "TZ": "UTC0", "PATH": "/sbin:/bin:/usr/sbin:/usr/bin"},
        )
    except OSError as error:
        raise GuestError(f"cannot run {argv[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise GuestError(f"cannot run {argv[0]}: it did not end in {LIMIT_S:g} s") from None


def ask(*argv: str) -> str:
    """Return what a program printed, "" where it failed.  Raises as run() does."""
    done = run(*argv)
    return done.stdout if done.returncode == 0 else ""


def do(doing: str, *argv: str) -> None:
    """Run a program that must succeed.  doing: in the infinitive: "destroy guest web1".

    Raises GuestError with the last line it printed to standard error.
    """
    done = run(*argv)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        why = words[-1] if words else f"{argv[0]} {ending(done.returncode)}"
        raise GuestError(f"cannot {doing}: {why}")
