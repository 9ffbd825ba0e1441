"""This machine's file system, to be changed as if it were another machine's.

The changes stay in memory, in a mount namespace of their own, and are gone when the last process
in that namespace ends.  The namespace has no network.  Needs root, or sudo(8) without a password.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# $1: a directory to mount on.  $2: a directory that the copy shows, read-only, as CHECKOUT.
CHECKOUT = "/mnt/checkout"
_MOUNT = f"""
set -e
mount -t tmpfs -o mode=755 none "$1"
mkdir "$1/changed" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/changed,workdir=$1/work" none "$1/root"
for each in proc sys dev; do mount --rbind "/$each" "$1/root/$each"; done
mount -t tmpfs -o mode=1777 none "$1/root/dev/shm"
mkdir "$1/root{CHECKOUT}"
mount --bind "$2" "$1/root{CHECKOUT}"
mount -o remount,bind,ro "$1/root{CHECKOUT}"
echo $$
read -r _ || true
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NOBODY = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups")


class PrivateMachine:
    """The machine as the commands of run() see it."""

    def __init__(self, as_root: tuple[str, ...], holder: int, directory: Path) -> None:
        self._enter = (*as_root, "nsenter", "--target", str(holder), "--mount", "--net", "--root")
        self._directory = directory

    def run(
        self, *words: str, as_nobody: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root, or as a user who may change nothing; return what it printed.

        The command has no environment but a PATH, a locale and the variables given.
        """
        environment = {"PATH": _PATH, "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", **variables}
        settings = [f"{name}={value}" for name, value in environment.items()]
        user = _NOBODY if as_nobody else ()
        command = ("chroot", f"{self._directory}/root", "env", "-i", *settings, *user, *words)
        return self._run(*command)

    def changed(self, words: str) -> list[str]:
        """Return the changed files, and the new ones, that find(1) finds by these words."""
        done = self._run("find", f"{self._directory}/changed", *words.split())
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._enter, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )


@contextmanager
def private_machine(directory: Path, checkout: Path) -> Iterator[PrivateMachine]:
    """Make one.  directory: an empty one, to mount on.  Skips the test where root is not to be had;
    in CI the test fails there.
    """
    as_root = () if os.geteuid() == 0 else ("sudo", "-n")
    # unshare(1) makes the mount at / private, but in a chroot there is none at /.
    namespaces = ["--mount", "--net"]
    if subprocess.run(["mountpoint", "-q", "/"]).returncode:
        namespaces += ["--propagation", "unchanged"]
    holder = subprocess.Popen(
        [*as_root, "unshare", *namespaces, "sh", "-c", _MOUNT, "sh", directory, checkout],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin and holder.stdout and holder.stderr
    with holder:
        told = holder.stdout.readline()
        if not told:
            why = holder.stderr.read().strip()
            if os.environ.get("CI") == "true":
                raise AssertionError(f"no private machine can be had: {why}")
            pytest.skip(f"needs root, and the right to mount: {why}")
        try:
            yield PrivateMachine(as_root, int(told), directory)
        finally:
            holder.stdin.close()
