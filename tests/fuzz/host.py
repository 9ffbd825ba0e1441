"""Targets that read what the other side answers, and what this host's state directory holds."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

from bhystream.backend.bhyve.paused import PausedRecord
from bhystream.backend.bhyve.restoredguest import RestoredGuest
from bhystream.backend.qemu.paused import open_paused as open_qemu
from bhystream.errors import BhyError, RecordError
from bhystream.handover import prune, state
from bhystream.handover.answers import MAX_LINE_BYTES, Answer, Inbox, Parser, pack, unpack
from bhystream.handover.recorded import event_of
from bhystream.handover.state import Record, Records
from bhystream.report import printable
from bhystream.send.experience import Experience
from bhystream.strict_json import pack_json, unpack_json
from fuzz.target import attempt, fail


def answers(data: bytes) -> None:
    """Read the way back, whole and byte by byte: the answers are the same."""
    whole = _answers(data, len(data) or 1)
    step = data[0] % 7 + 1 if data else 1
    if _answers(data, step) != whole:
        fail("the answers depend on how the bytes arrive")
    if whole:
        inbox = Inbox()
        try:
            for answer in whole:
                inbox.put(whole[0], answer)
            error = inbox.failure()
            if error and not printable(str(error)).isprintable():
                fail("not printable")
        finally:
            inbox.close()


def _answers(data: bytes, step: int) -> list[Answer]:
    noise: list[bytes] = []
    parser = Parser(None, noise.append)
    found: list[Answer] = []
    try:
        for at in range(0, len(data), step):
            for answer in parser.feed(data[at : at + step]):
                found.append(answer)
                line = pack(answer)
                if len(line) > MAX_LINE_BYTES or unpack(line) != answer:
                    fail(f"{answer} is packed as {line!r}")
    except BhyError:
        pass
    if sum(map(len, noise)) > 4096 + MAX_LINE_BYTES:
        fail("more noise than the page allows")
    if found and (found[0].word != "HELLO" or len({answer.id for answer in found}) > 1):
        fail("answers of two streams")
    return found


_base: list[Path] = []


def _state() -> Path:
    if not _base:
        _base.append(Path(tempfile.mkdtemp()))
        for name in ("destination", "source", "lock", "loaded", "told"):
            (_base[0] / name).mkdir()
    return _base[0]


ID = "0123456789abcdef" * 2


def record(data: bytes) -> None:
    """Read a record: it is broken, or every field is of use and it is written as it was read."""
    base = _state()
    path = base / "destination" / f"{ID}.json"
    path.write_bytes(data)
    records = Records(base, "destination")
    try:
        found = records.get(ID)
    except RecordError:
        if len(records.broken()) != 1 or records.all():
            fail("a broken record counts for nothing")
        raise
    if found is None or records.all() != [found]:
        fail("the record was not found")
    event_of(found, None, None)
    printable(f"{found.guest} {found.operand} {found.there} {' '.join(found.ask)}")
    if found.time_ns < 0 or found.revive.get("hypervisor") == found:
        fail(f"{found}")
    again = Record.from_json(json.loads(json.dumps(found._asdict())))
    if again != found:
        fail("a record changes when it is written")
    prune.prune(base, records)
    for revive in (PausedRecord.from_json, RestoredGuest.from_json, open_qemu):
        attempt(partial(revive, found.revive))


def over(data: bytes) -> None:
    """Read the phases of old streams, and the warnings that were printed."""
    base = _state()
    for name in ("destination/over", "told/web1", "host-id"):
        (base / name).write_bytes(data)
    path = base / "destination" / f"{ID}.json"
    path.unlink(missing_ok=True)
    state.Told(base, "web1").new(["a"])
    if "\n" in state.host_id(base):
        fail("the host's id has two lines")
    Records(base, "destination").phase(ID)


def experience(data: bytes) -> None:
    """Read the notes of earlier moves, which only make a prediction better: nothing may fail."""
    base = _state()
    (base / "experience.json").write_bytes(data)
    notes = Experience(base)
    for part in ("load", "state", "scan"):
        if not 0 < notes.factor(part) < 1000:
            fail(f"a factor of {notes.factor(part)}")
        notes.learn(part, 1.0, 2.0)
    notes.save()


def strict_json(data: bytes) -> None:
    """Read the JSON of a section: what is taken is written and read as the same."""
    value = unpack_json(data)
    if unpack_json(pack_json(value)) != value:
        fail("pack_json() and unpack_json() differ")
