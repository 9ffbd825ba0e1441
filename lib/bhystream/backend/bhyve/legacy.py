"""bhyve's -s and -l options in their own syntax, turned into bhyve_config(5) keys.

In bhyve each device emulation parses the text after its own name, and stores
the result as configuration keys; the functions here make the same keys.  An
alias ("ahci-hd") is stored under the name of the emulation that it stands for.

Source: freebsd/freebsd-src, usr.sbin/bhyve: pci_emul.c, pci_parse_slot() and
pci_parse_legacy_config(); block_if.c, blockif_legacy_config(); net_backends.c,
netbe_legacy_config(); pci_ahci.c, pci_xhci.c, pci_nvme.c, pci_virtio_console.c,
pci_virtio_9p.c, pci_passthru.c, pci_hostbridge.c; amd64/pci_lpc.c@031fb30f,
lpc_device_parse().  Read, not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from bhystream.backend.bhyve.keys import Slot, refuse, shown

Pairs = dict[str, str]

_PLACE = re.compile(r"(?:(?:([0-9]{1,3}):)?([0-9]{1,2}):([0-7])|([0-9]{1,2}))")
_AHCI_NEXT = re.compile(r",(?=(?:hd|cd):)")


def slot_option(text: str) -> tuple[Slot, Pairs]:
    """Parse a -s argument; return the slot, and the slot's keys, of which "device" is one.

    Raises IncompatibleError, which names the part that is not known.
    """
    place, comma, rest = text.partition(",")
    device, _, options = rest.partition(",")
    found = _PLACE.fullmatch(place)
    if not comma or not found:
        raise refuse(f"option -s {shown(text)}: say slot[:function],device[,options]")
    slot = Slot(int(found[1] or 0), int(found[2] or found[4]), int(found[3] or 0))
    if slot.bus > 255 or slot.slot > 31:
        raise refuse(f"option -s {shown(text)}: no such slot")
    handler = _DEVICES.get(device)
    if handler is None:
        raise refuse(f"option -s {shown(text)}: the device {shown(device)} is not known")
    return slot, handler(device, options, f"option -s {shown(text)}")


def lpc_option(text: str) -> Pairs:
    """Parse a -l argument; return whole keys.

    Raises IncompatibleError, which names the part that is not known.
    """
    device, _, rest = text.partition(",")
    what = f"option -l {shown(text)}"
    name = device.lower()
    if name == "bootrom":
        return _bootrom(rest, what)
    if name == "tpm":
        kind, _, rest = rest.partition(",")
        path, _, options = rest.partition(",")
        if not kind or not path:
            raise refuse(f"{what}: say tpm,type,path")
        pairs = {"type": kind, "path": path} | dict(_options(options, what))
        return {f"tpm.{key}": value for key, value in ({"version": "2.0"} | pairs).items()}
    if re.fullmatch(r"com[1-4]", name):
        if not rest:
            raise refuse(f"{what}: its path is missing")
        return {f"lpc.{name}.path": rest}
    if name == "pc-testdev":
        return {"lpc.pc-testdev": "true"}
    raise refuse(f"{what}: the device {shown(device)} is not known")


def _bootrom(rest: str, what: str) -> Pairs:
    """Parse ROM[,VARS][,key=value...]: the second word is VARS if it has no "="."""
    rom, _, rest = rest.partition(",")
    if not rom:
        raise refuse(f"{what}: its path is missing")
    pairs = {"lpc.bootrom": rom}
    first, _, behind = rest.partition(",")
    if first and "=" not in first:
        pairs["lpc.bootvars"] = first
        rest = behind
    return pairs | {f"lpc.{key}": value for key, value in _options(rest, what)}


def _options(text: str, what: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs of "key=value,switch,..."; a switch has the value "true"."""
    for option in text.split(",") if text else ():
        key, equals, value = option.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", key) or (equals and not value):
            raise refuse(f"{what}: {shown(option)} is no option")
        yield key, value if equals else "true"


def _plain(device: str, text: str, what: str) -> Pairs:
    return {"device": device} | dict(_options(text, what))


