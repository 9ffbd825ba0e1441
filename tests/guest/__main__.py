"""Boot one proving guest by hand: `python -m guest [machine [vcpus]]`, in tests/.

The program prints the paths of the guest's QMP socket and RAM file, then the
guest's serial output, until the program is interrupted or the guest dies.
"""

from __future__ import annotations

import sys
from typing import Any

from . import MACHINE_TYPES, Guest, GuestDied, Spec
from .serial import SerialLog


def main(arguments: list[str]) -> int:
    """Run one guest in the foreground."""
    machine: Any = arguments[0] if arguments else "q35"
    vcpus = arguments[1] if len(arguments) > 1 else "1"
    if machine not in MACHINE_TYPES or not vcpus.isdigit() or len(arguments) > 2:
        print(__doc__, file=sys.stderr)
        return 64
    with Guest(Spec(machine=machine, vcpus=int(vcpus))) as guest:
        print(f"qmp {guest.qmp_path}\nram {guest.ram_path}\npid {guest.pid}", flush=True)
        try:
            _follow(guest)
        except GuestDied as death:
            print(death, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            pass
    return 0


def _follow(guest: Guest) -> None:
    """Print each line once as it comes; end by an exception only."""
    shown = 0

    def show(log: SerialLog) -> bool:
        nonlocal shown
        for line in log.lines[shown:]:
            print(line, flush=True)
        shown = len(log.lines)
        return False

    guest.serial.wait(show, "end", float("inf"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
