"""Run programs of the base system and return what they print."""

from __future__ import annotations

import subprocess

from bhystream.errors import GuestError, ending

LIMIT_S = 30.0


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, without a shell; the caller judges its exit status.

    argv: the program by its absolute path.  The program gets none of our
    environment, but a process group of its own, so that no Ctrl-C cuts off what we
    clean up; the C locale, UTC, and no LIBXO_OPTIONS, which could make
    it print JSON or XML instead of text.  Raises GuestError if the program
    cannot be run, or does not end in LIMIT_S seconds.
    """
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
            process_group=0,
            encoding="utf-8",
            errors="surrogateescape",
            env={"LC_ALL": "C", "TZ": "UTC0", "PATH": "/sbin:/bin:/usr/sbin:/usr/bin"},
        )
    except OSError as error:
        raise GuestError(f"cannot run {argv[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise GuestError(f"cannot run {argv[0]}: it did not end in {LIMIT_S:g} s") from None


def ask(*argv: str) -> str:
    """Return what a program printed, "" if it failed.  Raises GuestError as run() does."""
    done = run(*argv)
    return done.stdout if done.returncode == 0 else ""


def do(doing: str, *argv: str) -> None:
    """Run a program that must succeed.

    doing: the purpose, in the infinitive without "to": "destroy guest web1".
    Raises GuestError, with the program's last line on standard error, if it fails.
    """
    done = run(*argv)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        why = words[-1] if words else f"{argv[0]} {ending(done.returncode)}"
        raise GuestError(f"cannot {doing}: {why}")
