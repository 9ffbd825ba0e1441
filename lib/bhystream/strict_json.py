"""JSON by the rules of bhystream(5), which refuse what two readers could read in two ways.

loads() is for all other JSON.  No other module calls json.loads(), which raises RecursionError
for a text that nests deep.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from bhystream.errors import FormatError

MAX_DEPTH = 16


def loads(text: str | bytes) -> Any:
    """Return the value of a JSON text.  Raises ValueError for a text that cannot be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nests too deep") from None


def pack_json(value: Any) -> bytes:
    """Pack a JSON section."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), sort_keys=True).encode()


def unpack_json(data: bytes) -> Any:
    """Unpack a JSON section.  Raises FormatError by the rules of bhystream(5), JSON sections."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_object,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
            parse_int=_bounded_int,
        )
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"not JSON in UTF-8: {error}") from None
    except RecursionError:
        raise FormatError("JSON nests too deep") from None
    _check_json(value, MAX_DEPTH)
    return value


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise FormatError("a JSON name occurs twice")
    return value


def _refuse_number(text: str) -> NoReturn:
    raise FormatError(f"JSON number is not an integer: {text[:20]}")


def _bounded_int(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 63:
        raise FormatError(f"JSON number does not fit 64 bits: {text[:24]}")
    return int(text)


def _check_json(value: Any, depth: int) -> None:
    """Refuse deep nesting, and strings that cannot be written back as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise FormatError("a JSON string has a lone surrogate") from None
    elif isinstance(value, list | dict):
        if depth == 0:
            raise FormatError("JSON nests too deep")
        for item in value if isinstance(value, list) else [*value, *value.values()]:
            _check_json(item, depth - 1)
