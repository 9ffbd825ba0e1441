"""One zstd frame (RFC 8878)."""

from __future__ import annotations

import zstandard

from spec_reader.found import Wrong, need


def unzstd(frame: bytes, size: int) -> bytes:
    """Return the `size` bytes of the one zstd frame that `frame` has to be.

    The blocks are walked first (RFC 8878, 3.1.1), since a decoder does not tell the frame's end.
    """
    need(frame[:4] == b"\x28\xb5\x2f\xfd", "not a zstd frame")
    try:
        parameters = zstandard.get_frame_parameters(frame)
        at = zstandard.frame_header_size(frame)
    except zstandard.ZstdError:
        raise Wrong("not a zstd frame") from None
    need(parameters.content_size == size, "zstd frame does not state the content size")
    need(parameters.dict_id == 0, "zstd frame names a dictionary")
    need(parameters.window_size <= 8 << 20, "zstd frame needs a window over 8 MiB")
    last = 0
    while not last:
        block = int.from_bytes(frame[at : at + 3], "little")
        need(at + 3 <= len(frame), "zstd frame is incomplete")
        last, kind = block & 1, block >> 1 & 3
        at += 3 + (1 if kind == 1 else block >> 3)
    at += 4 if parameters.has_checksum else 0
    need(at <= len(frame), "zstd frame is incomplete")
    need(at == len(frame), "bytes after the zstd frame")
    try:
        # This fails unless the output has the stated size, which the caller has capped.
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size)
    except zstandard.ZstdError:
        raise Wrong("zstd frame is damaged") from None
