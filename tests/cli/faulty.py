"""Run a program with a fault that only the comparison of all memory can find.

    python faulty.py missed -- bhysend --verify guest cat
    python faulty.py flipped 300 16383 -- bhyrecv guest

missed     the last scan passes over the first page that it finds changed
flipped    one byte of each of these pages changes here after the last round

Standard error says which pages are wrong: "faulty: page 300".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from cli.limited import become


def missed() -> None:
    """Clear the bit of one changed page, whichever thread finds the first one."""
    from bhystream.memory import page
    from bhystream.send import scan, strides

    real: Callable[..., int] = page.find_changed
    done: list[int] = []

    def find_changed(*args: Any) -> int:
        found = real(*args)
        base, first, bits = args[2], args[3], args[7]
        for word in range(len(bits)):
            if bits[word] and not done:
                lowest = bits[word] & -bits[word]
                bits[word] ^= lowest
                done.append(base + first + 64 * word + lowest.bit_length() - 1)
                say(done[0])
        return found

    setattr(scan, "find_changed", find_changed)  # noqa: B010
    # With one thread there would be no scan before the walk.
    setattr(strides, "_cpus", lambda: 2)  # noqa: B010


def flipped(pages: list[int]) -> None:
    """Change pages of the guest's memory here, when the last round is over."""
    from bhystream.memory.target import FileTarget, MappedTarget
    from bhystream.recv.building import Building

    real = Building.end_round

    def flip(target: FileTarget | MappedTarget, at: int) -> None:
        if isinstance(target, MappedTarget):
            target._memory[at] ^= 1
        else:
            at += target.offset_bytes
            os.pwrite(target.fd, bytes([os.pread(target.fd, 1, at)[0] ^ 1]), at)

    def end_round(self: Any, event: Any) -> None:
        real(self, event)
        if event.is_last:
            layout = self._head.layout
            for page in pages:
                segment = layout.segment_of(page)
                flip(self._targets[segment], 4096 * (page - layout.starts[segment]) + 4095)
                say(page)

    Building.end_round = end_round  # type: ignore[method-assign]


def say(page: int) -> None:
    sys.stderr.write(f"faulty: page {page}\n")


def main(argv: list[str]) -> None:
    """Plant the fault that stands before --, and run the program that stands after it."""
    at = argv.index("--")
    if argv[1] == "missed":
        missed()
    else:
        flipped([int(word) for word in argv[2:at]])
    become(argv[at + 1 :])


if __name__ == "__main__":
    main(sys.argv)
