"""Guests of bhyve found again from their records, on the host that the record is of."""

from __future__ import annotations

from bhystream.backend.bhyve import held, loaded
from bhystream.guest import Json
from bhystream.hypervisors import recorded_host


def open_held(record: Json) -> held.BhyveHeld:
    return held.open_held(record, recorded_host)


def open_loaded(record: Json) -> loaded.BhyveLoaded:
    return loaded.open_loaded(record, recorded_host)
