"""A paused guest without a hypervisor, of which each test makes its own kind."""

from __future__ import annotations

from collections.abc import Sequence

from bhystream.guest import State


class Paused:
    """A base.Paused that hands each act to do(), which may note the act, or make it fail.

    alive, running: what is_alive() and runs() return.
    """

    reasons: Sequence[str] = ()
    alive = True
    running = False

    def do(self, act: str, there: str = "") -> None:
        """Do one act.  act: "resume", "clear", "discard" or "close".  there: of discard()."""
        raise NotImplementedError

    def states(self) -> Sequence[State]:
        return ()

    def require_paused(self) -> None:
        """Do nothing: the guest stands paused."""

    def resume(self) -> None:
        self.do("resume")

    def clear(self) -> None:
        self.do("clear")

    def discard(self, there: str) -> None:
        self.do("discard", there)

    def close(self) -> None:
        self.do("close")

    def is_alive(self) -> bool:
        return self.alive

    def runs(self) -> bool:
        return self.running
