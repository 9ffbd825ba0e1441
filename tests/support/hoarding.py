"""A stream through a pipeline that keeps bytes back, to a destination that answers SEEN."""

from __future__ import annotations

from bhystream.handover.answers import Answer, Inbox
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.writer import Body, Bytes, Writer

ID = "0123456789abcdef" * 2
HELLO = Answer(ID, "HELLO", ("hv2/a1", "/d"))
HEADER = Header(Form.ANSWERED, Feature(0), bytes.fromhex(ID), 7)


class Hoarding(Writer):
    """A writer whose destination answers SEEN at once for all but the last `held` bytes.

    says_hello: the destination says HELLO at the start.  pads: the PAD sections' lengths.
    """

    def __init__(self, fd: int, held: int, inbox: Inbox, *, says_hello: bool = True) -> None:
        self.held = held
        self.inbox = inbox
        self.pads: list[int] = []
        self._ends: list[int] = []
        super().__init__(fd, HEADER)
        if says_hello:
            inbox.put(HELLO, HELLO)

    def section(
        self, type_: int, payload: Bytes = b"", *, flags: int = 0, body: Body = b""
    ) -> None:
        super().section(type_, payload, flags=flags, body=body)
        if type_ == Type.PAD:
            self.pads.append(len(payload))
        self._ends.append(self.offset_bytes)
        out = self.offset_bytes - self.held
        last = sum(end <= out for end in self._ends) - 1
        if last >= 0:
            self.inbox.put(HELLO, Answer(ID, "SEEN", (str(last),)))
