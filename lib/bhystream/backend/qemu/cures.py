"""The words of a command line that cannot travel, and what to start QEMU with in their place.

Only a device or an option of the same use is named: the guest needs a driver for it, and
finds a disk or a card under another name.  For everything else the cure is to start QEMU
without it.
"""

from __future__ import annotations

from collections.abc import Mapping

from bhystream.backend.qemu import allow
from bhystream.backend.qemu.graph import PROTOCOLS
from bhystream.errors import IncompatibleError

FORMATS = "convert the image to qcow2 or raw (qemu-img convert)"
_CARDS = "virtio-net-pci, or e1000"
_DISPLAYS = "VGA, or bochs-display"
_DEVICES: Mapping[str, str] = {
    "nvme": "virtio-blk-pci",
    **dict.fromkeys(
        ("e1000-82544gc", "e1000-82545em", "igb", "ne2k_pci", "pcnet", "tulip", "vmxnet3"), _CARDS
    ),
    **dict.fromkeys(
        ("lsi53c810", "lsi53c895a", "megasas", "megasas-gen2", "mptsas1068", "pvscsi"),
        "virtio-scsi-pci",
    ),
    **dict.fromkeys(
        ("ati-vga", "qxl", "qxl-vga", "virtio-gpu-pci", "virtio-vga", "vmware-svga"), _DISPLAYS
    ),
    "ioh3420": "pcie-root-port",
    "nec-usb-xhci": "qemu-xhci",
    "virtio-keyboard-pci": "usb-kbd",
    "virtio-mouse-pci": "usb-mouse",
    "virtio-tablet-pci": "usb-tablet",
}
_OPTIONS: Mapping[str, str] = {
    "net": "-netdev and -device",
    "usbdevice": "-usb and -device usb-tablet",
}


def device(driver: str) -> str:
    """Return the cure for a device that cannot travel.  driver: its name."""
    instead = _DEVICES.get(driver, "")
    if instead:
        return f"start QEMU with -device {instead}, in place of -device {driver}"
    return f"start QEMU without -device {driver[:60]}"


def option(name: str) -> str:
    """Return the cure for an option that cannot travel.  name: without its hyphen."""
    instead = _OPTIONS.get(name, "")
    if instead:
        return f"start QEMU with {instead}, in place of -{name}"
    return f"start QEMU without -{name[:60]}"


def part(name: str, where: str) -> str:
    """Return the cure for a part of an option.  name: a key.  where: "-device virtio-blk-pci"."""
    return f"start QEMU without {name[:60]} in {where}"


def one_of(option: str, words: frozenset[str]) -> str:
    """Return the cure for a value of which only some can travel."""
    return f"start QEMU with {option} {' or '.join(sorted(words))}"


def block_driver(driver: str) -> str:
    """Return the cure for a driver of -blockdev, or below a -drive: a protocol or a format."""
    if driver in PROTOCOLS:
        return f"start QEMU with -drive file={driver}:..., in place of the driver {driver}"
    return FORMATS


def drive_interface() -> str:
    """Return the cure for an interface of -drive."""
    return one_of("-drive", frozenset(f"if={word}" for word in allow.DISK_INTERFACES))


def refuse(what: str, cure: str) -> IncompatibleError:
    """Return the error for a word that is not on the lists.  what: as messages name the word."""
    return IncompatibleError(f"{what} cannot travel: bhysend does not know it", cure)


def refuse_part(what: str, name: str, where: str) -> IncompatibleError:
    """Return the error for a key of an option, as refuse().  where: the option."""
    return refuse(what, part(name, where))


def word(value: str, what: str) -> str:
    """Return the value if it is allowed.  Raises IncompatibleError that names `what` if not."""
    if not allow.VALUE.fullmatch(value):
        raise IncompatibleError(
            f"{what} cannot travel: '{value[:60]}'", "start QEMU with another value, or without it"
        )
    return value


def ident(value: str, what: str) -> str:
    """Return the value if it is an allowed id.  Raises IncompatibleError that names `what`."""
    if not allow.IDENT.fullmatch(value) or value.startswith(allow.RESERVED):
        raise IncompatibleError(
            f"{what}: the id '{value[:60]}' cannot travel",
            "start QEMU with an id of letters, digits, dots, hyphens and _, a letter first",
        )
    return value
