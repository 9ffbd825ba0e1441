"""The bhysend of a stream, as far as a third stage sees it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from bhystream.handover.answers import Inbox
from bhystream.send.rendezvous import Rendezvous, path_of

from .third_stage import ID, LIMIT_S, NAMES


class Source:
    """A bhysend that reads answers: an inbox that fills, and the noise that was shown."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.inbox = Inbox()
        self.noise: list[bytes] = []
        self.rendezvous = Rendezvous(self.inbox, ID, NAMES, self.noise.append)

    def listen(self) -> Source:
        self.rendezvous.listen(self.base)
        self.rendezvous.start()
        return self

    def said_hello(self) -> bool:
        return self.inbox.wait(lambda: self.inbox.hello is not None, LIMIT_S)

    def seen(self, number: int) -> bool:
        return self.inbox.wait(lambda: self.inbox.seen >= number, LIMIT_S)

    def final(self) -> str:
        """Wait until nothing more can come; return the word of the final answer, "" for none."""
        self.inbox.wait(lambda: False, LIMIT_S)
        return self.inbox.final.word if self.inbox.final else ""

    def lost(self) -> str:
        """Wait until nothing more can come; return why."""
        self.inbox.wait(lambda: bool(self.inbox.lost), LIMIT_S)
        return self.inbox.lost


class Brief:
    """A bhysend that sends these bytes to the first process that connects, and is soon gone.

    word: what the process has to say before this bhysend hangs up.
    """

    def __init__(self, base: Path, greeting: bytes, word: bytes = b"") -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path_of(base, ID))
        self._listener.listen(1)
        self._greeting, self._word = greeting, word
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        with peer, self._listener:
            peer.sendall(self._greeting)
            data = b""
            while self._word not in data:
                data += peer.recv(1 << 16)

    def close(self) -> None:
        """Wait until it is gone."""
        self._thread.join()
