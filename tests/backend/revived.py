"""bhyve guests found again from their records, each on the host that its record names."""

from __future__ import annotations

from bhystream.backend.bhyve import loaded, paused
from bhystream.guest import Json
from bhystream.hypervisors import recorded_host


def open_paused(record: Json) -> paused.BhyvePaused:
    return paused.open_paused(record, recorded_host)


def open_loaded(record: Json) -> loaded.BhyveLoaded:
    return loaded.open_loaded(record, recorded_host)
