"""The beginning of a stream: its header, and the head sections."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bhystream import __version__
from bhystream.guest import Head
from bhystream.stream import format as fmt
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.strict_json import pack_json

if TYPE_CHECKING:
    from bhystream.stream.writer import Writer

PROGRAM = f"bhysend {__version__}"


def new_header(form: Form, features: Feature) -> Header:
    """Return the header of a new stream, with an id and a seed that no other stream has."""
    return Header(form, features, os.urandom(fmt.STREAM_ID_BYTES), new_seed())


def new_seed() -> int:
    """Return a seed for page hashes that nobody can guess."""
    return int.from_bytes(os.urandom(8), "little")


def write_head(writer: Writer, head: Head, program: str = PROGRAM) -> None:
    """Write HOST to HEAD_END: all that cannot change while the guest runs.

    Raises InputOutputError.
    """
    host = {**head.host, "program": program}
    writer.section(Type.HOST, pack_json(host))
    writer.section(Type.LAYOUT, fmt.pack_layout(head.layout))
    writer.section(Type.CONFIG, pack_json(head.config))
    writer.section(Type.DEVICES, pack_json(list(head.devices)))
    writer.section(Type.HEAD_END)
