"""Every bhyve_config(5) key that is known, by device type, and the role of each key.

    guest       travels in the CONFIG section: it describes the guest's hardware
    resource    stays; the destination's operator gives its value with -o
    host        stays, and nobody has to give it: gdb, CPU pinning, a VNC password

Both programs refuse a key that is not listed here, and name it.  bhyve itself
ignores keys that it does not know, so an unknown key may be anything from a
comment to a device that this list lacks, and a guest whose configuration is
not known could not be started again, at the source or at the destination.

Before you add a key, find out what bhyve does with a hostile value of that key.
A key that takes a path, an address or an interface never has the role "guest".

Source: usr.sbin/bhyve/bhyve_config.5 and every get_config_*() of usr.sbin/bhyve,
FreeBSD 15.1, read; for the devices that bhyve saves, the tables of its pci_*.c.
FreeBSD 16 was read in part: virtio.msix, monitor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from bhystream.backend.refusals import refusal
from bhystream.errors import IncompatibleError, Reason

Clean = Callable[[str], str | None]
"""Returns the value in the one form that travels, or None if the value is not allowed."""

# A name becomes a file name, so "." and ".." are excluded, and so is a "-" in front, which
# getopt(3) would take for an option.
NAME = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9._][A-Za-z0-9._-]{0,63}")
KEY = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,7}")
# A value that can stand in a configuration file.  "%" is excluded: it begins a reference, and
# bhyve's manual page and its code do not agree on how to escape one.
VALUE = re.compile(r"[^\x00-\x1f\x7f%]{1,1023}")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# Python's \d matches the digits of all scripts, and int() reads them; bhyve does not.
_PCI = re.compile(r"pci\.(0|[1-9][0-9]{0,2})\.(0|[1-9][0-9]?)\.([0-7])(?:\.(.+))?")
_PORT = re.compile(r"port\.(0|[1-9][0-9]?)\.([a-z]+)")
_USB_SLOT = re.compile(r"slot\.[1-8]\.device")
_COM = re.compile(r"lpc\.com[1-4]\.path")
_CPUSET = re.compile(r"vcpu\.[0-9]{1,5}\.cpuset")
# Source: sys/dev/vmm/vmm_mem.h, VM_MAXMEMDOM; bhyverun.c, bhyve_numa_parse().
DOMAIN = re.compile(r"domains\.([0-7])\.(size|cpus|domain_policy)")
MAX_KEYS = 1024  # of a configuration
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}")
_REGISTER = re.compile(r"(?:0[xX])?[0-9a-fA-F]{1,4}")
_TRUE = {"true", "on", "yes", "1"}
_FALSE = {"false", "off", "no", "0"}
_AHCI_PORTS = 32
_SECRET = re.compile(r"(password)(.+)", re.IGNORECASE | re.DOTALL)
_SECRET_KEY = re.compile(r"password", re.IGNORECASE)
_TAP = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_VNC = re.compile(r"(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}:|\[[0-9A-Fa-f:.]{2,45}\]:)?[0-9]{1,5}")
_VNC_SOCKET = re.compile(r"unix:(/.{1,102})")  # sun_path has 104 bytes with its NUL

BACKENDS = ("tap", "vmnet", "ngd", "netgraph", "slirp")
"""Backends of network cards, by the prefix of their names; a guest cannot tell them apart.

