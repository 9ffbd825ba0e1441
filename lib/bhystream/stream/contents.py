"""What a walk of a stream asks of those who know its hypervisor: Contents."""

from __future__ import annotations

from typing import Protocol

from bhystream.guest import Json, Layout, State


class Contents(Protocol):
    """What a hypervisor's own sections of a stream say, checked on any host.

    One for each stream, asked in its order, by verify.Walk: so what a Sink is
    given has passed here, and a stream is verified where no Sink can be had.
    What is raised names no place: the walk adds it.
    """

    def config(self, config: Json) -> None:
        """Check CONFIG.  Raises IncompatibleError: what is not known may be of a later version."""

    def layout(self, layout: Layout) -> None:
        """Check LAYOUT.  Raises IncompatibleError where it is not CONFIG's."""

    def devices(self, devices: tuple[str, ...]) -> None:
        """Check DEVICES.  Raises IncompatibleError where they are not CONFIG's."""

    def plan(self, plan: bytes) -> None:
        """Check REHEARSAL.  Raises FormatError."""

    def state(self, state: State) -> None:
        """Check one state, whole.  Raises FormatError."""

    def end(self) -> None:
        """Check that no state is missing.  Raises FormatError."""
