"""What one bhyrecv has to receive, and what it refuses whatever the stream contains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bhystream.errors import IncompatibleError
from bhystream.guest import LOADED
from bhystream.handover import recorded, state
from bhystream.recv.options import Options
from bhystream.recv.reply import Reply, Silence, TimedInput
from bhystream.report import Console
from bhystream.signals import Signals
from bhystream.stream.format import Form
from bhystream.stream.verify import Walk


@dataclass(frozen=True)
class RecvJob:
    """One stream that is to be received.

    walk: has yielded no event yet; reads from source.  base: the state directory.
    records: this destination's records.  reply: writes the answers to the source, or
    is a Silence.
    """

    opts: Options
    walk: Walk
    source: TimedInput
    base: Path
    console: Console
    signals: Signals
    records: state.Records
    reply: Reply | Silence

    @property
    def id(self) -> str:
        """Return the stream's id, in hexadecimal."""
        return self.walk.header.stream_id.hex()

    @property
    def is_answered(self) -> bool:
        """Say whether the source waits for answers."""
        return self.walk.header.form == Form.ANSWERED

    def seen(self, *, now: bool) -> None:
        """Answer how far the stream has been read, if that is due, or `now`."""
        reader = self.walk.reader
        self.reply.seen(reader.sequence - 1, reader.offset_bytes, now=now)


def require_startable(opts: Options, walk: Walk, records: state.Records) -> None:
    """Raise IncompatibleError if a stream may not be started here, whatever it contains.

    records: this destination's records.  Raises RecordError, AccessError,
    InputOutputError if a record cannot be read.
    """
    is_answered = walk.header.form == Form.ANSWERED
    if is_answered:
        opts.refuse_answered()
    if opts.directory is not None:
        return  # snapshot files start nothing, and may be made from a stream again
    id_ = walk.header.stream_id.hex()
    record = records.get(id_)
    if record and record.phase == LOADED and recorded.is_alive(record):
        raise IncompatibleError(
            f"stream {id_} stands loaded on this host, as {record.operand}",
            f"bhyrecv --resume {id_}, or bhyrecv --discard {id_}",
        )
    phase = records.phase(id_)
    if phase and (is_answered or not opts.again):
        where = f", as {record.operand}" if record else ""
        raise IncompatibleError(
            f"stream {id_} was {phase} on this host before{where}",
            "" if is_answered else "if no copy of that guest runs anywhere: --again",
        )


def refuse(reasons: Sequence[str], name: str) -> None:
    """Raise IncompatibleError if there are reasons against the guest."""
    if reasons:
        raise IncompatibleError(f"guest {name}: {reasons[0]}", "\n".join(reasons[1:]))
