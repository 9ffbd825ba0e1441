"""The check of a stream's CONFIG section, which is hostile until validate() has accepted it.

validate() takes whatever JSON the section contains and returns a new, completely
checked copy of the shape that config.split() makes; the original is not used
any more.  In the copy every key is on the allow-list of its device's type, every
value has the form in which it travels, and no value is a resource of a host: a
path, a tap, an address.  The section only names the resources, by the words for
which the operator gives values.  The facts about the source's disks and network
cards are numbers and truth values, each within its bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.defaults import domains, memory_bytes, topology
from bhystream.backend.bhyve.keys import Slot, shown, told
from bhystream.errors import IncompatibleError

_MAX_RESOURCES = 512
_FIELDS = ("name", "keys", "resources")
_FACTS = ("disks", "nets")  # made by backing.py; a section of an earlier version has none
_MAX_BYTES = (1 << 63) - 1
_MAX_SECTOR_BYTES = 1 << 20
_MAX_MTU = 65535
_BARE = ("cpus", "memory.size")
_REQUIRED = ("cpus", "sockets", "cores", "threads", "memory.size", "uuid")


def is_bare(section: Mapping[str, Any]) -> bool:
    """Say whether a section is one of snapshot files whose configuration was not known."""
    return isinstance(section["keys"], dict) and section["keys"].keys() == set(_BARE)


def validate(section: object, *, may_be_bare: bool = False) -> dict[str, Any]:
    """Return a clean copy of a CONFIG section.

    may_be_bare: accept a section from which no guest can be built, see is_bare().
    Raises IncompatibleError, which names the field or key.
    """
    table = _table(section, "the section", len(_FIELDS) + len(_FACTS))
    for field in table:
        if field not in (*_FIELDS, *_FACTS):
            raise _bad(f"unknown field {shown(field)}")
    for field in _FIELDS:
        if field not in table:
            raise _bad(f"'{field}' is missing")
    name = table["name"]
    if not isinstance(name, str) or not known.NAME.fullmatch(name):
        raise _bad(f"name: {shown(name)} is not allowed")
    keys = _strings(table["keys"], "keys", known.MAX_KEYS)
    clean = check_keys(keys, is_complete=not (may_be_bare and is_bare(table)))
    devices = known.pci_devices(clean)
    resources = _resources(_strings(table["resources"], "resources", _MAX_RESOURCES), devices)
    _words(clean, devices, resources)
    whole = {"name": name, "keys": clean, "resources": resources}
    for field in _FACTS:
        if field in table:
            whole[field] = _facts(table[field], field, resources)
    return whole


def _facts(value: object, field: str, resources: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts about the source's disks or cards, all of each.  field: "disks" or "nets".

    Raises IncompatibleError if a fact is missing or out of its bounds.
    """
    is_fact: dict[str, Callable[[object], bool]] = {
        "mediasize": lambda it: _is_count(it, 0, _MAX_BYTES),
        "sectorsize": lambda it: _is_count(it, 1, _MAX_SECTOR_BYTES),
        "candelete": lambda it: type(it) is bool,
        "writable": lambda it: type(it) is bool,
    }
    if field == "nets":
        is_fact = {"mtu": lambda it: _is_count(it, 1, _MAX_MTU)}
    out: dict[str, Any] = {}
    for word, facts in _table(value, field, _MAX_RESOURCES).items():
        if word not in resources or not word.startswith(field[:-1]):
            raise _bad(f"{field}: {shown(word)} is none of its resources")
        table = _table(facts, f"{field}: {word}", len(is_fact))
        for key, fits in is_fact.items():
            if key not in table or not fits(table[key]):
                raise _bad(f"{field}: {word}: {key} is {shown(table.get(key))}")
        out[word] = {key: table[key] for key in is_fact}
    return out


def _is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _bad(why: str) -> IncompatibleError:
    return IncompatibleError(f"the stream's configuration: {why}")


def _table(value: object, what: str, limit: int) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{what} is not an object")
    if len(value) > limit:
        raise _bad(f"{what} has more than {limit} entries")
    return value


def _strings(value: object, what: str, limit: int) -> dict[str, str]:
    out = {}
    for key, each in _table(value, what, limit).items():
        if not isinstance(key, str) or not known.KEY.fullmatch(key):
            raise _bad(f"{what}: {shown(key)} is no key")
        if not isinstance(each, str) or not known.VALUE.fullmatch(each):
            raise _bad(f"{told(key, each)} is not allowed")
        out[key] = each
    return out


def check_keys(keys: Mapping[str, str], *, is_complete: bool = True) -> dict[str, str]:
    """Return the keys of a section, sorted, if all are allowed and none is missing.

    is_complete: False if keys may be missing.  Raises IncompatibleError, which
    names the key.
    """
    devices = known.pci_devices(keys)
    clean = {}
    for key, value in sorted(keys.items()):
        rule = known.rule_of(key, devices)
        if rule is None:
            raise _bad(f"key {key[:80]} is not known")
        if rule.role != "guest":
            raise _bad(f"{key} belongs to the host and cannot travel")
        if rule.clean(value) != value:
            raise _bad(f"{told(key, value)} is not allowed")
        clean[key] = value
    if "memory.size" in clean:
        memory_bytes(clean["memory.size"])
    if is_complete:
        _complete(clean, devices)
    known.shape_of(clean, devices)
    return clean


def _complete(keys: Mapping[str, str], devices: Mapping[Slot, str]) -> None:
    """Raise IncompatibleError if a section leaves anything to a default of this host."""
    wanted = [*_REQUIRED, *(f"{net}.mac" for net in known.nets(devices))]
    wanted += [f"{disk}.ser" for disk in known.disks(keys, devices) if f"{disk}.serial" not in keys]
    for key in wanted:
        if key not in keys:
            raise _bad(f"{key} is missing")
    topology(keys)
    for key, value in domains(keys).items():
        if keys.get(key) != value:
            raise _bad(f"{key}: {shown(keys.get(key))} is not {value}, as the domains have it")


def _resources(resources: dict[str, str], devices: Mapping[Slot, str]) -> dict[str, str]:
    for word, key in resources.items():
        rule = known.rule_of(key, devices)
        if rule is None or rule.role != "resource":
            raise _bad(f"resources: {word[:40]}: {shown(key)} is no resource")
    return resources


def _words(
    keys: Mapping[str, str], devices: Mapping[Slot, str], resources: Mapping[str, str]
) -> None:
    """Raise IncompatibleError unless the words are those that a source makes of these keys."""
    right = known.words(keys, devices, set(resources.values()))
    for word, key in right.items():
        if resources.get(word) != key:
            raise _bad(f"resources: {word} has to be {key}")
    for word in resources:
        if word not in right:
            raise _bad(f"resources: {word[:40]} belongs to nothing")