Each of these backends offers no offload to the guest (get_cap() is 0), so a
card that was saved with one backend can be restored with another.  netmap and
vale offer offloads, which are part of the card's saved state.
Source: usr.sbin/bhyve/net_backends.c, netbe_init(); net_backend_*.c, FreeBSD 15.1, read.
"""


class Rule(NamedTuple):
    """What becomes of a key.

    role: "guest", "resource" or "host".  clean: the check of the key's value.
    """

    role: str
    clean: Clean


class Slot(NamedTuple):
    """Where a PCI device sits: bus 0 to 255, slot 0 to 31, function 0 to 7."""

    bus: int
    slot: int
    func: int

    def __str__(self) -> str:
        return f"pci.{self.bus}.{self.slot}.{self.func}"


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


def boolean(value: str) -> str | None:
    """Return "true" or "false".  Source: bhyve_config(5), VARIABLE VALUES."""
    word = value.lower()
    return "true" if word in _TRUE else "false" if word in _FALSE else None


def strtol(digits: str) -> int | None:
    """Return a number as strtol(3) with base 0 reads it, or None if strtol(3) stops early.

    digits: hexadecimal digits behind 0x, or decimal digits.
    """
    if digits[:2].lower() == "0x":
        return int(digits, 16)
    if digits.startswith("0") and digits != "0":
        return None if set(digits) - set("01234567") else int(digits, 8)
    return int(digits)


def number(low: int, high: int) -> Clean:
    """Return a Clean for numbers from low to high, read as strtol(3) does and made decimal."""

    def clean(value: str) -> str | None:
        found = strtol(value) if _NUMBER.fullmatch(value) else None
        return None if found is None or not low <= found <= high else str(found)

    return clean


def text(pattern: str) -> Clean:
    """Return a Clean for values that match a pattern; letters keep their case."""
    return lambda value: value if re.fullmatch(pattern, value) else None


def one_of(*words: str) -> Clean:
    """Return a Clean that allows these words only."""
    return lambda value: value if value in words else None


def _lower(pattern: re.Pattern[str]) -> Clean:
    return lambda value: value.lower() if pattern.fullmatch(value.lower()) else None


def mac(value: str) -> str | None:
    """Return a unicast MAC address in lower case, two digits per octet, or None.

    Source: usr.sbin/bhyve/net_utils.c, net_parsemac(), FreeBSD 15.1.
    """
    found = re.fullmatch(r"([0-9a-f]{1,2})(:[0-9a-f]{1,2}){5}", value.lower())
    octets = [int(part, 16) for part in value.split(":")] if found else []
    if not any(octets) or octets[0] & 1:
        return None
    return ":".join(f"{octet:02x}" for octet in octets)


def absolute_path(value: str) -> str | None:
    """Return a path if it begins with a slash, else None."""
    return value if value.startswith("/") else None


def tap(value: str) -> str | None:
    """Return a network interface's name, or None if no interface can have it."""
    return value if _TAP.fullmatch(value) and value not in (".", "..") else None


def address(value: str) -> str | None:
    """Return [IP:]port or unix:/path, as fbuf's rfb key takes them, else None.

    Source: usr.sbin/bhyve/pci_fbuf.c, pci_fbuf_parse_config(), FreeBSD 15.1.
    """
    if _VNC_SOCKET.fullmatch(value):
        return value if len(os.fsencode(value)) < len("unix:") + 104 else None
    port = value.rpartition(":")[2]
    return value if _VNC.fullmatch(value) and 0 < int(port) < 65536 else None


def cpuset(value: str) -> str | None:
    """Return a list of CPUs like "0,2-3" in decimal, or None.

    Source: usr.sbin/bhyve/bhyverun.c, parse_cpuset(), FreeBSD 15.1.
    """
    parts = []
    for part in value.split(","):
        ends = [number(0, 65535)(end) for end in part.split("-")]
        known = [end for end in ends if end is not None]
        if len(known) < len(ends) or len(ends) > 2 or int(known[0]) > int(known[-1]):
            return None
        parts.append("-".join(known))
    return ",".join(parts)


def sectors(value: str) -> str | None:
    """Return a disk's sector sizes in bytes, one number or two with a slash between, or None."""
    parts = [number(1, 9_999_999)(part) for part in value.split("/")]
    known = [part for part in parts if part is not None]
    return "/".join(known) if len(known) == len(parts) <= 2 else None


def _hex16(value: str) -> str | None:
    """Return a PCI register's value with its digits unchanged, or None.

    The word "host" is not allowed: it means the value of the host's own device.
    """
    return value.replace("X", "x") if _REGISTER.fullmatch(value) else None


_anything = text(VALUE.pattern)
_serial = text(r"[A-Za-z0-9._:+ -]{1,40}")
_smbios = text(r"[A-Za-z0-9._:+()/, -]{1,64}")
_yes = Rule("guest", boolean)


def _no(value: str) -> str | None:
    """Return "false" for a false value, else None: the guest must not have the device."""
    return "false" if boolean(value) == "false" else None


