"""What one move of bhysend is about, from the command line on: the same for all its parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.base import Source
from bhystream.handover.state import Lock
from bhystream.report import Console
from bhystream.send.conversation import Conversation
from bhystream.send.options import SendOptions
from bhystream.signals import Signals
from bhystream.stream.writer import Writer


@dataclass(frozen=True)
class Job:
    """One guest that is to be sent.

    base: the state directory.  source, lock: of the guest, the caller's.
    """

    opts: SendOptions
    base: Path
    console: Console
    signals: Signals
    source: Source
    lock: Lock

    @property
    def who(self) -> str:
        """Return the guest as messages name it."""
        return f"guest {self.source.name}"

    def say(self, text: str) -> None:
        """Say something of the guest."""
        self.console.say(f"{self.who}: {text}")

    def log(self, text: str) -> None:
        """Write something of the guest to syslog."""
        self.console.log(f"{self.who}: {text}")


@dataclass(frozen=True)
class Begun:
    """A stream whose head is written, and accepted where it is answered.

    talk: with the destination, None in the forms without answers.
    """

    writer: Writer
    talk: Conversation | None

    @property
    def id(self) -> str:
        """Return the stream's id, in hexadecimal."""
        return self.writer.header.stream_id.hex()

    @property
    def host(self) -> str:
        """Return the destination as messages name it."""
        return self.talk.host if self.talk else "a pipe"