def _led_by(key: str) -> Callable[[str, str, str], Pairs]:
    """Return a parser for "VALUE,options": the first word is the value of the key."""

    def parse(device: str, text: str, what: str) -> Pairs:
        first, _, rest = text.partition(",")
        pairs = {"device": device}
        if first:
            pairs[key] = first
        return pairs | dict(_options(rest, what))

    return parse


def _block(device: str, text: str, what: str) -> Pairs:
    if not text or text.startswith(","):
        raise refuse(f"{what}: its path is missing")
    return _led_by("path")(device, text, what)


def _amd_hostbridge(device: str, text: str, what: str) -> Pairs:
    """Return the registers under both the old and the new keys; bhyve ignores those unknown."""
    registers = {"pcireg.vendor": "0x1022", "pcireg.device": "0x7432"}
    return {"device": "hostbridge", "vendor": "0x1022", "devid": "0x7432"} | registers


def _ahci(device: str, text: str, what: str) -> Pairs:
    """Parse hd:PATH[,options][,cd:PATH[,options]]...; ports are counted from 0."""
    pairs = {"device": "ahci"}
    for port, part in enumerate(_AHCI_NEXT.split(text) if text else ()):
        kind, colon, rest = part.partition(":")
        if kind not in ("hd", "cd") or not colon:
            raise refuse(f"{what}: {shown(part)}: say hd:PATH or cd:PATH")
        pairs |= _ahci_port(port, kind, rest, what)
    return pairs


def _ahci_one(device: str, text: str, what: str) -> Pairs:
    return {"device": "ahci"} | _ahci_port(0, device.removeprefix("ahci-"), text, what)


def _ahci_port(port: int, kind: str, text: str, what: str) -> Pairs:
    pairs = _block("", text, what) | {"type": kind}
    del pairs["device"]
    return {f"port.{port}.{key}": value for key, value in pairs.items()}


def _xhci(device: str, text: str, what: str) -> Pairs:
    """Parse tablet[=option],...; USB slots are counted from 1."""
    pairs = {"device": device}
    for number, part in enumerate(text.split(",") if text else (), 1):
        name, _, option = part.partition("=")
        pairs[f"slot.{number}.device"] = name
        pairs |= {f"slot.{number}.{key}": value for key, value in _options(option, what)}
    return pairs


def _nvme(device: str, text: str, what: str) -> Pairs:
    is_ram = text.startswith("ram=")
    return _plain(device, text, what) if is_ram else _block(device, text, what)


def _console(device: str, text: str, what: str) -> Pairs:
    pairs = {"device": device}
    for port, (name, path) in enumerate(_options(text, what)):
        pairs |= {f"port.{port}.name": name, f"port.{port}.path": path}
    return pairs


def _share(device: str, text: str, what: str) -> Pairs:
    pairs = {"device": device}
    for key, value in _options(text, what):
        pairs |= {key: "true"} if value == "true" else {"sharename": key, "path": value}
    return pairs


def _passthru(device: str, text: str, what: str) -> Pairs:
    place, _, rest = text.partition(",")
    found = re.fullmatch(r"(?:pci0:|pci)?([0-9]+)[:/]([0-9]+)[:/]([0-9]+)", place)
    pairs = {"device": device}
    if place.startswith("ppt"):
        pairs["pptdev"] = place
    elif found:
        pairs |= {"bus": found[1], "slot": found[2], "func": found[3]}
    else:
        raise refuse(f"{what}: {shown(place)} is no device of the host")
    return pairs | dict(_options(rest, what))


_DEVICES: dict[str, Callable[[str, str, str], Pairs]] = {
    "hostbridge": _plain,
    "amd_hostbridge": _amd_hostbridge,
    "lpc": _plain,
    "virtio-blk": _block,
    "virtio-net": _led_by("backend"),
    "virtio-rnd": _plain,
    "e1000": _led_by("backend"),
    "ahci": _ahci,
    "ahci-hd": _ahci_one,
    "ahci-cd": _ahci_one,
    "xhci": _xhci,
    "fbuf": _plain,
    "nvme": _nvme,
    "virtio-console": _console,
    "virtio-9p": _share,
    "virtio-scsi": _led_by("dev"),
    "virtio-input": _led_by("path"),
    "hda": _plain,
    "uart": _led_by("path"),
    "passthru": _passthru,
}