_GLOBAL: dict[str, Rule] = {
    "cpus": Rule("guest", number(1, 65535)),
    "sockets": Rule("guest", number(1, 65535)),
    "cores": Rule("guest", number(1, 65535)),
    "threads": Rule("guest", number(1, 65535)),
    # In bytes: config.py converts whatever form bhyve was given.
    "memory.size": Rule("guest", number(1 << 20, 1 << 46)),
    "uuid": Rule("guest", _lower(UUID)),
    # The name of a file below /usr/share/bhyve/kbdlayout; a word cannot lead out of there.
    "keyboard.layout": Rule("guest", text(r"[A-Za-z0-9_]{1,32}")),
    "lpc.fwcfg": Rule("guest", one_of("bhyve", "qemu")),
    # No snapshot contains its memory, so config.py refuses a guest that has a pc-testdev.
    "lpc.pc-testdev": Rule("guest", _no),
    "gdb.address": Rule("host", _anything),
    "gdb.port": Rule("host", _anything),
    "gdb.wait": Rule("host", _anything),
    "lpc.bootrom": Rule("resource", absolute_path),
    "lpc.bootvars": Rule("resource", absolute_path),
}
_GLOBAL |= dict.fromkeys(
    _words(
        "acpi_tables acpi_tables_in_memory destroy_on_poweroff memory.wired memory.guest_in_core",
        "pci.enable_bars rtc.use_localtime virtio_msix x86.mptable x86.x2apic x86.strictio",
        "x86.strictmsr x86.verbosemsr x86.vmexit_on_hlt x86.vmexit_on_pause",
    ),
    _yes,
)
_GLOBAL |= {
    f"{table}.{field}": Rule("guest", _smbios)
    for table, fields in {
        "bios": "vendor version release_date",
        "system": "family_name manufacturer product_name serial_number sku version",
        "board": "manufacturer product_name version serial_number asset_tag location",
        "chassis": "manufacturer version serial_number asset_tag sku",
    }.items()
    for field in fields.split()
}
_DOMAIN_RULES = {
    # In bytes, like memory.size.
    "size": Rule("guest", number(4096, 1 << 46)),
    "cpus": Rule("guest", cpuset),
    # Says which memory of the host is used, and how.
    "domain_policy": Rule("host", _anything),
}
_REGISTERS = {
    f"pcireg.{name}": Rule("guest", _hex16)
    for name in ("vendor", "device", "revid", "subvendor", "subdevice")
}
_GLOBAL |= {f"lpc.{name}": rule for name, rule in _REGISTERS.items()}

_BLOCK: dict[str, Rule] = {
    "path": Rule("resource", absolute_path),
    "ser": Rule("guest", _serial),
    "sectorsize": Rule("guest", sectors),
    "bootindex": Rule("guest", number(0, 65535)),
} | dict.fromkeys(("nocache", "nodelete", "sync", "direct", "ro"), _yes)
_NET: dict[str, Rule] = {
    "backend": Rule("resource", tap),
    "type": Rule("host", one_of(*BACKENDS)),
    "mac": Rule("guest", mac),
    # netgraph has four keys, slirp two.
    # Source: usr.sbin/bhyve/net_backend_netgraph.c, usr.sbin/bhyve/slirp/slirp-helper.c.
} | dict.fromkeys(
    ("path", "peerhook", "socket", "hook", "hostfwd", "open"), Rule("host", _anything)
)
_AHCI_PORT = _BLOCK | {
    "type": Rule("guest", one_of("hd", "cd")),
    "nmrr": Rule("guest", number(0, 65535)),
    "rev": Rule("guest", _serial),
    "model": Rule("guest", _serial),
}

SAVED: dict[str, dict[str, Rule]] = {
    # An older bhyve knows vendor and devid, a newer one pcireg.
    "hostbridge": _REGISTERS | {"vendor": Rule("guest", _hex16), "devid": Rule("guest", _hex16)},
    "lpc": _REGISTERS | {"fwcfg": Rule("guest", one_of("bhyve", "qemu"))},
    "virtio-blk": _BLOCK | {"serial": Rule("guest", _serial)},
    "virtio-net": _NET | {"mtu": Rule("guest", number(64, 65535))},
    "virtio-rnd": {},
    "e1000": _NET,
    "ahci": {},
    "xhci": {},
    "fbuf": {
        "rfb": Rule("resource", address),
        "w": Rule("guest", number(0, 65535)),
        "h": Rule("guest", number(0, 65535)),
        "vga": Rule("guest", one_of("io", "on", "off")),
        # With "wait", a restored guest would stand still until a VNC viewer connects.
        "wait": Rule("host", boolean),
        "password": Rule("host", _anything),
    },
}
"""The devices that bhyve's snapshot contains, each with its keys besides "device"."""

UNSAVED = _words("nvme passthru virtio-console virtio-9p virtio-scsi virtio-input hda uart")
"""Devices without a save function: a single one makes the whole checkpoint fail (ENOTSUP)."""


def where(key: str) -> tuple[Slot, str] | None:
    """Split a key into its PCI slot and the rest; return None if the key has no slot."""
    found = _PCI.fullmatch(key)
    if not found:
        return None
    slot = Slot(int(found[1]), int(found[2]), int(found[3]))
    if slot.bus > 255 or slot.slot > 31 or not found[4]:
        return None
    return slot, found[4]


def pci_devices(keys: Mapping[str, str]) -> dict[Slot, str]:
    """Return the device of each slot, in slot order."""
    found = {}
    for key, value in keys.items():
        place = where(key)
        if place and place[1] == "device":
            found[place[0]] = value
    return dict(sorted(found.items()))


