"""A malformed stream for each rule of bhystream(5): JSON, HOST, LAYOUT, CONFIG, DEVICES."""

from __future__ import annotations

import json

import pytest

from bhystream.errors import FormatError
from support.both import refused_last
from support.streams import CONFIG, DEVICES, HOST, LAYOUT, NO_GPA, before, layout

NOT_JSON = "not JSON in UTF-8: ..."  # "..." stands for the words of the json module
BAD_JSON: list[tuple[bytes, str, str]] = [
    (b"", NOT_JSON, "not JSON"),
    (b"\0", NOT_JSON, "not JSON"),
    (b"{", NOT_JSON, "not JSON"),
    (b"{} {}", NOT_JSON, "not JSON"),
    (b"{}\0", NOT_JSON, "not JSON"),
    (b"{'a': 1}", NOT_JSON, "not JSON"),
    (b'{"a": 1,}', NOT_JSON, "not JSON"),
    (b'{"a": "\n"}', NOT_JSON, "not JSON"),
    (b'{"a": 01}', NOT_JSON, "not JSON"),
    (b'{"a": +1}', NOT_JSON, "not JSON"),
    ("{\u00a0}".encode(), NOT_JSON, "not JSON"),
    ('{"a": \u0661}'.encode(), NOT_JSON, "not JSON"),
    (b'{"a": "\xff"}', NOT_JSON, "JSON is not UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', NOT_JSON, "JSON is not UTF-8"),
    (b"\xef\xbb\xbf{}", NOT_JSON, "JSON has a byte order mark"),
    ("{}".encode("utf-16-le"), NOT_JSON, "not JSON"),
    (b'["\\', NOT_JSON, "not JSON"),
    (b'["' + b'\\"' * 32767, NOT_JSON, "not JSON"),
    (b'{"a": NaN}', "JSON number is not an integer: NaN", "not JSON"),
    (b'{"a": -Infinity}', "JSON number is not an integer: -Infinity", "not JSON"),
    (b'{"a": 1.0}', "JSON number is not an integer: 1.0", "JSON number is not an integer"),
    (b'{"a": 1e3}', "JSON number is not an integer: 1e3", "JSON number is not an integer"),
    (b'{"a": 9223372036854775808}', "JSON number does not fit 64 bits: 9223372036854775808",
     "JSON number out of range"),
    (b'{"a": -9223372036854775809}', "JSON number does not fit 64 bits: -9223372036854775809",
     "JSON number out of range"),
    (b'{"a": ' + b"9" * 5000 + b"}", f"JSON number does not fit 64 bits: {'9' * 24}",
     "JSON number out of range"),
    (b'{"a": -00}', NOT_JSON, "not JSON"),
    (b'{"a": 0x1}', NOT_JSON, "not JSON"),
    (b'{"a": 1_0}', NOT_JSON, "not JSON"),
    (b'{"a": 1, "a": 1}', "a JSON name occurs twice", "JSON name occurs twice in an object"),
    (b'[{"a": [{"b": 1, "\\u0062": 1}]}]', "a JSON name occurs twice",
     "JSON name occurs twice in an object"),
    (b'["\\ud800"]', "a JSON string has a lone surrogate", "JSON string has a lone surrogate"),
    (b'["\\udc00\\ud800"]', "a JSON string has a lone surrogate",
     "JSON string has a lone surrogate"),
    (b'[[{"a": "\\udfff"}]]', "a JSON string has a lone surrogate",
     "JSON string has a lone surrogate"),
    (b'{"\\ud800": 1}', "a JSON string has a lone surrogate", "JSON string has a lone surrogate"),
    (b"[" * 17 + b"]" * 17, "JSON nests too deep", "JSON nests too deep"),
    (b'{"a":' * 17 + b"1" + b"}" * 17, "JSON nests too deep", "JSON nests too deep"),
    (b"[" * 16 + b'{"a":1}' + b"]" * 16, "JSON nests too deep", "JSON nests too deep"),
    (b"[" * 65536, "JSON nests too deep", "JSON nests too deep"),
]  # fmt: skip


@pytest.mark.parametrize("kind", [HOST, CONFIG, DEVICES])
@pytest.mark.parametrize(("payload", "message", "why"), BAD_JSON)
def test_bad_json_is_refused(kind: int, payload: bytes, message: str, why: str) -> None:
    refused_last(before(kind).add(kind, payload), FormatError, message, why)


NOT_OBJECT = "not a JSON object"
BAD_NAME = "name is missing or not a guest's name"
BAD_DEVICE = "not a name of 1 to 128 printable characters"
NOT_ARRAY = "not an array of at most 1024 names"
CONTROLS = ["\0", "\t", "\n", "\x1b", "\x1f", "\x7f", "\x80", "\x85", "\x9f"]


BAD_NAMES: list[object] = ["", 1, None, [], ["a"], "x" * 129, *(f"a{one}" for one in CONTROLS)]


@pytest.mark.parametrize("value", BAD_NAMES)
@pytest.mark.parametrize("key", ["hypervisor", "program"])
def test_bad_names_of_the_host_are_refused(key: str, value: object) -> None:
    host = {"hypervisor": "qemu", "program": "test 1", key: value}
    maker = before(HOST).add(HOST, json.dumps(host).encode())
    refused_last(maker, FormatError, f"{key} is missing or not a name", f"HOST has no good {key}")
    del host[key]
    maker = before(HOST).add(HOST, json.dumps(host).encode())
    refused_last(maker, FormatError, f"{key} is missing or not a name", f"HOST has no good {key}")


@pytest.mark.parametrize(
    ("kind", "value", "message", "why"),
    [
        (HOST, [], NOT_OBJECT, "HOST is not an object"),
        (HOST, "qemu", NOT_OBJECT, "HOST is not an object"),
        (CONFIG, None, NOT_OBJECT, "CONFIG is not an object"),
        (CONFIG, [{"name": "web1"}], NOT_OBJECT, "CONFIG is not an object"),
        (CONFIG, {}, BAD_NAME, "bad name of the guest"),
        *((CONFIG, {"name": name}, BAD_NAME, "bad name of the guest")
          for name in (1, None, ["a"], "", "x" * 65, ".", "..", ".a", "-a", "a/b", "a b", "a\n",
                       "\n", "a\0", "ä", "a:b", "\u0661", "a%b", "~a")),
        (DEVICES, {}, NOT_ARRAY, "DEVICES is not an array"),
        (DEVICES, "uart", NOT_ARRAY, "DEVICES is not an array"),
        (DEVICES, None, NOT_ARRAY, "DEVICES is not an array"),
        (DEVICES, ["d"] * 1025, NOT_ARRAY, "more than 1024 devices"),
        *((DEVICES, ["uart", name], BAD_DEVICE, "bad device name")
          for name in BAD_NAMES),
    ],
)  # fmt: skip
def test_wrong_value_is_refused(kind: int, value: object, message: str, why: str) -> None:
    refused_last(before(kind).add(kind, json.dumps(value).encode()), FormatError, message, why)


BAD_SEGMENT = "a segment's name is not 1 to 31 printable characters"
TOO_LARGE = "the guest has more than 2^36 pages"
UNALIGNED = "gpa is not a multiple of 4096"


@pytest.mark.parametrize(
    ("payload", "message", "why"),
    [
        (b"", "length is too small", "wrong length"),
        (layout((b"ram", 0, 1), size=8192), "page size is 8192, not 4096",
         "page size is not 4096"),
        (layout(count=0), "0 segments are not 1 to 64", "number of segments is not 1 to 64"),
        (layout((b"ram", 0, 1), count=0), "0 segments are not 1 to 64",
         "number of segments is not 1 to 64"),
        (layout((b"ram", 0, 1), count=65), "65 segments are not 1 to 64",
         "number of segments is not 1 to 64"),
        (layout((b"ram", 0, 1), count=2**32 - 1), "4294967295 segments are not 1 to 64",
         "number of segments is not 1 to 64"),
        (layout((b"ram", 0, 1), count=2), "length does not fit 2 segments", "wrong length"),
        (layout((b"ram", 0, 1)) + bytes(8), "length does not fit 1 segments", "wrong length"),
        (layout((b"ram", 0, 1))[:-1], "length does not fit 1 segments", "wrong length"),
        *((layout((name, 0, 1)), BAD_SEGMENT, "bad segment name")
          for name in (b"", b"x" * 32, b"a b", b"a\x7f", b"a\0b", b"\0a", b"\xe4", b"a\n")),
        (layout((b"a", 0, 1), (b"a", 4096, 1)), "two segments have the same name",
         "segment name occurs twice"),
        (layout((b"a", 4095, 1)), "segment a: gpa 0xfff is not a multiple of 4096", UNALIGNED),
        (layout((b"a", NO_GPA - 1, 1)),
         "segment a: gpa 0xfffffffffffffffe is not a multiple of 4096", UNALIGNED),
        (layout((b"a", 0, 0)), "segment a has no pages", "segment without pages"),
        (layout((b"a", NO_GPA, 2**36), (b"b", 0, 1)), TOO_LARGE, "more than 2^36 pages"),
        (layout((b"a", NO_GPA, 2**64 - 1)), TOO_LARGE, "more than 2^36 pages"),
        (layout((b"a", NO_GPA, 2**63), (b"b", NO_GPA, 2**63)), TOO_LARGE, "more than 2^36 pages"),
        (layout((b"a", 0, 2), (b"b", 4096, 1)), "segment b overlaps another", "segments overlap"),
        (layout((b"a", 4096, 1), (b"b", 0, 2)), "segment a overlaps another", "segments overlap"),
        (layout((b"a", 0, 3), (b"b", 4096, 1)), "segment b overlaps another", "segments overlap"),
        (layout((b"a", 0, 1), (b"b", 0, 1)), "segment b overlaps another", "segments overlap"),
        (layout((b"a", 0, 9), (b"b", NO_GPA, 1), (b"c", 2**20, 1), (b"d", 8 * 4096, 1)),
         "segment d overlaps another", "segments overlap"),
        (layout((b"a", 2**64 - 4096, 2)), "segment a ends above 2^64", "segment ends above 2^64"),
        (layout((b"a", 2**64 - 8192, 3), (b"b", 0, 1)), "segment a ends above 2^64",
         "segment ends above 2^64"),
    ],
)  # fmt: skip
def test_bad_layout_is_refused(payload: bytes, message: str, why: str) -> None:
    refused_last(before(LAYOUT).add(LAYOUT, payload), FormatError, message, why)
