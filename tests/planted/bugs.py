"""The bugs that are planted."""

from __future__ import annotations

from planted import lengths, memory, stream
from planted.bug import Bug

BUGS: tuple[Bug, ...] = (*stream.BUGS, *lengths.BUGS, *memory.BUGS)
