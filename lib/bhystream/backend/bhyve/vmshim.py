"""The `bhyve` that vm-bhyve finds first in PATH while bhyrecv waits for it: see vmstart.py.

    python3 -I -S vmshim.py DIRECTORY ARGUMENT...

This program tells bhyrecv the arguments that vm-bhyve has given it, waits for the words
that bhyrecv wants run in its place, and becomes that program.  If no bhyrecv waits, or
bhyrecv gives up, it ends with status 1, which vm-bhyve takes for a guest that was powered
off; so it never starts the guest by itself.  It imports nothing of ours.
"""

import json
import os
import signal
import socket
import stat
import sys


def main() -> int:
    """Become the program that bhyrecv names; return 1 if there is none."""
    directory, *arguments = sys.argv[1:]
    os.chdir(directory)  # the path of a socket may have 103 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as bhyrecv:
            bhyrecv.connect("socket")
            bhyrecv.sendall(json.dumps(arguments).encode() + b"\n")
            with bhyrecv.makefile("rb") as answers:
                answer = answers.readline()
    except OSError:
        return 1
    if not answer.endswith(b"\n"):
        return 1
    wanted = json.loads(answer)
    os.chdir("/")
    _say_into(wanted["log"])
    os.umask(0o077)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores both, and exec(2) would keep that
    os.execv(wanted["argv"][0], wanted["argv"])


def _say_into(path: str) -> None:
    """Let standard output and error be a log, unless vm-bhyve keeps what is said (debug=yes)."""
    null = os.stat(os.devnull)
    for fd in (1, 2):
        found = os.fstat(fd)
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == null.st_rdev:
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            os.dup2(log, fd)
            os.close(log)


if __name__ == "__main__":
    sys.exit(main())
