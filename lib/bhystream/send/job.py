"""What all parts of one move share: SendJob from the command line on, Begun from the head on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bhystream.backend.base import Source
from bhystream.handover.state import Lock
from bhystream.report import Console
from bhystream.send.options import SendOptions
from bhystream.signals import Signals
from bhystream.stream.writer import Writer

if TYPE_CHECKING:  # a dry run needs no conversation
    from bhystream.send.conversation import Conversation


@dataclass(frozen=True)
class SendJob:
    """One guest to send.

    base: the state directory.  source, lock: the guest's, open; main.send() closes both.
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
        """Print a line about the guest."""
        self.console.say(f"{self.who}: {text}")

    def log(self, text: str) -> None:
        """Write a line about the guest to syslog."""
        self.console.log(f"{self.who}: {text}")


@dataclass(frozen=True)
class Begun:
    """A stream whose head is written and, in the answered forms, accepted.

    talk: the conversation with the destination; None in the forms without answers.
    """

    writer: Writer
    talk: Conversation | None

    @property
    def id(self) -> str:
        """Return the stream's id, in hexadecimal."""
        return self.writer.header.stream_id.hex()

    @property
    def host(self) -> str:
        """Return the destination as messages name it: "a pipe" if it does not answer."""
        return self.talk.host if self.talk else "a pipe"
