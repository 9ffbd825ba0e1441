"""The destination's resources for a guest: the operator's -o WORD=value, and -x KEY.

    disk0=PATH disk1=PATH    block devices and CD images, in slot order
    net0=TAP                 an interface; it is made if it does not exist
    com1=PATH                a character device, usually an nmdm(4)
    bootrom=PATH bootvars=PATH
    vnc=[ADDRESS:]PORT       where the framebuffer listens; or unix:PATH
    pci.0.3.0.path=PATH      the same as disk0=, by its key

-x KEY removes a key, or with a device's prefix a whole device, from the
stream's configuration: -x pci.0.30.0, -x lpc.com2.  If a configured device gets
no resource and is not removed, the guest is refused; nothing is guessed.

None of these values ever comes from a stream.  The verdict checks whether a
file exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.validate import check_keys
from bhystream.errors import IncompatibleError, UsageError

_WORD = re.compile(r"(disk|net)(?:0|[1-9][0-9]{0,2})|(com)[1-4]|(bootrom|bootvars|vnc)")
_PREFIXES = ("pci.", "lpc.", "domains.")
_HINT = "disk0= net0= com1= bootrom= bootvars= vnc= or a full key: pci.0.3.0.path="
_CHECKS = {
    "disk": (known.absolute_path, "an absolute path"),
    "net": (known.tap, "an interface's name"),
    "com": (known.absolute_path, "an absolute path"),
    "bootrom": (known.absolute_path, "an absolute path"),
    "bootvars": (known.absolute_path, "an absolute path"),
    "vnc": (known.address, "[ADDRESS:]PORT or unix:PATH"),
}


@dataclass(frozen=True)
class Resolved:
    """The wishes, applied to one guest.

    section: the CONFIG section without the keys that -x removes.  values:
    resource key -> value.  reasons: why the guest cannot be started with these
    resources, one line each.
    """

    section: Mapping[str, Any]
    values: Mapping[str, str]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Wishes:
    """The checked -o and -x options.

    values: the values of -o, by word or full key.  dropped: the keys of -x.
    """

    values: Mapping[str, str]
    dropped: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, str], dropped: Sequence[str] = ()) -> Wishes:
        """Check the words and the form of the values.  Raises UsageError, which names the word."""
        values = {}
        for word, value in given.items():
            found = _WORD.fullmatch(word)
            is_key = word.startswith(_PREFIXES) and known.KEY.fullmatch(word)
            if not found and not is_key:
                raise UsageError(f"-o {word}: no such word", hint=_HINT)
            if not known.VALUE.fullmatch(value):
                raise UsageError(f"-o {word}=: the value is empty, too long, or cannot be written")
            if found:
                clean, wanted = _CHECKS[next(filter(None, found.groups()))]
                if clean(value) is None:
                    raise UsageError(f"-o {word}={value}: say {wanted}")
            values[word] = value
        for key in dropped:
            is_part = key.partition(".")[0] == "pci" and known.where(f"{key}.device") is None
            is_part = is_part and known.rule_of(key, {}) is None
            if not known.KEY.fullmatch(key) or is_part:
                raise UsageError(f"-x {key}: no key and no device", hint="-x pci.0.30.0")
        return cls(values, tuple(dropped))

    def resolve(self, section: Mapping[str, Any], *, is_partial: bool = False) -> Resolved:
        """Apply these wishes to a guest.

        section: as validate() returned it.  is_partial: a resource that is not given now is
        no reason against the guest.
        """
        reasons: list[str] = []
        left = self._drop(section, reasons)
        values = self._lend(section, left, reasons)
        for word, key in left["resources"].items():
            if key not in values and not is_partial:
                reasons.append(f"{word}: no -o {word}= is given ({_describe(left, key)})")
        return Resolved(left, values, tuple(reasons))

    def _drop(self, section: Mapping[str, Any], reasons: list[str]) -> dict[str, Any]:
        keys, resources = dict(section["keys"]), dict(section["resources"])
        for wish in self.dropped:
            gone = [key for key in keys if _is_below(key, wish)]
            lent = [word for word, key in resources.items() if _is_below(key, wish)]
            if not gone and not lent:
                reasons.append(f"-x {wish}: the configuration has no such key")
                continue
            kept = {key: value for key, value in keys.items() if key not in gone}
            if not _can_be(kept, [resources[word] for word in lent]):
                reasons.append(f"-x {wish}: the guest cannot be without it")
                continue
            keys = kept
            for word in lent:
                del resources[word]
        left = {"name": section["name"], "keys": keys, "resources": resources}
        for field in {"disks", "nets"} & section.keys():
            left[field] = {word: it for word, it in section[field].items() if word in resources}
        return left

    def _lend(
        self, whole: Mapping[str, Any], left: Mapping[str, Any], reasons: list[str]
    ) -> dict[str, str]:
        """Return the values by key; add a reason for each value that fits no resource."""
        devices = known.pci_devices(left["keys"])
        lent = set(left["resources"].values())
        values: dict[str, str] = {}
        for word, value in self.values.items():
            key = left["resources"].get(word, word)
            rule = known.rule_of(key, devices)
            if rule is None or not (key in lent or rule.role == "host"):
                dropped = word in whole["resources"] or word in whole["resources"].values()
                why = "it is left out by -x" if dropped else "the guest has none"
                reasons.append(f"{word}: {why}; remove -o {word}=")
                continue
            clean = rule.clean(value)
            if clean is None:
                reasons.append(f"{known.told(word, value)} is not allowed for {key}")
            elif key in values:
                reasons.append(f"{key}: it is given twice")
            else:
                values[key] = clean
        return values


def missing(section: Mapping[str, Any]) -> list[str]:
    """Return the -o words that a section needs, each ready to paste: "disk0="."""
    return [f"{word}=" for word in section["resources"]]


def _is_below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _can_be(keys: Mapping[str, str], without: Sequence[str]) -> bool:
    """Say whether bhyve could start a guest with these keys and without these resources."""
    try:
        check_keys(keys)
    except IncompatibleError:
        return False
    disks = {f"{disk}.path" for disk in known.disks(keys, known.pci_devices(keys))}
    return not any(key in disks or key == "lpc.bootrom" for key in without)


def _describe(section: Mapping[str, Any], key: str) -> str:
    place = known.where(key)
    device = known.pci_devices(section["keys"]).get(place[0]) if place else None
    return f"{key}, {device}" if device else key
