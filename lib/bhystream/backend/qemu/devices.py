"""The parts of a configuration that name a resource of the host.

A drive, a net or a serial port has two halves: what the guest sees, which
travels, and what the host lends the guest, which stays.  Instead of the lent
half a key travels (disk0, net0, serial0), and the destination's operator gives
the key a value with -o.
"""

from __future__ import annotations

from typing import Any

from bhystream.backend.files import identity_of
from bhystream.backend.qemu import allow, cures
from bhystream.backend.qemu.cures import ident, refuse, refuse_part, word
from bhystream.backend.qemu.facts import CURE, Facts
from bhystream.backend.qemu.graph import DESCRIPTORS, Drive, Medium, local_path
from bhystream.backend.qemu.options import (
    as_dict,
    is_on,
    json_address,
    parse_number,
    parse_size,
    split_keyval,
)
from bhystream.backend.refusals import Refusals
from bhystream.errors import IncompatibleError

_ALIASES = {"ahci": "ich9-ahci", "e1000-82540em": "e1000"} | {
    f"virtio-{kind}": f"virtio-{kind}-pci"
    for kind in ("blk", "net", "rng", "balloon", "scsi", "serial")
}
_MOVED = "restart QEMU with a command line that names its disks as they are now"
_NODE_PROPS = {"discard", "detect-zeroes", "cache.direct", "cache.no-flush"}
_NODE_HOST_PROPS = {"filename", "aio", "locking", "auto-read-only"}
_PROTOCOLS = {"file", "host_device"}


def driver_of(name: str) -> str:
    """Return the type name of a driver, whose name may be an alias."""
    return _ALIASES.get(name, name)


