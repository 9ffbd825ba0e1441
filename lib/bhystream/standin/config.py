"""The configuration of a guest: bhyve_config(5), from bhyve's command line.

-k FILE and -o key=value take effect in the order of the command line, and the
last value of a key wins; -s, -l and the flags are other ways to write keys.
Source: bhyve(8), bhyve_config(5).
"""

from __future__ import annotations

import getopt
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bhystream.errors import GuestError, UsageError

USAGE = (
    "usage: bhyve [-AaCDeHhPSuWwxY] [-c [[cpus=]n][,sockets=n][,cores=n][,threads=n]]\n"
    "             [-K layout] [-k config] [-l lpc] [-m memsize] [-o key=value] [-r snapshot]\n"
    "             [-s slot,emulation[,conf]] [-U uuid] [vmname]\n"
)
_FLAGS = {
    "-A": ("acpi_tables", "true"),
    "-a": ("x86.x2apic", "false"),
    "-C": ("memory.guest_in_core", "true"),
    "-D": ("destroy_on_poweroff", "true"),
    "-e": ("x86.strictio", "true"),
    "-H": ("x86.vmexit_on_hlt", "true"),
    "-P": ("x86.vmexit_on_pause", "true"),
    "-S": ("memory.wired", "true"),
    "-u": ("rtc.use_localtime", "false"),
    "-W": ("virtio_msix", "false"),
    "-w": ("x86.strictmsr", "false"),
    "-x": ("x86.x2apic", "true"),
    "-Y": ("x86.mptable", "false"),
}
_DEFAULT_MEMORY = "256M"
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_VARIABLE = re.compile(r"%\(([^)]*)\)")
BLOCK = frozenset({"virtio-blk", "ahci-hd", "ahci-cd", "nvme"})
NET = frozenset({"virtio-net", "e1000"})


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a text: digits and at most one of B, K, M, G, T.

    The units are powers of 1024.  Raises UsageError if the text is no size.
    """
    found = re.fullmatch(r"(\d+)([BKMGT]?)", text.strip().upper())
    if not found:
        raise UsageError(f"not a size: {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def parse_memory(text: str) -> int:
    """Return memory.size in bytes; a plain number below 1 MiB counts MiB.

    Raises UsageError if the size is not a positive multiple of a page (4096).
    Source: FreeBSD lib/libvmmapi/vmmapi.c, vm_parse_memsize().
    """
    size = parse_bytes(text)
    if text.strip().isdigit() and size < 1 << 20:
        size <<= 20
    if size == 0 or size % 4096:
        raise UsageError(f"invalid memsize {text!r}")
    return size


@dataclass
class Config:
    """A guest's configuration.

    keys: full names and values, in the order in which each key first appeared.
    snapshot: the FILE of -r.
    """

    keys: dict[str, str] = field(default_factory=dict)
    snapshot: Path | None = None

    @property
    def name(self) -> str:
        """The guest's name, "" if none was given."""
        return self.keys.get("name", "")

    def get(self, key: str, default: str = "") -> str:
        """Return a value with its %(variables) expanded."""
        value = self.keys.get(key, default)
        for _ in range(8):
            value, count = _VARIABLE.subn(lambda found: self.keys.get(found[1], ""), value)
            if not count:
                break
        return value

    def is_set(self, key: str) -> bool:
        """Return the value of a boolean key, False if the key is absent."""
        return self.get(key).lower() in ("true", "on", "yes", "1")

    def memsize_bytes(self) -> int:
        """Return memory.size in bytes.  Raises UsageError if the value is no memory size."""
        return parse_memory(self.get("memory.size", _DEFAULT_MEMORY))

    def topology(self) -> tuple[int, int, int]:
        """Return (sockets, cores, threads); cpus without sockets decides the sockets.

        Raises UsageError if a number is not positive, or if cpus is not the product.
        """
        sockets, cores, threads = (self._count(k) for k in ("sockets", "cores", "threads"))
        if "cpus" in self.keys and "sockets" not in self.keys:
            sockets = max(1, self._count("cpus") // (cores * threads))
        if "cpus" in self.keys and sockets * cores * threads != self._count("cpus"):
            raise UsageError("cpus is not sockets * cores * threads")
        return sockets, cores, threads

    def ncpus(self) -> int:
        """Return the number of vCPUs.  Raises UsageError as topology() does."""
        sockets, cores, threads = self.topology()
        return sockets * cores * threads

    def devices(self) -> list[tuple[str, str]]:
        """Return (emulation, "bus.slot.function") of each PCI device, ascending."""
        found = []
        for key in self.keys:
            words = key.split(".")
            if len(words) == 5 and words[0] == "pci" and words[4] == "device":
                bus, slot, function = (int(word) for word in words[1:4])
                found.append((bus, slot, function, self.get(key)))
        return [(kind, f"{b}.{s}.{f}") for b, s, f, kind in sorted(found)]

    def _count(self, key: str) -> int:
        text = self.get(key, "1")
        if not text.isdigit() or text == "0":
            raise UsageError(f"{key}: not a number of vCPUs: {text!r}")
        return int(text)


def parse(argv: Sequence[str]) -> Config:
    """Return the configuration that a command line describes.

    argv: without the program's name.  Raises UsageError if the command line is
    wrong or asks for help (-h), GuestError if a file cannot be read.
    """
    try:
        options, operands = getopt.getopt(list(argv), "AaCDeHhPSuWwxYc:K:k:l:m:o:r:s:U:")
    except getopt.GetoptError as error:
        raise UsageError(str(error), hint=USAGE) from error
    config = Config()
    for option, value in options:
        _take(config, option, value)
    if len(operands) > 1:
        raise UsageError("only one name may be given", hint=USAGE)
    if operands:
        config.keys["name"] = operands[0]
    return config


def _take(config: Config, option: str, value: str) -> None:
    keys = config.keys
    match option:
        case "-h":
            raise UsageError("", hint=USAGE)
        case "-k":
            _take_file(keys, Path(value))
        case "-r":
            config.snapshot = Path(value)
        case "-c" | "-l" | "-o" | "-s":
            {"-c": _take_cpus, "-l": _take_lpc, "-o": _take_pair, "-s": _take_slot}[option](
                keys, value
            )
        case "-K" | "-m" | "-U":
            keys[{"-K": "keyboard.layout", "-m": "memory.size", "-U": "uuid"}[option]] = value
        case _:
            key, word = _FLAGS[option]
            keys[key] = word


def _take_cpus(keys: dict[str, str], text: str) -> None:
    for word in text.split(","):
        key, equals, number = word.partition("=")
        keys[key if equals else "cpus"] = number if equals else word


def _take_pair(keys: dict[str, str], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"not key=value: {text!r}")
    keys[key.strip()] = value


def _take_file(keys: dict[str, str], path: Path) -> None:
    try:
        lines = path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise GuestError(f"cannot read {path}: {error}") from error
    for line in lines:
        text = line.partition("#")[0].strip()
        if text:
            _take_pair(keys, text)


def _take_lpc(keys: dict[str, str], text: str) -> None:
    what, _, rest = text.partition(",")
    if what == "bootrom":
        rom, comma, variables = rest.partition(",")
        keys["lpc.bootrom"] = rom
        if comma:
            keys["lpc.bootvars"] = variables
    elif what in ("com1", "com2", "com3", "com4"):
        keys[f"lpc.{what}.path"] = rest
    else:
        raise UsageError(f"invalid LPC device configuration: {text!r}")


def _take_slot(keys: dict[str, str], text: str) -> None:
    place, _, rest = text.partition(",")
    kind, _, conf = rest.partition(",")
    numbers = place.split(":")
    if not kind or len(numbers) > 3 or not all(number.isdigit() for number in numbers):
        raise UsageError(f"invalid PCI slot: {text!r}")
    bus, slot, function = {
        1: ["0", *numbers, "0"],
        2: ["0", *numbers],
        3: numbers,
    }[len(numbers)]
    prefix = f"pci.{int(bus)}.{int(slot)}.{int(function)}"
    keys[f"{prefix}.device"] = kind
    for index, word in enumerate(conf.split(",") if conf else ()):
        key, value = _slot_key(kind, word, index)
        keys[f"{prefix}.{key}"] = value


def _slot_key(kind: str, word: str, index: int) -> tuple[str, str]:
    """Return the key below the device, and the value, that one word of -s stands for."""
    port, colon, path = word.partition(":")
    if kind == "ahci" and colon and port in ("hd", "cd"):
        return f"port.{index}.path", path
    key, equals, value = word.partition("=")
    if equals:
        return key, value
    if index == 0 and kind in BLOCK:
        return "path", word
    if index == 0 and kind in NET:
        return "backend", word
    return word, "true"
