"""The argv of a QEMU, reduced to the CONFIG section of a stream.

Three kinds of options:

    topology        travels: machine, CPU, devices, firmware switches
    host resource   stays; a key or a bare "yes" travels in its place (devices.py)
    irrelevant      dropped: monitors, logging, how the process runs

Any other option is refused by name, here, before anything is sent: a guest
that is not fully described would load at the destination as a subtly different
machine, because QEMU itself compares little (a state loads without complaint
into a machine with another -cpu or an extra device).  For the same reason a
QEMU without -nodefaults is refused: such a QEMU has devices that no option names.

The result holds no path of the source host.  The one text that may hold a
slash is `append`, the guest kernel's own command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from bhystream.backend.qemu import allow, cures
from bhystream.backend.qemu.cures import refuse, refuse_part, word
from bhystream.backend.qemu.devices import Parts
from bhystream.backend.qemu.facts import CURE, Facts
from bhystream.backend.qemu.options import (
    as_dict,
    option_of,
    parse_number,
    parse_size,
    split_keyval,
)
from bhystream.backend.refusals import Refusals
from bhystream.errors import IncompatibleError, Reason

OTHER_IMAGE = (
    "if a snapshot or a mirror made the new image, commit it, or restart QEMU with it; or use -f,"
    " and lend the guest the new image at the destination"
)
# QEMU rounds the memory's size up to this.  Source: qemu/qemu hw/core/machine.c, softmmu/vl.c.
_RAM_ALIGN_BYTES = 8192
_SHORT_DISKS = {"hda": "0", "hdb": "1", "hdc": "2", "hdd": "3"}
_FILES = ("kernel", "initrd", "bios")
_SWITCHES = ("nodefaults", "enable-kvm")


def reduce_argv(
    argv: list[str],
    facts: Facts,
    name: str = "",
    changes: list[str] | None = None,
    images: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return the configuration that an argv (without the program) describes.

    facts: what QMP adds; a default Facts() leaves aliases as they are.
    name: the guest's name if -name gives none.  changes: gets a line for each
    disk on which QEMU writes to another image than argv names; without this
    list, such a disk is refused.  images: gets the path, as QEMU sees it, of the
    image in each disk, by the disk's key.
    Raises IncompatibleError that names everything that cannot travel.
    """
    against = Refusals()
    reducer = _Reducer(facts, against)
    config = reducer.run(argv, name)
    if changes is None:
        against.extend(Reason(change, OTHER_IMAGE) for change in reducer.changes)
    else:
        changes += reducer.changes
    against.require_none()
    if images is not None:
        for disk, path in zip(config["disks"], reducer.images, strict=True):
            if path:
                images[disk["key"]] = path
    return config


def guest_name(argv: list[str]) -> str:
    """Return the name that -name gives the guest, "" if it gives none."""
    found = ""
    for option, after in pairwise(argv):
        if option in ("-name", "--name"):
            found = _name_of(after)
    return found


def _name_of(text: str) -> str:
    return as_dict(split_keyval(text, "guest"), "-name").get("guest", "")


