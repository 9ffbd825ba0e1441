"""The order of what a move asks and does at its last moments."""

from __future__ import annotations

from typing import Any, cast
from unittest.mock import Mock

import pytest

from bhystream.handover.answers import Answer
from bhystream.handover.handshake import Event
from bhystream.report import Console
from bhystream.send.conversation import Ready
from bhystream.send.job import Begun, SendJob
from bhystream.send.options import SendOptions
from bhystream.send.outgoing import Outgoing
from bhystream.send.precopy import Limits
from bhystream.signals import Signals

ID = "00112233445566778899aabbccddeeff"


class Noting:
    """Notes each call of a method, as "name" or "name of the owner"."""

    def __init__(self, calls: list[str], **results: Any) -> None:
        self._calls, self._results = calls, results

    def __getattr__(self, name: str) -> Any:
        def call(*_: object, **__: object) -> Any:
            self._calls.append(name)
            return self._results.get(name)

        return call


class Case:
    """A move at its end; calls: what was asked of its parts, in order."""

    def __init__(self, *, answered: bool) -> None:
        self.calls: list[str] = []
        ready = Ready(Answer(ID, "HELLO", ("hv2/a1", "/d")), bytes(16))
        self.talk = Noting(self.calls, await_ready=ready, await_outcome=(Event.DOUBT, "no answer"))
        self.talk.host = "hv2"  # type: ignore[attr-defined]
        self.talk.route = Mock(thread_id=None)  # type: ignore[attr-defined]
        self.custody = Noting(self.calls, doubt=RuntimeError("in doubt"))
        self.custody.record = None  # type: ignore[attr-defined]
        self.rounds = Noting(self.calls)
        self.rounds.memory_bytes = 0  # type: ignore[attr-defined]
        opts = SendOptions(guest="web1", limits=Limits(), answered=answered)
        source = Noting(self.calls)
        source.name = "web1"  # type: ignore[attr-defined]
        parts: Any = (opts, None, Console("bhysend"), Signals(), source, None)
        self.outgoing = Outgoing(SendJob(*parts))
        self.begun = Begun(cast(Any, Noting(self.calls)), cast(Any, self.talk))


def test_the_guest_is_asked_last_before_go(handlers: None) -> None:
    """Also behind a wait for the pipe: another program may resume the guest meanwhile."""
    case = Case(answered=True)
    with pytest.raises(RuntimeError, match="in doubt"):
        case.outgoing._hand_over(
            case.begun, cast(Any, case.talk), cast(Any, case.custody), cast(Any, case.rounds)
        )
    at = case.calls.index("go")
    assert case.calls[at - 4 : at + 1] == [
        "await_ready",
        "await_room",
        "require_paused",
        "commit",
        "go",
    ]
