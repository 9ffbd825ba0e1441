"""The check of a configuration from a stream, which is hostile until it has passed.

validate() takes whatever JSON the CONFIG section held and returns a fresh,
wholly checked copy, of the shape that config.reduce_argv() makes; nothing of
the original is used afterwards.  Every key is known or refused by name, every
number has a range, every text a pattern, every list a length, every
reference a target.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from bhystream.backend.qemu import allow
from bhystream.backend.qemu.devices import check_references
from bhystream.errors import IncompatibleError
from bhystream.guest import PAGE_BYTES

Check = Callable[[Any, str], Any]

_MAX_LIST = 256
_MAX_FEATURES = 512  # of a processor
_MAX_GUEST_BYTES = 1 << 46
_EMPTY = re.compile("")


def _shown(value: object) -> str:
    """Return a hostile value as text for a message: ASCII, quoted, short."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _bad(where: str, why: str) -> IncompatibleError:
    return IncompatibleError(f"the stream's configuration: {where}: {why}")


def _text(pattern: re.Pattern[str]) -> Check:
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise _bad(where, f"{_shown(value)} is not allowed")
        return value

    return check


def _one_of(words: Iterable[str]) -> Check:
    allowed = frozenset(words)

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise _bad(where, f"{_shown(value)} is not allowed")
        return value

    return check


def _either(*checks: Check) -> Check:
    def check(value: Any, where: str) -> Any:
        for each in checks[:-1]:
            try:
                return each(value, where)
            except IncompatibleError:
                continue
        return checks[-1](value, where)

    return check


