"""bhysend -A as a process, with one stand-in guest to which any record leads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bhystream.guest import PAUSED
from bhystream.handover.answers import Answer, pack
from bhystream.handover.state import Record

ROOT = Path(__file__).resolve().parents[2]
ID, OTHER = "0123456789abcdef" * 2, "f" * 32
NAMES = ("web1", "qemu:/web1")
RECORD = Record(
    ID, *NAMES, "lock-1", PAUSED, {"hypervisor": "none"}, 1, host="hv2/a1", directory="/d"
)
LIMIT_S = 60


def line(word: str, *args: str, id_: str = ID) -> bytes:
    return pack(Answer(id_, word, args))


HELLO = line("HELLO", "hv2/a1", "/d")
READY, RUNNING, RAN, UNKNOWN = (
    line("READY", "00" * 16),
    line("RUNNING"),
    line("RAN"),
    line("UNKNOWN"),
)
FAILED, REFUSED = line("FAILED", "no disk"), line("REFUSED", "too old")

# bhysend with a guest to which any record leads; the guest prints each call on
# standard output.
DRIVER = """
import sys
import time
from bhystream import hypervisors
from bhystream.send import main as send
from bhystream.send import recovery, third_stage
from bhystream.signals import ignore_all
from support.paused import Paused

real = time.sleep

def sleep(seconds):
    print("waits", flush=True)
    real(0.01)

class Guest(Paused):
    alive = sys.argv[1] != "gone"
    def do(self, act, there=""):
        print(act, flush=True)

hypervisors.open_paused = lambda revive: Guest()
time.sleep = sleep
if sys.argv[1] == "impatient":
    recovery._LOCK_SECONDS = third_stage._DRAIN_SECONDS = 0.0
if sys.argv[1] == "patient":
    third_stage._DRAIN_SECONDS = 9999.0
status = send.main(["-A", *sys.argv[2:]])
ignore_all()  # as start.run() does
sys.exit(status)
"""


def feed(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin
    process.stdin.write(data)
    process.stdin.flush()


def start(*names: str, guest: str = "alive") -> subprocess.Popen[bytes]:
    """Start a third stage.

    guest: "alive" or "gone"; or "impatient" or "patient": alive, and -A drains its input not at
    all, or for ever.
    """
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, guest, *names],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'lib'}:{ROOT / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def hang_up(process: subprocess.Popen[bytes]) -> None:
    """Close the third stage's input."""
    assert process.stdin
    process.stdin.close()
    process.stdin = None


def ended(process: subprocess.Popen[bytes], data: bytes = b"") -> tuple[int, list[str], str]:
    """Feed the rest of the input; return the status, the calls, and standard error."""
    out, err = process.communicate(data, timeout=LIMIT_S)
    assert b"Traceback" not in err, err
    return process.returncode, out.decode().split(), err.decode()
