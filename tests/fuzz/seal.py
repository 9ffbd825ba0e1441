"""Changed streams that pass their checksums, so that a reader looks at their contents.

seal() walks a stream by the lengths that its sections state, as far as they make sense, and writes
the header's checksum, page hashes, sequence numbers, section checksums, END's place and digest.
Nothing else is corrected: types, flags, lengths, contents and counts stay as they are.
"""

from __future__ import annotations

import struct

import xxhash

_HEADER = 72
_SECTION = struct.Struct("<IIQQQ")
_MEMORY, _END = 7, 11


def seal(raw: bytes) -> bytes:
    """Return the stream with the checksums of what it holds; bytes that are no section stay."""
    if len(raw) < _HEADER:
        return raw
    out = bytearray(raw)
    struct.pack_into("<Q", out, 64, xxhash.xxh3_64_intdigest(out[:64], seed=0))
    ident, seed = bytes(out[32:48]), int.from_bytes(out[48:56], "little")
    digest = xxhash.xxh3_128(bytes(out[64:72]), seed=seed)
    at, number = _HEADER, 0
    while at + _SECTION.size <= len(out):
        kind, flags, length, _, _ = _SECTION.unpack_from(out, at)
        start = at + _SECTION.size
        end = start + length
        if end > len(out):
            break
        covered = end
        if kind == _MEMORY:
            covered = _hash_pages(out, start, end, seed, is_packed=bool(flags & 1))
        elif kind == _END and length == 64:
            struct.pack_into("<QQ", out, start + 8, number, at)
            out[start + 48 : end] = digest.digest()
        struct.pack_into("<Q", out, at + 16, number)
        checksum = xxhash.xxh3_64_digest(ident + out[at : at + 24] + out[start:covered], seed=seed)
        out[at + 24 : start] = checksum[::-1]
        if kind != _END:
            digest.update(bytes(out[at + 24 : start]))
        filler = -length % 8
        out[end : end + filler] = bytes(min(filler, len(out) - end))
        at, number = end + filler, number + 1
    return bytes(out)


def _hash_pages(out: bytearray, start: int, end: int, seed: int, *, is_packed: bool) -> int:
    """Write the hashes of a MEMORY section's pages; return where what its checksum covers ends."""
    if end - start < 16:
        return end
    _, nextents, npages, _ = struct.unpack_from("<IIII", out, start)
    hashes = start + 16 + 16 * nextents
    pages: int = hashes + 8 * npages
    if pages > end or is_packed:
        return end
    for number in range(min(npages, (end - pages) // 4096)):
        page = out[pages + 4096 * number : pages + 4096 * (number + 1)]
        struct.pack_into(
            "<Q", out, hashes + 8 * number, xxhash.xxh3_64_intdigest(bytes(page), seed=seed)
        )
    return pages