def rule_of(key: str, devices: Mapping[Slot, str]) -> Rule | None:
    """Return what becomes of a key, or None if the key is not known.

    devices: from pci_devices(); a device's keys depend on its type.
    """
    if key in _GLOBAL:
        return _GLOBAL[key]
    if _COM.fullmatch(key):
        return Rule("resource", absolute_path)
    if _CPUSET.fullmatch(key):
        return Rule("host", _anything)
    if domain := DOMAIN.fullmatch(key):
        return _DOMAIN_RULES[domain[2]]
    place = where(key)
    if place is None or place[0] not in devices:
        return None
    device, rest = devices[place[0]], place[1]
    if rest == "device":
        return Rule("guest", one_of(*SAVED))
    if device == "ahci":
        port = _PORT.fullmatch(rest)
        return _AHCI_PORT.get(port[2]) if port and int(port[1]) < _AHCI_PORTS else None
    if device == "xhci":
        return Rule("guest", one_of("tablet")) if _USB_SLOT.fullmatch(rest) else None
    return SAVED.get(device, {}).get(rest)


def is_domain_size(key: str) -> bool:
    """Say whether a key is the size of a memory domain."""
    found = DOMAIN.fullmatch(key)
    return found is not None and found[2] == "size"


def disks(keys: Mapping[str, str], devices: Mapping[Slot, str]) -> Iterator[str]:
    """Yield the key of each block device, without ".path", in slot and port order."""
    for slot, device in devices.items():
        if device == "virtio-blk":
            yield str(slot)
        elif device == "ahci":
            for port in range(_AHCI_PORTS):
                if f"{slot}.port.{port}.type" in keys:
                    yield f"{slot}.port.{port}"


def nets(devices: Mapping[Slot, str]) -> list[str]:
    """Return the key of each network card, without ".backend", in slot order."""
    return [str(slot) for slot, device in devices.items() if device in ("virtio-net", "e1000")]


def words(
    keys: Mapping[str, str], devices: Mapping[Slot, str], present: frozenset[str] | set[str]
) -> dict[str, str]:
    """Return the -o words of the resources: {"disk0": "pci.0.3.0.path", ...}.

    present: the resource keys that the guest has.  The disks and the
    framebuffer's address are resources even if they are not in present.
    """
    out = {f"disk{at}": f"{disk}.path" for at, disk in enumerate(disks(keys, devices))}
    backends = [f"{net}.backend" for net in nets(devices) if f"{net}.backend" in present]
    out |= {f"net{at}": key for at, key in enumerate(backends)}
    out |= {f"com{n}": f"lpc.com{n}.path" for n in range(1, 5) if f"lpc.com{n}.path" in present}
    out |= {w: f"lpc.{w}" for w in ("bootrom", "bootvars") if f"lpc.{w}" in present}
    screens = [slot for slot, device in devices.items() if device == "fbuf"]
    if screens:
        out["vnc"] = f"{screens[0]}.rfb"
    return out


def shape_of(keys: Mapping[str, str], devices: Mapping[Slot, str]) -> None:
    """Check a configuration for what bhyve would not start, or would start as something else.

    Raises IncompatibleError, which names the key or the slot.
    """
    for device in ("lpc", "fbuf"):
        slots = [slot for slot, kind in devices.items() if kind == device]
        if len(slots) > 1:
            raise refuse(f"{slots[1]}: a second {device}", f"correct {slots[1]}.device")
    for key in keys:
        place = where(key)
        if place and devices.get(place[0]) == "ahci" and place[1].startswith("port."):
            kind = f"{key.rpartition('.')[0]}.type"
            if kind not in keys:
                raise refuse(f"{kind} is missing", f"add {kind}=hd, or {kind}=cd")


def refuse(what: str, cure: str = "", *about: str) -> IncompatibleError:
    """Return the error for a configuration that cannot travel.  about: as in Reason."""
    return refusal(Reason(f"configuration: {what}", cure, *about))


def shown(value: object) -> str:
    """Return possibly hostile text in a form fit for a message: ASCII, quoted, short.

    The text after the word "password" is left out.
    """
    quoted = ascii(_SECRET.sub(r"\1...", value) if isinstance(value, str) else value)
    return quoted if len(quoted) <= 80 else quoted[:77] + "..."


def told(key: str, value: object) -> str:
    """Return a key and its value for a message; only the key if the value is a password."""
    return f"{key}: its value" if _SECRET_KEY.search(key) else f"{key}: {shown(value)}"


def unknown(key: str) -> IncompatibleError:
    """Return the error for a key that is on no list."""
    plain = key if KEY.fullmatch(key) and len(key) <= 80 else shown(key)
    return refuse(
        f"key {plain} is not known",
        f"delete its line if bhyve_config(5) has no {plain}, or start it without {plain}",
        plain,
    )