def _number(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _bad(where, f"{_shown(value)} is not a number from {low} to {high}")
        return value

    return check


def _bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(where, f"{_shown(value)} is not true or false")
    return value


def _null(value: Any, where: str) -> None:
    if value is not None:
        raise _bad(where, f"{_shown(value)} is not null")


def _list(item: Check, limit: int = _MAX_LIST) -> Check:
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > limit:
            raise _bad(where, f"not a list of at most {limit}")
        return [item(each, f"{where}[{number}]") for number, each in enumerate(value)]

    return check


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > _MAX_LIST:
        raise _bad(where, "not an object")
    for key in value:
        if not isinstance(key, str):
            raise _bad(where, f"unknown key {_shown(key)}")
    return value


def _record(fields: dict[str, Check]) -> Check:
    """Return a check for an object that has exactly these keys."""

    def check(value: Any, where: str) -> dict[str, Any]:
        given = _dict(value, where)
        for key in given:
            if key not in fields:
                raise _bad(where, f"unknown key {_shown(key)}")
        for key in fields:
            if key not in given:
                raise _bad(where, f"'{key}' is missing")
        return {key: each(given[key], f"{where}.{key}") for key, each in fields.items()}

    return check


def _table(allowed: Callable[[str], bool], item: Check) -> Check:
    """Return a check for an object that has any of the allowed keys."""

    def check(value: Any, where: str) -> dict[str, Any]:
        given = _dict(value, where)
        for key in given:
            if not allowed(key):
                raise _bad(where, f"unknown key {_shown(key)}")
        return {key: item(each, f"{where}.{key}") for key, each in given.items()}

    return check


def _ident(value: Any, where: str) -> str:
    text: str = _text(allow.IDENT)(value, where)
    if text.startswith(allow.RESERVED):
        raise _bad(where, f"{_shown(text)} is reserved")
    return text


def _key(kind: str) -> Check:
    """Return a check for "disk0": the number in each key is the item's place in its list."""

    def check(value: Any, where: str) -> str:
        number = where.rpartition("[")[2].partition("]")[0]
        if value != f"{kind}{number}":
            raise _bad(where, f"{_shown(value)} is not {kind}{number}")
        return f"{kind}{number}"

    return check


def _device_props(value: Any, where: str) -> dict[str, str]:
    check = _table(allow.DEVICE_PROPS.__contains__, _text(allow.VALUE))
    props: dict[str, str] = check(value, where)
    if props.get("romfile"):
        raise _bad(where, "romfile names a file")
    if "id" in props:
        _ident(props["id"], f"{where}.id")
    return props


def _disk_props(value: Any, where: str) -> dict[str, str]:
    check = _table(allow.DISK_PROPS.__contains__, _text(allow.VALUE))
    props: dict[str, str] = check(value, where)
    if "format" in props:
        _one_of(allow.DISK_FORMATS)(props["format"], f"{where}.format")
    return props


def _nic_props(value: Any, where: str) -> dict[str, str]:
    check = _table(allow.NIC_PROPS.__contains__, _text(allow.VALUE))
    props: dict[str, str] = check(value, where)
    if "model" in props:
        _one_of(allow.NIC_MODELS)(props["model"], f"{where}.model")
    return props


_WORDS = _text(allow.VALUE)
_NO_TEXT = _text(_EMPTY)
_IDENT_OR_NONE = _either(_NO_TEXT, _ident)
_COUNT = _number(1, 4096)


def _simple(keys: frozenset[str], item: Check = _WORDS) -> Check:
    return _table(keys.__contains__, item)


_SCHEMA = _record(
    {
        "hypervisor": _one_of({"qemu"}),
        "name": _text(allow.NAME),
        "arch": _one_of(allow.ARCHES),
        "machine": _record({"type": _text(allow.MACHINE), "props": _simple(allow.MACHINE_PROPS)}),
        "accel": _record({"type": _one_of(allow.ACCELS), "props": _simple(allow.ACCEL_PROPS)}),
        "cpu": _either(
            _null,
            _record(
                {
                    "model": _text(allow.WORD),
                    "features": _list(_text(allow.CPU_FEATURE), _MAX_FEATURES),
                }
            ),
        ),
        "smp": _simple(allow.SMP_KEYS, _COUNT),
        "memory": _record(
            {"id": _text(allow.RAM_IDENT), "size_bytes": _number(PAGE_BYTES, _MAX_GUEST_BYTES)}
        ),
        "objects": _list(_record({"type": _one_of({"rng", "iothread"}), "id": _ident})),
        "devices": _list(_record({"driver": _one_of(allow.DRIVERS), "props": _device_props})),
        "disks": _list(
            _record(
                {
                    "key": _key("disk"),
                    "id": _IDENT_OR_NONE,
                    "if": _one_of(allow.DISK_INTERFACES),
                    "empty": _bool,
                    "props": _disk_props,
                    "size_bytes": _number(0, 1 << 62),
                }
            )
        ),
        "nets": _list(
            _record(
                {
                    "key": _key("net"),
                    "id": _IDENT_OR_NONE,
                    "kind": _one_of({"netdev", "nic"}),
                    "backend": _one_of(allow.NET_BACKENDS),
                    "props": _nic_props,
                }
            )
        ),
        "serials": _list(_record({"key": _key("serial"), "id": _IDENT_OR_NONE, "option": _bool})),
        "vga": _one_of(allow.VGAS),
        "rtc": _simple(allow.RTC_KEYS),
        "uuid": _either(_NO_TEXT, _text(allow.UUID)),
        "boot": _simple(allow.BOOT_KEYS),
        "smbios": _list(
            _record(
                {
                    "type": _number(0, 17),
                    "props": _simple(allow.SMBIOS_KEYS, _text(allow.SMBIOS_TEXT)),
                }
            )
        ),
        "globals": _table(allow.global_allowed, _WORDS),
        "kernel": _bool,
        "initrd": _bool,
        "bios": _bool,
        "append": _text(allow.APPEND),
        "flags": _list(_one_of(allow.FLAGS)),
        "action": _simple(allow.ACTION_KEYS),
        "watchdog_action": _WORDS,
    }
)


def validate(config: object) -> dict[str, Any]:
    """Return a checked copy of a stream's configuration.

    Raises IncompatibleError that names the first part that is not allowed.
    """
    out: dict[str, Any] = _SCHEMA(config, "config")
    if "cpus" not in out["smp"]:
        raise _bad("config.smp", "'cpus' is missing")
    if out["memory"]["size_bytes"] % PAGE_BYTES:
        raise _bad("config.memory.size_bytes", "not a whole number of pages")
    if out["cpu"] is not None and out["cpu"]["model"] == "help":
        raise _bad("config.cpu.model", "'help' is not allowed")
    known = {
        "disk": _ids(out["disks"]),
        "net": _ids(out["nets"]),
        "serial": _ids(out["serials"]),
        "rng": {o["id"] for o in out["objects"] if o["type"] == "rng"},
        "iothread": {o["id"] for o in out["objects"] if o["type"] == "iothread"},
    }
    check_references(out["devices"], known)
    _no_twins(out)
    return out


def _ids(items: list[dict[str, Any]]) -> set[str]:
    return {item["id"] for item in items if item["id"]}


def _no_twins(config: dict[str, Any]) -> None:
    """Raise IncompatibleError if two things of one kind have the same id, as QEMU would."""
    kinds = {
        "disks": [d["id"] for d in config["disks"]],
        "nets": [n["id"] for n in config["nets"]],
        "serials": [s["id"] for s in config["serials"]],
        "objects": [o["id"] for o in config["objects"]] + [config["memory"]["id"]],
        "devices": [d["props"].get("id", "") for d in config["devices"]],
    }
    for where, idents in kinds.items():
        given = [each for each in idents if each]
        for each in given:
            if given.count(each) > 1:
                raise _bad(f"config.{where}", f"the id {_shown(each)} is used twice")
