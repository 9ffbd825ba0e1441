"""QEMU's own option syntax, taken apart: key=value lists, JSON and sizes.

a,b=c,,d     a first word without "=" is the implied key's value; ",," is a comma
{"a": ...}   JSON, for -device, -object, -netdev and -blockdev
nbd:host:1   a file name that begins with a protocol
"""

from __future__ import annotations

import re
import string
from fractions import Fraction

from bhystream.errors import IncompatibleError
from bhystream.strict_json import MAX_DEPTH, loads

_SIZE = re.compile(r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}(?:\.[0-9]{1,20})?)([bBkKmMgGtTpPeE]?)")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}")
_PROTOCOL = re.compile(r"([^:/]+):")
_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")
_SHIFT = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def option_of(word: str) -> str:
    """Return the name of an option.  Raises IncompatibleError if the word has no "-"."""
    if not word.startswith("-") or word == "-":
        raise IncompatibleError(
            f"argument {told(word)}: a disk without an option",
            "start QEMU with -drive file=",
        )
    return word.removeprefix("-").removeprefix("-")


def split_keyval(text: str, implied: str = "") -> list[tuple[str, str]]:
    """Split "a,b=c" into pairs, in order.

    implied: the key of a first word without "=".  Any other word without "=" is
    a switch: "readonly" is on, and "noreadonly" is off, as in QEMU.
    Source: qemu/qemu util/qemu-option.c, get_opt_name_value().
    Raises IncompatibleError for JSON that is broken, or holds a list.
    """
    if text.startswith("{"):
        return _flatten_json(text)
    pairs: list[tuple[str, str]] = []
    # A doubled comma becomes a NUL, which no argument can hold.
    for number, item in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = item.partition("=")
        if not equals and number == 0 and implied:
            key, value = implied, key
        elif not equals:
            key, value = (key[2:], "off") if key.startswith("no") else (key, "on")
        if key:
            pairs.append((key, value.replace("\0", ",")))
    return pairs


def _flatten_json(text: str) -> list[tuple[str, str]]:
    # The message leaves the text out, which may hold a secret's data.
    unreadable = IncompatibleError("cannot read the JSON of an option")
    try:
        value = loads(text)
    except ValueError:
        raise unreadable from None
    pairs: list[tuple[str, str]] = []

    def walk(prefix: str, node: object) -> None:
        if isinstance(node, dict):
            if prefix.count(".") > MAX_DEPTH:
                raise unreadable
            for key, below in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), below)
        elif isinstance(node, list):
            raise IncompatibleError(f"{prefix}: a list cannot be carried")
        elif isinstance(node, bool):
            pairs.append((prefix, "on" if node else "off"))
        elif "\0" in str(node):  # no file can have such a name
            raise unreadable
        else:
            pairs.append((prefix, str(node)))

    walk("", value)
    return pairs


def json_address(text: str) -> dict[str, str]:
    """Return {"addr": "slot.function"} if a -device in JSON has a number as its PCI address.

    Such a number holds both slot and function (slot << 3 | function), whereas
    the same number as text would be the slot.  Returns {} otherwise.
    Source: qemu/qemu hw/core/qdev-properties-system.c, set_pci_devfn().
    """
    address = loads(text).get("addr") if text.startswith("{") else None
    return {"addr": f"{address >> 3:x}.{address & 7:x}"} if type(address) is int else {}


def as_dict(pairs: list[tuple[str, str]], what: str) -> dict[str, str]:
    """Turn pairs into a dict.  Raises IncompatibleError if a key has two different values."""
    out: dict[str, str] = {}
    for key, value in pairs:
        if key in out and out[key] != value:
            raise IncompatibleError(f"{what}: '{key}' is given twice", f"give {key} once")
        out[key] = value
    return out


def parse_size(text: str, unit_bytes: int) -> int:
    """Return a size in bytes.  unit_bytes: the unit of a number without a suffix.

    The number may have a fraction, or be hexadecimal.  A final "b" or "e" of a
    hexadecimal number is a digit; a number that ends in a letter counts bytes.
    Source: qemu/qemu util/cutils.c, do_strtosz(); softmmu/vl.c, which appends
    the "M" of -m to a decimal digit only.  Raises IncompatibleError.
    """
    found = _SIZE.fullmatch(text)
    if not found:
        raise IncompatibleError(f"cannot read the size '{text[:60]}'")
    number, suffix = found[1], found[2].lower()
    is_hex = number[:2].lower() == "0x"
    unit = 1 << _SHIFT[suffix] if suffix else unit_bytes if text[-1] in string.digits else 1
    size = (Fraction(int(number, 16)) if is_hex else Fraction(number)) * unit
    if size >= 1 << 64 or (unit == 1 and size.denominator != 1):
        raise IncompatibleError(f"cannot read the size '{text[:60]}'")
    return int(size)


def parse_number(text: str, what: str) -> int:
    """Return a number: decimal, 0x... or octal.  Source: strtoull(3), base 0.

    what: names the number in the IncompatibleError that is raised for other text.
    """
    if not _NUMBER.fullmatch(text):
        raise IncompatibleError(f"{what}: '{text[:20]}' is no number")
    try:
        return int(text, 16 if text[:2].lower() == "0x" else 8 if text[0] == "0" else 10)
    except ValueError:
        raise IncompatibleError(f"{what}: '{text[:20]}' is no number") from None


def protocol_of(name: str) -> str:
    """Return "nbd" of "nbd:unix:/run/x", "" of a path.

    Source: qemu/qemu block.c, path_has_protocol(): a colon before any slash.
    """
    found = _PROTOCOL.match(name)
    return found[1] if found else ""


def told(name: str) -> str:
    """Return the name of an image as messages show it.

    A name with a protocol may hold a password, so only the protocol is shown.
    """
    protocol = protocol_of(name)
    return f"{protocol}:..." if protocol else name


def is_on(value: str, what: str) -> bool:
    """Return the truth value of `what`, as QEMU reads it.  Raises IncompatibleError.

    Source: qemu/qemu qapi/qapi-util.c, qapi_bool_parse().
    """
    if value in _TRUE or value in _FALSE:
        return value in _TRUE
    raise IncompatibleError(f"{what}: '{value[:20]}' is neither on nor off")


def escape(value: str) -> str:
    """Return a value with its commas doubled, for an option's argument."""
    return value.replace(",", ",,")
