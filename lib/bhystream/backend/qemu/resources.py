"""What the destination lends a guest: the operator's -o key=value.

    mem=PATH        the memory file, or a directory for it  (default: /dev/shm)
    qmp=PATH        the QMP socket
    disk0=PATH      an image file, a block device, or a URL that QEMU knows
    net0=tap:IFNAME | user | none
    serial0=PATH | unix:PATH | null                          (default: null)
    kernel=PATH  initrd=PATH  bios=PATH
    template=FILE   the operator's own QEMU command line

Nothing here ever comes from a stream.  Scripts are never run: a tap device
has to exist.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bhystream.errors import UsageError

_KEY = re.compile(r"(disk|net|serial)(0|[1-9]\d{0,2})")
_PLAIN = ("mem", "qmp", "kernel", "initrd", "bios", "template")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_NET = re.compile(r"tap:[A-Za-z0-9._-]{1,15}|user|none")
_QCOW2_MAGIC = b"QFI\xfb"


@dataclass(frozen=True)
class Resources:
    """The checked -o keys.  Paths are absolute; text may hold anything but NUL."""

    values: Mapping[str, str]

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Resources:
        """Check keys and the shape of values.  Raises UsageError by name."""
        values = {}
        for key, value in given.items():
            kind = key if key in _PLAIN else (_KEY.fullmatch(key) or [""])[0].rstrip("0123456789")
            if not kind:
                raise UsageError(
                    f"-o {key}: no such key",
                    hint="mem= qmp= disk0= net0= serial0= kernel= initrd= bios= template=",
                )
            if not value or "\0" in value:
                raise UsageError(f"-o {key}=: a value is missing")
            if kind == "net" and not _NET.fullmatch(value):
                raise UsageError(f"-o {key}={value}: say tap:IFNAME, user or none")
            values[key] = _absolute(kind, value)
        return cls(values)

    def get(self, key: str) -> str | None:
        """Return the value of a key, or None."""
        return self.values.get(key)

    def template(self) -> list[str]:
        """Return the operator's command line, program first if it names one."""
        path = self.values["template"]
        try:
            with open(path, encoding="utf-8") as file:
                words = shlex.split(file.read(), comments=True)
        except OSError as error:
            raise UsageError(f"-o template={path}: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"-o template={path}: {error}") from None
        if not words:
            raise UsageError(f"-o template={path}: it is empty")
        return words

    def reasons(self, config: Mapping[str, Any]) -> list[str]:
        """Return why these resources do not fit the configuration, one line each."""
        out = []
        for disk in config["disks"]:
            if not disk["empty"]:
                out += self._disk(disk)
        for net in config["nets"]:
            out += self._net(net, config["devices"])
        for port in config["serials"]:
            out += self._serial(port["key"])
        for key in ("kernel", "initrd", "bios"):
            if config[key]:
                out += self._file(key)
        wanted = {item["key"] for t in ("disks", "nets", "serials") for item in config[t]}
        for key in self.values:
            if _KEY.fullmatch(key) and key not in wanted:
                out.append(f"{key}: the guest has none; remove -o {key}=")
            elif key in ("kernel", "initrd", "bios") and not config[key]:
                out.append(f"{key}: the guest was started without one; remove -o {key}=")
        return out

    def _file(self, key: str, mode: int = os.R_OK) -> list[str]:
        path = self.values.get(key)
        if path is None:
            return [f"{key}: missing; say -o {key}=PATH"]
        if not os.path.exists(path):
            return [f"{key}: {path} does not exist"]
        if not os.access(path, mode):
            return [f"{key}: {path}: permission denied"]
        return []

    def _disk(self, disk: Mapping[str, Any]) -> list[str]:
        key, path = disk["key"], self.values.get(disk["key"])
        if path is not None and _URL.match(path):
            return []  # QEMU's to open; it says so at start
        read_only = disk["props"].get("readonly") == "on" or disk["props"].get("media") == "cdrom"
        out = self._file(key, os.R_OK if read_only else os.R_OK | os.W_OK)
        if out or path is None:
            if disk["size_bytes"]:
                out = [f"{line} ({disk['size_bytes']} bytes)" for line in out]
            return out
        if "format" not in disk["props"]:
            return [f"{key}: the stream does not state its image format"]
        return self._image(disk, path)

    def _image(self, disk: Mapping[str, Any], path: str) -> list[str]:
        """Compare an image file with what the source had: kind, format, size."""
        key, wanted = disk["key"], disk["size_bytes"]
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return [f"{key}: {path} is not a file and not a block device"]
        with open(path, "rb", buffering=0) as file:
            is_qcow2 = file.read(4) == _QCOW2_MAGIC
            size_bytes = file.seek(0, os.SEEK_END)
        is_raw = disk["props"]["format"] == "raw"
        if is_raw == is_qcow2:
            here = "qcow2" if is_qcow2 else "raw"
            return [f"{key}: {path} is {here}, the source's is {disk['props']['format']}"]
        if is_raw and wanted and size_bytes != wanted:
            return [f"{key}: {path} has {size_bytes} bytes, the source's has {wanted}"]
        return []

    def _net(self, net: Mapping[str, Any], devices: list[dict[str, Any]]) -> list[str]:
        key, value = net["key"], self.values.get(net["key"])
        if value is None:
            return [f"{key}: missing; say -o {key}=tap:IFNAME, -o {key}=user or -o {key}=none"]
        if value.startswith("tap:") and not os.path.exists(f"/sys/class/net/{value[4:]}"):
            return [f"{key}: the interface {value[4:]} does not exist"]
        if net["backend"] == "tap" and not value.startswith("tap:"):
            cards = {
                d["driver"] for d in devices if net["id"] and d["props"].get("netdev") == net["id"]
            }
            cards |= {net["props"].get("model", "")}
            # A tap's packet headers are in the card's state, and another
            # backend has none: the load would fail with the memory moved.
            # Source: qemu/qemu hw/net/virtio-net.c, "requires vnet_hdr=on".
            if any(card.startswith("virtio") for card in cards):
                return [
                    f"{key}: the source's {min(cards - {''})} is on a tap; say -o {key}=tap:IFNAME"
                ]
        return []

    def _serial(self, key: str) -> list[str]:
        value = self.values.get(key, "null").removeprefix("unix:")
        if value != "null" and not os.access(os.path.dirname(value), os.W_OK):
            return [f"{key}: cannot write to {os.path.dirname(value)}"]
        return []


def _absolute(kind: str, value: str) -> str:
    """Make paths absolute: QEMU is started in another directory."""
    if kind == "net" or (kind == "serial" and value == "null"):
        return value
    if kind == "disk" and _URL.match(value):
        return value
    if kind == "serial" and value.startswith("unix:"):
        return "unix:" + os.path.abspath(value[5:])
    return os.path.abspath(value)
