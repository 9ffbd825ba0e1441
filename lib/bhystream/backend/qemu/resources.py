"""What the destination lends a guest: the operator's -o key=value.

    mem=PATH        the memory file, or a directory for it  (default: /dev/shm)
    qmp=PATH        the QMP socket
    disk0=PATH      an image file or a block device
    disk0=NAME      what QEMU opens by a protocol: nbd:HOST:PORT, rbd:POOL/IMAGE, https://...
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bhystream.backend.files import Lent, identity_of
from bhystream.backend.qemu import image
from bhystream.backend.qemu.graph import LOCAL, raw_disks
from bhystream.backend.qemu.options import escape, protocol_of, told
from bhystream.errors import UsageError

_KEY = re.compile(r"(disk|net|serial)(0|[1-9][0-9]{0,2})")
_PLAIN = ("mem", "qmp", "kernel", "initrd", "bios", "template")
_BOOT = ("kernel", "initrd", "bios")
_NET = re.compile(r"tap:[A-Za-z0-9._-]{1,15}|user|none")
_SECTOR_BYTES = 512
# QEMU's protocols that name no disk, but a directory or no storage at all.
_NO_DISKS = ("fat", "vvfat", "null-co", "null-aio")
_NBD_SOCKET = re.compile(r"(nbd:unix:)([^:]+)(.*)", re.DOTALL)
_URL_SOCKET = re.compile(r"[^?]*\?(?:.*&)?socket=([^&]*)")


@dataclass(frozen=True)
class Resources:
    """The checked -o keys.  Paths are absolute; values may hold any character but NUL.

    below: the directories in which disks have to lie, () for any.
    """

    values: Mapping[str, str]
    below: Sequence[str] = ()

    @classmethod
    def parse(cls, given: Mapping[str, str], below: Sequence[str] = ()) -> Resources:
        """Check the keys and the form of the values.  Raises UsageError that names the key."""
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
            values[key] = _absolute(key, kind, value)
        return cls(values, below)

    def get(self, key: str) -> str | None:
        """Return the value of a key, or None."""
        return self.values.get(key)

    def secrets(self) -> dict[str, str]:
        """Return the texts that messages must not show, each with the text to show instead."""
        names = [value for key, value in self.values.items() if key.startswith("disk")]
        return {
            text: told(name)
            for name in names
            if not name.startswith("/")
            for text in (escape(name), name)
        }

    def template(self) -> list[str]:
        """Return the words of the template: the program first, if the template names one.

        Raises UsageError if the template cannot be read.
        """
        path = self.values["template"]
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
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
        for key in _BOOT:
            if config[key]:
                out += self._file(key)
        return out + self._unwanted(config) + self._twice(config)

    def raw_disks(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return the paths given for a guest's raw disks but CDs, by their keys."""
        paths = {key: self.values.get(key, "") for key in raw_disks(config)}
        return {key: path for key, path in paths.items() if path.startswith("/")}

    def _unwanted(self, config: Mapping[str, Any]) -> list[str]:
        """Return a reason for each key that the guest has no use for."""
        wanted = _wanted(config)
        empty = {disk["key"] for disk in config["disks"] if disk["empty"]}
        out = []
        for key in self.values:
            if key in empty:
                out.append(f"{key}: the drive is empty at the source; remove -o {key}=")
            elif _KEY.fullmatch(key) and key not in wanted:
                out.append(f"{key}: the guest has none; remove -o {key}=")
            elif key in _BOOT and key not in wanted:
                out.append(f"{key}: the guest was started without one; remove -o {key}=")
        return out

    def _twice(self, config: Mapping[str, Any]) -> list[str]:
        """Return a reason for each file that is lent twice, by whatever path, and written to."""
        read_only = {disk["key"] for disk in config["disks"] if _is_read_only(disk)}
        lent, out = Lent(), []
        for key in sorted((_wanted(config) | {"mem", "qmp"}) & self.values.keys()):
            value = self.values[key]
            text = value.removeprefix("unix:")
            if value in ("user", "none", "null") or (key == "mem" and os.path.isdir(text)):
                continue
            what = identity_of(text) if text.startswith("/") else text
            is_written = key not in _BOOT and key not in read_only
            if before := lent.again(key, [what], is_written=is_written):
                shown = value if key.startswith("net") else told(value)
                out.append(f"{key}: {shown}: it is lent as {before} too")
        return out

    def _file(self, key: str, mode: int = os.R_OK, *, is_disk: bool = False) -> list[str]:
        path = self.values.get(key)
        if path is None:
            return [f"{key}: missing; say -o {key}=PATH"]
        try:
            kind = os.stat(path).st_mode
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            return [f"{key}: {path} does not exist" if gone else f"{key}: {path}: {error.strerror}"]
        if not (stat.S_ISREG(kind) or (is_disk and stat.S_ISBLK(kind))):
            return [f"{key}: {path} is not a file" + (" and not a block device" * is_disk)]
        if not os.access(path, mode):
            return [f"{key}: {path}: permission denied"]
        return []

    def _disk(self, disk: Mapping[str, Any]) -> list[str]:
        key, path = disk["key"], self.values.get(disk["key"])
        if path is not None and self.below and (why := image.place_fault(path, self.below)):
            return [f"{key}: {told(path)}: {why}"]
        if path is not None and not path.startswith("/"):
            return []  # QEMU opens it; verdict.disk_differences() then compares the disk
        mode = os.R_OK if _is_read_only(disk) else os.R_OK | os.W_OK
        out = self._file(key, mode, is_disk=True)
        if out or path is None:
            if disk["size_bytes"]:
                out = [f"{line} ({disk['size_bytes']} bytes)" for line in out]
            return out
        if "format" not in disk["props"]:
            return [f"{key}: the stream does not state its image format"]
        return self._image(disk, path)

    def _image(self, disk: Mapping[str, Any], path: str) -> list[str]:
        """Compare an image file's format and size, as the guest sees it, with the source's."""
        key, wanted = disk["key"], disk["size_bytes"]
        with open(path, "rb", buffering=0) as file:
            header = file.read(image.HEADER_BYTES)
            size_bytes = -(-file.seek(0, os.SEEK_END) // _SECTOR_BYTES) * _SECTOR_BYTES
        is_qcow2 = image.is_qcow2(header)
        if (disk["props"]["format"] == "raw") == is_qcow2:
            here = "qcow2" if is_qcow2 else "raw"
            return [f"{key}: {path} is {here}, the source's is {disk['props']['format']}"]
        if is_qcow2:
            if self.below and (why := image.leads_on(path, header)):
                return [f"{key}: {path}: {why}"]
            size_bytes = image.size_bytes(header)
            below = image.backing_file(path, header)
            if below and not os.path.exists(below):
                return [f"{key}: {path}: its backing file {below} does not exist"]
        if wanted and size_bytes != wanted:
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
            # The card's state says that its tap has packet headers; another backend
            # has none, and the load would fail, after all memory has moved.
            # Source: qemu/qemu hw/net/virtio-net.c, "requires vnet_hdr=on".
            if any(card.startswith("virtio") for card in cards):
                return [
                    f"{key}: the source's {min(cards - {''})} is on a tap; say -o {key}=tap:IFNAME"
                ]
        return []

    def _serial(self, key: str) -> list[str]:
        value = self.values.get(key, "null")
        if value == "null":
            return []
        path = value.removeprefix("unix:")
        try:
            kind = os.stat(path).st_mode
        except FileNotFoundError:
            if os.access(os.path.dirname(path), os.W_OK):
                return []
            return [f"{key}: cannot write to {os.path.dirname(path)}"]
        except OSError as error:
            return [f"{key}: {path}: {error.strerror}"]
        # QEMU removes any file at the path that it is to listen on.
        if value != path and not stat.S_ISSOCK(kind):
            return [f"{key}: {path} exists and is not a socket"]
        if value == path and not (stat.S_ISREG(kind) or stat.S_ISCHR(kind)):
            return [f"{key}: {path} is not a file and not a terminal"]
        return []


def _wanted(config: Mapping[str, Any]) -> set[str]:
    """Return the keys of the things that a guest has."""
    wanted = {item["key"] for t in ("disks", "nets", "serials") for item in config[t]}
    return wanted | {key for key in _BOOT if config[key]}


def _is_read_only(disk: Mapping[str, Any]) -> bool:
    props: Mapping[str, str] = disk["props"]
    return props.get("readonly") == "on" or props.get("media") == "cdrom"


def _absolute(key: str, kind: str, value: str) -> str:
    """Make paths absolute, because QEMU is started in another directory."""
    if kind == "net" or (kind == "serial" and value == "null"):
        return value
    if kind == "disk":
        return _absolute_disk(key, value)
    if kind == "serial" and value.startswith("unix:"):
        return "unix:" + os.path.abspath(value[5:])
    return os.path.abspath(value)


def _absolute_disk(key: str, value: str) -> str:
    """Make a disk's path absolute, or the path of a socket in a name with a protocol.

    Raises UsageError if the name is no disk's, or its socket's path cannot be made absolute.
    """
    protocol = protocol_of(value)
    if protocol in LOCAL:
        return os.path.abspath(value[len(protocol) + 1 :])
    if not protocol or os.path.lexists(value):
        return os.path.abspath(value)
    if protocol in _NO_DISKS:
        raise UsageError(f"-o {key}={protocol}:...: that is no disk of a guest")
    if nbd := _NBD_SOCKET.fullmatch(value):
        return nbd[1] + os.path.abspath(nbd[2]) + nbd[3]
    url = _URL_SOCKET.match(value)
    if url and not url[1].startswith(("/", "%2f", "%2F")):
        raise UsageError(f"-o {key}={told(value)}: the path of its socket is not absolute")
    return value