class Parts:
    """The -drive, -device and similar options of a command line, which finish() joins.

    All methods raise IncompatibleError if an option cannot travel.
    """

    def __init__(self, facts: Facts, against: Refusals) -> None:
        """against: gets an error for each property, disk and device that cannot travel."""
        self._facts = facts
        self._against = against
        self._drives: list[dict[str, str]] = []
        self._nodes: dict[str, dict[str, str]] = {}
        self._netdevs: dict[str, str] = {}
        self._nics: list[dict[str, Any]] = []
        self._chardevs: set[str] = set()
        self._serials: list[str] = []
        self._objects: dict[str, str] = {}
        self._devices: list[dict[str, Any]] = []
        # How the images in QEMU's drives differ from its command line's, one line each.
        self.changes: list[str] = []
        # The path of the image in each disk, in the order of the disks; "" if there is none.
        self.images: list[str] = []
        self.ram: dict[str, Any] | None = None

    def device(self, text: str) -> None:
        """Add a -device, whose driver and properties must all be on the lists."""
        props = as_dict(split_keyval(text, "driver"), "-device") | json_address(text)
        driver = driver_of(props.pop("driver", ""))
        if driver not in allow.DRIVERS:
            raise refuse(f"device {driver[:60]}", cures.device(driver))
        for key, value in props.items():
            what, where = f"device {driver}: property {key[:60]}", f"-device {driver}"
            with self._against.collecting():
                if key not in allow.DEVICE_PROPS:
                    raise refuse_part(what, key, where)
                if key == "romfile" and value:
                    cure = cures.part(key, where)
                    raise IncompatibleError(f"{what} cannot travel: it names a file", cure)
                word(value, what)
        self._devices.append({"driver": driver, "props": props})

    def object(self, text: str) -> None:
        """Add an -object: the RAM, a source of random numbers, or an I/O thread."""
        pairs = as_dict(split_keyval(text, "qom-type"), "-object")
        kind, name = pairs.get("qom-type", ""), pairs.get("id", "")
        if kind in ("memory-backend-file", "memory-backend-memfd"):
            self._memory(pairs, name)
        elif kind in ("rng-random", "rng-builtin"):
            self._objects[ident(name, "-object")] = "rng"
        elif kind == "iothread":
            self._objects[ident(name, "-object")] = "iothread"
        elif kind.startswith("memory-backend"):
            raise IncompatibleError(f"object {kind}: its memory is not shared", hint=CURE)
        else:
            raise refuse(f"object {kind[:60]}", cures.option(f"object {kind}"))

    def _memory(self, pairs: dict[str, str], name: str) -> None:
        if self.ram is not None:
            raise IncompatibleError(f"object {name}: a second memory backend", hint=CURE)
        # memory-backend-memfd is shared by default; memory-backend-file is not.
        default = "on" if pairs["qom-type"].endswith("memfd") else "off"
        if not is_on(pairs.get("share", default), "share"):
            raise IncompatibleError(f"memory backend {name} is not share=on", hint=CURE)
        if not allow.RAM_IDENT.fullmatch(name):
            raise IncompatibleError(f"memory backend: the id '{name[:60]}' cannot travel", CURE)
        self.ram = {"id": name, "size_bytes": parse_size(pairs.get("size", ""), 1)}

    def drive(self, text: str, **preset: str) -> None:
        """Add a -drive; with `preset` add a -hda, -cdrom or -pflash, of which text is the file."""
        pairs = preset | {"file": text} if preset else as_dict(split_keyval(text), "-drive")
        if "read-only" in pairs:
            pairs["readonly"] = pairs.pop("read-only")
        if "readonly" in pairs:
            pairs["readonly"] = "on" if is_on(pairs["readonly"], "readonly") else "off"
        if "driver" in pairs:
            pairs.setdefault("format", pairs.pop("driver"))
        interface = pairs.get("if", "ide")
        if interface not in allow.DISK_INTERFACES:
            raise refuse(f"drive interface {interface[:60]}", cures.drive_interface())
        driver = pairs.get("file.driver", "file")
        if driver not in _PROTOCOLS:
            raise refuse(f"drive protocol {driver[:60]}", cures.block_driver(driver))
        for key, value in pairs.items():
            what = f"drive property {key[:60]}"
            with self._against.collecting():
                if key in allow.DISK_HOST_PROPS or key in ("if", "id"):
                    continue
                if key in allow.DISK_OFF_PROPS and not is_on(value, what):
                    continue
                if key not in allow.DISK_PROPS:
                    raise refuse_part(what, key, "-drive")
                word(value, what)
        self._drives.append(pairs | {"if": interface})

    def blockdev(self, text: str) -> None:
        """Add a -blockdev: an image format over a file, in one node or in two."""
        pairs = as_dict(split_keyval(text, "driver"), "-blockdev")
        driver = pairs.get("driver", "")
        if driver not in allow.DISK_FORMATS | _PROTOCOLS:
            raise refuse(f"blockdev driver {driver[:60]}", cures.block_driver(driver))
        for key, value in pairs.items():
            what = f"blockdev property {key[:60]}"
            with self._against.collecting():
                if key in {"driver", "node-name", "read-only", "file"} | _NODE_PROPS:
                    word(value, what)
                elif not key.startswith("file.") and key not in _NODE_HOST_PROPS:
                    raise refuse_part(what, key, "-blockdev")
        below = pairs.get("file.driver", "file")
        if below not in _PROTOCOLS:
            raise refuse(f"blockdev driver {below[:60]}", cures.block_driver(below))
        self._nodes[ident(pairs.get("node-name", ""), "-blockdev")] = pairs

    def netdev(self, text: str) -> None:
        """Add a -netdev: its id and type travel, its other properties stay here."""
        pairs = as_dict(split_keyval(text, "type"), "-netdev")
        kind = pairs.get("type", "")
        if kind not in allow.NET_BACKENDS:
            raise refuse(f"netdev {kind[:60]}", cures.one_of("-netdev", allow.NET_BACKENDS))
        if pairs.get("queues", "1") != "1":
            raise refuse_part("netdev property queues", "queues", "-netdev")
        self._netdevs[ident(pairs.get("id", ""), "-netdev")] = kind

    def nic(self, text: str) -> None:
        """Add a -nic: a net and its card in one option."""
        pairs = as_dict(split_keyval(text, "type"), "-nic")
        kind = pairs.get("type", "")
        if kind == "none":
            return
        if kind not in allow.NET_BACKENDS:
            raise refuse(f"nic {kind[:60]}", cures.one_of("-nic", allow.NET_BACKENDS))
        props = {key: word(pairs[key], f"nic {key}") for key in allow.NIC_PROPS & pairs.keys()}
        if props.get("model", "e1000") not in allow.NIC_MODELS:
            cure = cures.one_of("-nic model", allow.NIC_MODELS)
            raise refuse(f"nic model {props['model']}", cure)
        name = ident(pairs["id"], "-nic") if "id" in pairs else ""
        self._nics.append({"id": name, "kind": "nic", "backend": kind, "props": props})

    def chardev(self, text: str) -> None:
        """Add a -chardev: only its id matters, and only if a device names that id."""
        self._chardevs.add(as_dict(split_keyval(text, "backend"), "-chardev").get("id", ""))

    def serial(self, text: str) -> None:
        """Add a -serial: the guest sees a port, whatever the host connects to the port."""
        if text != "none":
            self._serials.append(text.removeprefix("chardev:") if ":" in text else "")

    def finish(self) -> dict[str, Any]:
        """Return the config's devices, disks, nets, serials, objects and memory."""
        if self.ram is None:
            raise IncompatibleError("the guest's memory is not a shared backend", hint=CURE)
        serials = self._finish_serials()
        disks = self._finish_disks()
        used = self._used("netdev")
        nets: list[dict[str, Any]] = [
            {"id": name, "kind": "netdev", "backend": kind, "props": {}}
            for name, kind in self._netdevs.items()
            if name in used
        ]
        nets += self._nics
        known = {
            "disk": {d["id"] for d in disks},
            "net": {n["id"] for n in nets},
            "serial": {s["id"] for s in serials},
            "rng": {n for n, kind in self._objects.items() if kind == "rng"},
            "iothread": {n for n, kind in self._objects.items() if kind == "iothread"},
        }
        # What a disk that cannot travel leaves without a target says nothing new.
        self._against.require_none()
        check_references(self._devices, known)
        return {
            "memory": self.ram,
            "objects": [{"type": kind, "id": name} for name, kind in self._objects.items()],
            "devices": self._devices,
            "disks": [{"key": f"disk{n}"} | disk for n, disk in enumerate(disks)],
            "nets": [{"key": f"net{n}"} | net for n, net in enumerate(nets)],
            "serials": [{"key": f"serial{n}"} | port for n, port in enumerate(serials)],
        }

    def _used(self, prop: str) -> dict[str, None]:
        """Return the ids that devices name in their property `prop`, in order."""
        return {d["props"][prop]: None for d in self._devices if prop in d["props"]}

    def _finish_serials(self) -> list[dict[str, Any]]:
        ports = [{"id": s if s in self._chardevs else "", "option": True} for s in self._serials]
        for name in self._used("chardev"):
            if name in self._chardevs and not any(p["id"] == name for p in ports):
                ports.append({"id": ident(name, "-chardev"), "option": False})
        return ports

    def _finish_disks(self) -> list[dict[str, Any]]:
        used = self._used("drive")
        disks = []
        taken: dict[str, set[int]] = {}
        for pairs in self._drives:
            interface, name = pairs["if"], pairs.get("id", "")
            labels = [name] if name else self._labels(pairs, taken.setdefault(interface, set()))
            if interface == "none" and name not in used:
                continue
            props = {k: v for k, v in pairs.items() if k in allow.DISK_PROPS}
            file = pairs.get("file", pairs.get("file.filename", ""))
            disk = {
                "id": ident(name, "-drive") if name else "",
                "if": interface,
                "empty": not file,
                "size_bytes": 0,
                "props": props,
            }
            with self._against.collecting():
                disks.append(self._present(disk, file, self._drive_of(labels)))
        for name in used:
            if name in self._nodes:
                with self._against.collecting():
                    disks.append(self._node(name))
        return disks

    def _labels(self, pairs: dict[str, str], taken: set[int]) -> list[str]:
        """Return the names that QEMU may give a drive without an id.

        taken: the numbers of the interface's drives so far; gets this drive's.
        Source: qemu/qemu blockdev.c, drive_new().
        """
        interface = pairs["if"]
        # pc has two drives on each of its buses, q35 has one.
        each = 2 if interface == "ide" and "q35" not in self._facts.machine else 1
        if "bus" in pairs or "unit" in pairs:
            number = _number(pairs, "bus") * each + _number(pairs, "unit")
        else:
            number = _number(pairs, "index")
            while number in taken:
                number += 1
        taken.add(number)
        if interface == "ide":
            bus, unit = divmod(number, each)
            return [f"ide{bus}-hd{unit}", f"ide{bus}-cd{unit}"]
        return [f"{interface}{number}"]

    def _drive_of(self, labels: list[str]) -> Drive | None:
        """Return QEMU's drive of a -drive; None if QEMU was not asked.

        QEMU drops the drive a moment after the drive's device is unplugged; in
        between, the drive is in no device.
        """
        if self._facts.drives is None:
            return None
        found = next((each for each in self._facts.drives if each.label in labels), None)
        device = self._device_of(labels[0])
        if found is None or (device and found.device != device):
            raise IncompatibleError(f"disk {labels[0]} is not there any more", hint=_MOVED)
        return found

    def _device_of(self, name: str) -> str:
        """Return the id of the device that uses a drive, "" if there is no device or no id."""
        props = (device["props"] for device in self._devices)
        return next((str(each.get("id", "")) for each in props if each.get("drive") == name), "")

    def _present(self, disk: dict[str, Any], file: str, drive: Drive | None) -> dict[str, Any]:
        """Describe a disk by the image that is in its drive now.

        file: the image that the command line names.  Notes in `changes` how the
        two images differ.
        """
        props = dict(disk["props"])
        self.images.append(self._image(drive))
        if drive is None:
            if props.get("format", "raw") not in allow.DISK_FORMATS:
                raise refuse(f"disk format {props['format'][:60]}", cures.FORMATS)
            return disk
        what = f"disk {disk['id'] or drive.label}"
        medium = drive.medium
        if medium is None:
            if not drive.is_removable:
                raise IncompatibleError(f"{what} is not there any more", hint=_MOVED)
            props.pop("format", None)
            return disk | {"empty": True, "props": props}
        if medium.format not in allow.DISK_FORMATS:
            cure = f"end the job that uses this format as a filter, or {cures.FORMATS}"
            raise refuse(f"{what}: its format {medium.format[:60]}", cure)
        if not drive.is_removable:
            self.changes += self._changes(what, file, props.get("format"), medium)
        props["format"] = medium.format
        is_read_only = is_on(props.get("readonly", "off"), "readonly")
        if props.get("media") != "cdrom" and is_read_only != medium.is_read_only:
            props["readonly"] = "on" if medium.is_read_only else "off"
        return disk | {"empty": False, "size_bytes": medium.size_bytes, "props": props}

    def _image(self, drive: Drive | None) -> str:
        """Return the path, as QEMU sees it, of the image in a disk; "" if there is none."""
        medium = drive.medium if drive else None
        if medium is None or not medium.is_there:
            return ""
        path = local_path(medium.file, self._facts.directory)
        return "" if path is None or path.startswith(DESCRIPTORS) else path

    def _changes(self, what: str, file: str, wanted: str | None, medium: Medium) -> list[str]:
        """Say how the image in a drive differs from the one that the command line names.

        file, wanted: the command line's image and format.
        """
        then = local_path(file, self._facts.directory)
        now = local_path(medium.file, self._facts.directory)
        if then != now and (then is None or now is None or identity_of(then) != identity_of(now)):
            return [
                f"{what}: QEMU writes to {now or 'a network image'}, but its command line names"
                f" {then or 'a network image'}"
            ]
        if not medium.is_there:
            return [f"{what}: {now} is no longer the file that QEMU has open"]
        if wanted not in (None, medium.format):
            return [f"{what}: its format is {medium.format}, but QEMU's command line has {wanted}"]
        return []

    def _node(self, name: str) -> dict[str, Any]:
        pairs = self._nodes[name]
        driver = pairs["driver"]
        below = pairs.get("file")
        if below is not None and below not in self._nodes:
            raise IncompatibleError(
                f"blockdev {name}: its file '{below[:60]}' is not there",
                "start QEMU with a -blockdev for the file",
            )
        props = {key: pairs[key] for key in sorted(_NODE_PROPS & pairs.keys())}
        props["format"] = "raw" if driver in _PROTOCOLS else driver
        if is_on(pairs.get("read-only", "off"), "read-only"):
            props["readonly"] = "on"
        file = pairs.get("filename", pairs.get("file.filename", ""))
        if below is not None:
            file = self._nodes[below].get("filename", "")
        disk = {"id": name, "if": "none", "empty": False, "size_bytes": 0, "props": props}
        return self._present(disk, file, self._drive_of_node(name))

    def _drive_of_node(self, name: str) -> Drive | None:
        """Return the drive that holds a -blockdev's node, or held it at the start.

        The drive is found by the node or, if the drive now holds another node or
        none, by the device.
        """
        if self._facts.drives is None:
            return None
        nameless = [each for each in self._facts.drives if not each.label]
        for each in nameless:
            if each.medium is not None and each.medium.node == name:
                return each
        device = self._device_of(name)
        others = [each for each in nameless if each.device == device and not self._has_own(each)]
        if len(others) != 1:
            raise IncompatibleError(
                f"disk {name}: cannot tell which image is in its drive now",
                hint="give each device of QEMU's command line an id",
            )
        return others[0]

    def _has_own(self, drive: Drive) -> bool:
        """Say whether a drive still holds a node that a device of the command line names."""
        return drive.medium is not None and drive.medium.node in self._used("drive")


def _number(pairs: dict[str, str], key: str) -> int:
    return parse_number(pairs.get(key, "0"), f"drive property {key}")


def check_references(devices: list[dict[str, Any]], known: dict[str, set[str]]) -> None:
    """Raise IncompatibleError if a device names a drive, a net, ... that is not described.

    known: the described ids, by kind (allow.REFERENCES).
    """
    for device in devices:
        for prop, kind in allow.REFERENCES.items():
            value = device["props"].get(prop)
            if value is not None and value not in known[kind]:
                raise IncompatibleError(
                    f"device {device['driver']}: {prop}={value} is not described"
                )
