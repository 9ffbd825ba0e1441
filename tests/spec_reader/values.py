"""The contents of the head: JSON, HOST, LAYOUT, CONFIG, DEVICES.

json.loads accepts more than RFC 8259 and bhystream(5) do; this module refuses the rest.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any, Final, Never

from spec_reader.found import PAGE, Segment, Wrong, need

NO_GPA: Final = 0xFFFFFFFFFFFFFFFF
SEGMENT: Final = struct.Struct("<32sQQ")
CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SURROGATE: Final = re.compile(r"[\ud800-\udfff]")


def _check_depth(text: str) -> None:
    # A string without an end matches up to the end of the text, so that the search stays linear.
    bare = re.sub(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', "", text, flags=re.DOTALL)
    depth = 0
    for char in bare:
        if char in "[{":
            depth += 1
            need(depth <= 16, "JSON nests too deep")
        elif char in "]}":
            depth -= 1


def _check_strings(value: Any) -> None:
    """Refuse lone surrogates: json.loads has made one character of each pair of escapes."""
    if isinstance(value, str):
        need(SURROGATE.search(value) is None, "JSON string has a lone surrogate")
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)
    elif isinstance(value, dict):
        _check_strings(list(value))
        _check_strings(list(value.values()))


def _int(digits: str) -> int:
    need(len(digits) <= 20 and -(2**63) <= int(digits) < 2**63, "JSON number out of range")
    return int(digits)


def _float(digits: str) -> Never:
    raise Wrong("JSON number is not an integer")


def _constant(name: str) -> Never:
    raise Wrong("not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    need(len(made) == len(pairs), "JSON name occurs twice in an object")
    return made


def parse_json(payload: bytes) -> Any:
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        raise Wrong("JSON is not UTF-8") from None
    need(not text.startswith("\ufeff"), "JSON has a byte order mark")
    _check_depth(text)
    try:
        value = json.loads(
            text,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except ValueError:
        raise Wrong("not JSON") from None
    _check_strings(value)
    return value


def is_token(raw: bytes) -> bool:
    """Say whether the text is printable ASCII without a space."""
    return all(0x21 <= byte <= 0x7E for byte in raw)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 128 and CONTROL.search(value) is None


def host(payload: bytes) -> dict[str, Any]:
    value = parse_json(payload)
    need(isinstance(value, dict), "HOST is not an object")
    assert isinstance(value, dict)
    for key in ("hypervisor", "program"):
        need(_is_name(value.get(key)), f"HOST has no good {key}")
    return value


def config(payload: bytes) -> dict[str, Any]:
    value = parse_json(payload)
    need(isinstance(value, dict), "CONFIG is not an object")
    assert isinstance(value, dict)
    name = value.get("name")
    good = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name)
    need(bool(good), "bad name of the guest")
    return value


def devices(payload: bytes) -> list[str]:
    value = parse_json(payload)
    need(isinstance(value, list), "DEVICES is not an array")
    assert isinstance(value, list)
    need(len(value) <= 1024, "more than 1024 devices")
    need(all(_is_name(name) for name in value), "bad device name")
    return value


def layout(payload: bytes) -> list[Segment]:
    need(len(payload) >= 8, "wrong length")
    page_size, count = struct.unpack_from("<II", payload)
    need(page_size == PAGE, "page size is not 4096")
    need(1 <= count <= 64, "number of segments is not 1 to 64")
    need(len(payload) == 8 + 48 * count, "wrong length")
    first, names, made = 0, set(), []
    for raw, gpa, npages in SEGMENT.iter_unpack(payload[8:]):
        name = raw.rstrip(b"\0")
        need(1 <= len(name) <= 31 and is_token(name), "bad segment name")
        need(name not in names, "segment name occurs twice")
        need(gpa == NO_GPA or gpa % PAGE == 0, "gpa is not a multiple of 4096")
        need(npages >= 1, "segment without pages")
        names.add(name)
        made.append(Segment(name.decode("ascii"), None if gpa == NO_GPA else gpa, first, npages))
        first += npages
    need(first <= 2**36, "more than 2^36 pages")
    _check_addresses(made)
    return made


def _check_addresses(made: list[Segment]) -> None:
    ranges = [(one.gpa, one.gpa + one.npages * PAGE) for one in made if one.gpa is not None]
    need(all(end <= 2**64 for _, end in ranges), "segment ends above 2^64")
    for at, (first, end) in enumerate(ranges):
        for other, other_end in ranges[:at]:
            need(end <= other or other_end <= first, "segments overlap")