def label(name: str) -> str:
    """Return a guest's name made of any text; "" if the text has no usable character.

    The name becomes a file name and an operand, so "-" replaces all characters
    that are unsafe in these.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:64].strip("-.")


class _Reducer:
    def __init__(self, facts: Facts, against: Refusals) -> None:
        self._facts = facts
        self._against = against
        self._parts = Parts(facts, against)
        self._machine: dict[str, str] = {}
        self._accels: list[tuple[str, dict[str, str]]] = []
        self._ram_size: int | None = None
        self._nodefaults = False
        self._out: dict[str, Any] = {
            "hypervisor": "qemu",
            "name": "",
            "arch": facts.arch,
            "cpu": None,
            "smp": {"cpus": 1},
            "vga": "none",
            "rtc": {},
            "uuid": "",
            "boot": {},
            "smbios": [],
            "globals": {},
            "kernel": False,
            "initrd": False,
            "bios": False,
            "append": "",
            "flags": [],
            "action": {},
            "watchdog_action": "",
        }
        parts = self._parts
        self._with_argument: dict[str, Callable[[str], None]] = {
            "machine": self._on_machine,
            "M": self._on_machine,
            "accel": self._on_accel,
            "cpu": self._on_cpu,
            "smp": self._on_smp,
            "m": self._on_m,
            "name": self._on_name,
            "vga": self._on_vga,
            "uuid": self._on_uuid,
            "boot": self._on_boot,
            "smbios": self._on_smbios,
            "global": self._on_global,
            "append": self._on_append,
            "rtc": lambda text: self._on_pairs("rtc", allow.RTC_KEYS, text),
            "action": lambda text: self._on_pairs("action", allow.ACTION_KEYS, text),
            "watchdog-action": self._on_watchdog,
            "parallel": lambda text: self._only_none("parallel", text),
            "net": lambda text: self._only_none("net", text),
            "device": parts.device,
            "object": parts.object,
            "drive": parts.drive,
            "blockdev": parts.blockdev,
            "netdev": parts.netdev,
            "nic": parts.nic,
            "chardev": parts.chardev,
            "serial": parts.serial,
            "pflash": lambda text: parts.drive(text, **{"if": "pflash", "format": "raw"}),
            "cdrom": lambda text: parts.drive(text, index="2", media="cdrom"),
        }

    def run(self, argv: list[str], name: str) -> dict[str, Any]:
        """Return the configuration.  Raises IncompatibleError for what is not collected."""
        rest = iter(argv)
        is_known = True
        for each in rest:
            if not is_known and not each.startswith("-"):
                is_known = True  # the argument of an option that is refused already
                continue
            with self._against.collecting():
                option = option_of(each)
                is_known = self._knows(option)
                self._take(option, rest)
        if not self._nodefaults:
            what = (
                "QEMU was started without -nodefaults: devices that it adds by itself are not"
                " described"
            )
            cure = "start QEMU with -nodefaults, and name each device"
            self._against.extend([Reason(what, cure)])
        # Without an option that is refused, more would only seem to be missing.
        self._against.require_none()
        out = self._out
        out |= self._parts.finish()
        self._finish_machine()
        out["name"] = label(out["name"]) or label(name) or "guest"
        if self._ram_size not in (None, out["memory"]["size_bytes"]):
            self._against.add(
                IncompatibleError(
                    "-m and the memory backend differ in size",
                    f"start QEMU with -m {out['memory']['size_bytes']}B",
                )
            )
        out["accel"] = self._finish_accel()
        out["flags"].sort()
        return out

    @property
    def images(self) -> list[str]:
        """Return the path of the image in each disk, "" if there is none."""
        return self._parts.images

    @property
    def changes(self) -> list[str]:
        return self._parts.changes

    def _knows(self, option: str) -> bool:
        """Say whether an option is on the lists."""
        known = (self._with_argument, allow.IGNORED, allow.FLAGS, _FILES, _SHORT_DISKS, _SWITCHES)
        return any(option in one for one in known)

    def _take(self, option: str, rest: Any) -> None:
        """Handle one option, taking its argument from `rest` if it has one."""
        if option in allow.FLAGS:
            if option not in self._out["flags"]:
                self._out["flags"].append(option)
        elif option == "nodefaults":
            self._nodefaults = True
        elif option == "enable-kvm":
            self._accels.append(("kvm", {}))
        elif option in allow.IGNORED and not allow.IGNORED[option]:
            return
        else:
            handler = self._handler(option)
            text = next(rest, None)
            if text is None:
                raise IncompatibleError(f"option -{option[:60]}: its argument is missing")
            handler(text)

    def _handler(self, option: str) -> Callable[[str], None]:
        if option in self._with_argument:
            return self._with_argument[option]
        if option in allow.IGNORED:
            return lambda text: None
        if option in _FILES:
            return lambda text: self._out.update({option: True})
        if option in _SHORT_DISKS:
            index = _SHORT_DISKS[option]
            return lambda text: self._parts.drive(text, index=index, media="disk")
        raise refuse(f"option -{option[:60]}", cures.option(option))

    def _on_pairs(self, what: str, keys: frozenset[str], text: str) -> None:
        for key, value in split_keyval(text):
            if key not in keys:
                raise refuse_part(f"option -{what}: {key[:60]}", key, f"-{what}")
            self._out[what][key] = word(value, f"option -{what}: {key}")

    def _only_none(self, option: str, text: str) -> None:
        if text != "none":
            raise refuse(f"option -{option}", cures.option(option))

    def _on_machine(self, text: str) -> None:
        # QEMU reads "_" as "-" here.  Source: qemu/qemu softmmu/vl.c, machine_parse_property_opt().
        pairs = [(key.replace("_", "-"), value) for key, value in split_keyval(text, "type")]
        given = as_dict(pairs, "-machine")
        for key in [key for key in given if key.partition(".")[0] in _IN_MACHINE]:
            option, _, part = key.partition(".")
            _IN_MACHINE[option](self, f"{part}={given.pop(key)}")
        self._machine |= given

    def _finish_machine(self) -> None:
        props = dict(self._machine)
        kind = self._facts.machine or props.get("type", "pc")
        kind = self._facts.aliases.get(kind, kind)
        if not allow.MACHINE.fullmatch(kind):
            raise refuse(f"machine {kind[:60]}", "start QEMU with -machine q35, pc or microvm")
        props.pop("type", None)
        for accel in reversed(props.pop("accel", "").split(":")):
            if accel:
                self._accels.insert(0, (accel, {}))
        if props.pop("memory-backend", "") != self._out["memory"]["id"]:
            raise IncompatibleError(
                f"memory backend {self._out['memory']['id']} is not the machine's memory", hint=CURE
            )
        for key, value in props.items():
            if key not in allow.MACHINE_PROPS:
                self._against.add(refuse_part(f"machine property {key[:60]}", key, "-machine"))
                continue
            word(value, f"machine property {key}")
        self._out["machine"] = {"type": kind, "props": props}

    def _on_accel(self, text: str) -> None:
        pairs = as_dict(split_keyval(text, "accel"), "-accel")
        kind = pairs.pop("accel", "")
        for key in list(pairs):
            if key in allow.ACCEL_HOST_PROPS:
                del pairs[key]
            elif key not in allow.ACCEL_PROPS:
                raise refuse_part(f"accelerator property {key[:60]}", key, "-accel")
            else:
                word(pairs[key], f"accelerator property {key}")
        self._accels.append((kind, pairs))

    def _finish_accel(self) -> dict[str, Any]:
        """Return the accelerator in use: what QMP says, else the first that argv asks for."""
        kind = self._facts.accel or (self._accels[0][0] if self._accels else "tcg")
        if kind not in allow.ACCELS:
            raise refuse(f"accelerator {kind[:60]}", cures.one_of("-accel", allow.ACCELS))
        props = next((props for name, props in self._accels if name == kind), {})
        return {"type": kind, "props": props}

    def _on_cpu(self, text: str) -> None:
        model, *features = text.split(",")
        if not allow.WORD.fullmatch(model) or model == "help":
            raise IncompatibleError(
                f"CPU model '{model[:60]}' cannot travel", "start QEMU with another model for -cpu"
            )
        for feature in features:
            if not allow.CPU_FEATURE.fullmatch(feature):
                what = f"CPU feature '{feature[:60]}' cannot travel"
                self._against.add(IncompatibleError(what, cures.part(feature, "-cpu")))
        self._out["cpu"] = {"model": model, "features": features}

    def _on_smp(self, text: str) -> None:
        counts: dict[str, int] = {}
        for key, value in as_dict(split_keyval(text, "cpus"), "-smp").items():
            if key not in allow.SMP_KEYS:
                raise refuse_part(f"option -smp: {key[:60]}", key, "-smp")
            counts[key] = parse_number(value, f"option -smp: {key}")
        if "cpus" not in counts:
            total = 1
            for key in allow.SMP_KEYS - {"cpus", "maxcpus"}:
                total *= counts.get(key, 1)
            counts["cpus"] = counts.get("maxcpus", total)
        self._out["smp"] = counts

    def _on_m(self, text: str) -> None:
        pairs = as_dict(split_keyval(text, "size"), "-m")
        size = parse_size(pairs.pop("size", "128M"), 1 << 20)
        self._ram_size = -(-size // _RAM_ALIGN_BYTES) * _RAM_ALIGN_BYTES
        # A maxmem no larger than the memory leaves no room to plug memory in.
        if "maxmem" in pairs and parse_size(pairs["maxmem"], 1) <= size:
            pairs = {key: pairs[key] for key in pairs.keys() - {"maxmem", "slots"}}
        if pairs:
            raise refuse_part(f"option -m: {min(pairs)[:60]}", " and ".join(sorted(pairs)), "-m")

    def _on_name(self, text: str) -> None:
        self._out["name"] = _name_of(text)

    def _on_vga(self, text: str) -> None:
        if text not in allow.VGAS:
            raise refuse(f"option -vga: {text[:60]}", cures.one_of("-vga", allow.VGAS))
        self._out["vga"] = text

    def _on_uuid(self, text: str) -> None:
        if not allow.UUID.fullmatch(text):
            raise refuse(f"option -uuid: {text[:60]}", cures.option("uuid"))
        self._out["uuid"] = text.lower()

    def _on_boot(self, text: str) -> None:
        for key, value in split_keyval(text, "order"):
            if key in allow.BOOT_HOST_KEYS:
                continue
            if key not in allow.BOOT_KEYS:
                raise refuse_part(f"option -boot: {key[:60]}", key, "-boot")
            self._out["boot"][key] = word(value, f"option -boot: {key}")

    def _on_smbios(self, text: str) -> None:
        pairs = as_dict(split_keyval(text), "-smbios")
        kind = parse_number(pairs.pop("type", ""), "option -smbios: type")
        if kind not in (0, 1, 2, 3, 4, 17):
            raise refuse(f"option -smbios: type={kind}", cures.option(f"smbios type={kind}"))
        for key, value in pairs.items():
            if key not in allow.SMBIOS_KEYS or not allow.SMBIOS_TEXT.fullmatch(value):
                what = f"option -smbios: {key[:60]}={value[:60]}"
                raise refuse_part(what, key, f"-smbios type={kind}")
        self._out["smbios"].append({"type": kind, "props": pairs})

    def _on_global(self, text: str) -> None:
        pairs = split_keyval(text)
        if len(pairs) == 1:
            key, value = pairs[0]
        else:
            long = as_dict(pairs, "-global")
            key = f"{long.get('driver', '')}.{long.get('property', '')}"
            value = long.get("value", "")
        if not allow.global_allowed(key):
            raise refuse(f"option -global: {key[:80]}", cures.option(f"global {key}"))
        self._out["globals"][key] = word(value, f"option -global: {key}")

    def _on_append(self, text: str) -> None:
        if not allow.APPEND.fullmatch(text):
            raise IncompatibleError(
                "option -append: its text is not all printable ASCII",
                "start QEMU with printable ASCII in -append",
            )
        self._out["append"] = text

    def _on_watchdog(self, text: str) -> None:
        self._out["watchdog_action"] = word(text, "option -watchdog-action")


# Options that may also be given as properties of the machine: "smp.cpus".
_IN_MACHINE = {"smp": _Reducer._on_smp, "boot": _Reducer._on_boot, "memory": _Reducer._on_m}
