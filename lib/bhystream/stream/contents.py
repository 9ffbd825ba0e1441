"""Contents: the checks of a hypervisor's own sections, which a walk of the stream calls."""

from __future__ import annotations

from typing import Protocol

from bhystream.guest import Json, Layout, State


class Contents(Protocol):
    """The checks of a hypervisor's own sections of one stream, on any host.

    verify.Walk calls them in the stream's order.  So a Sink is given only what
    has passed here, and a host that has no Sink can still verify the stream.
    The errors name no place; the walk adds the place.
    """

    def config(self, config: Json) -> None:
        """Check CONFIG.  Raises IncompatibleError: an unknown key may be a later version's."""

    def layout(self, layout: Layout) -> None:
        """Check LAYOUT.  Raises IncompatibleError if it does not fit CONFIG."""

    def devices(self, devices: tuple[str, ...]) -> None:
        """Check DEVICES.  Raises IncompatibleError if they do not fit CONFIG."""

    def plan(self, plan: bytes) -> None:
        """Check REHEARSAL.  Raises FormatError."""

    def state(self, state: State) -> None:
        """Check one whole state.  Raises FormatError."""

    def end(self) -> None:
        """Check that no state is missing.  Raises FormatError."""
