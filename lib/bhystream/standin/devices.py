"""The emulated devices, and their blobs.

Three kinds of device write guest memory by themselves, as DMA does:

* a device with a pause callback (virtio-net, virtio-blk, ahci): a thread counts
  ticks and fills a page with that count; the count in the blob and the page
  must agree after a restore;
* e1000, which has no pause callback: its thread goes on until the process ends,
  even after memory and blobs were saved.  Memory may be ahead of the blob, never
  behind the blob;
* the UART behind lpc: the UART counts the bytes that it was given, and the guest
  counts in memory the bytes that it sent.

The blobs of the other devices carry only the device's name and the clock.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bhystream.errors import GuestError

from .blob import number, pack_blob, unpack_blob
from .config import BLOCK, NET, Config
from .gate import Gate
from .kernel import StandinHost
from .node import Memory
from .proof import DEVICE_PAGE, UART_PAGE, page_bytes

# Source: FreeBSD usr.sbin/bhyve/pci_*.c, struct pci_devemu, pe_snapshot and pe_pause.
PAUSABLE = frozenset({"virtio-net", "virtio-blk", "ahci", "ahci-hd", "ahci-cd"})
UNSAVED = frozenset(
    {
        "nvme",
        "passthru",
        "virtio-console",
        "virtio-9p",
        "virtio-scsi",
        "virtio-input",
        "uart",
        "hda",
    }
)
PLAIN = frozenset({"hostbridge", "amd_hostbridge", "virtio-rnd", "lpc", "fbuf", "xhci"})
KNOWN = PAUSABLE | UNSAVED | PLAIN | {"e1000"}

_TICK_S = 0.01
_COUNTER = struct.Struct("<Q")


class Device:
    """A device whose blob carries only name and clock.

    name: bhyve's pi_name, such as "virtio-blk@pci.0.3.0".  constants: a blob
    with other constants cannot be restored.
    """

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.constants: Mapping[str, bool] = {}
        self._restored: dict[str, Any] | None = None

    @property
    def can_be_saved(self) -> bool:
        """Whether the device has a snapshot callback."""
        return self.kind not in UNSAVED

    def fields(self) -> dict[str, Any]:
        """Return the fields that the blob has beside name, clock and constants."""
        return {}

    def take(self, fields: dict[str, Any]) -> None:
        """Take over the fields of a blob."""

    def save(self, clock: int) -> bytes:
        """Return the device's blob.  clock: the guest's."""
        fields = {"constants": self.constants, **self.fields()}
        return pack_blob(self.name, self.kind, clock, fields)

    def load(self, blob: bytes) -> bool:
        """Take over a blob; return False if the blob's constants differ from the device's.

        complaints() later yields every other fault of the blob.  Source:
        usr.sbin/bhyve/virtio.c, vi_pci_snapshot_consts(), FreeBSD 15.1, read.
        """
        self._restored = unpack_blob(blob)
        self.take(self._restored)
        return not self.constants or self._restored.get("constants") == self.constants

    def complaints(self, clock: int) -> Iterator[str]:
        """Yield the faults of the loaded blob.  The guest's memory must have been restored."""
        if self._restored is None:
            return
        yield from blob_complaints(self.name, self._restored, clock)
        yield from self.memory_complaints()

    def memory_complaints(self) -> Iterator[str]:
        """Yield the contradictions between the blob and guest memory."""
        yield from ()

    def start(self) -> None:
        """Start the device's threads."""


def blob_complaints(name: str, fields: dict[str, Any], clock: int) -> Iterator[str]:
    """Yield the faults that a blob's own name and clock show."""
    if fields.get("name") != name:
        yield f"blob {name}: expected {name} found {fields.get('name', 'no name')}"
    if fields.get("clock") != clock:
        yield f"blob {name}: expected clock {clock} found {fields.get('clock', 'no clock')}"


class Ticker(Device):
    """A device that counts ticks and fills its page with the count.  gate: pauses its thread."""

    def __init__(self, name: str, kind: str, memory: Memory, page: int, gate: Gate) -> None:
        super().__init__(name, kind)
        self.ticks = 0
        self._memory = memory
        self._page = page
        self._gate = gate

    def fields(self) -> dict[str, Any]:
        return {"ticks": self.ticks}

    def take(self, fields: dict[str, Any]) -> None:
        self.ticks = number(fields, "ticks")

    def memory_complaints(self) -> Iterator[str]:
        found = self._memory.read(self._page)
        if found != self._written():
            counted = _COUNTER.unpack_from(found)[0]
            yield f"ticks of {self.name}: expected {counted} (memory) found {self.ticks} (blob)"

    def start(self) -> None:
        if self.ticks == 0:
            self._memory.write(self._page, self._written())
        self._gate.join(threading.Thread(target=self._run, name=self.name, daemon=True))

    def _written(self) -> bytes:
        whole = page_bytes(self._page, self.ticks)
        return _COUNTER.pack(self.ticks) + whole[_COUNTER.size :]

    def _run(self) -> None:
        self._gate.rest()
        while True:
            self.ticks += 1
            self._memory.write(self._page, self._written())
            self._gate.rest(_TICK_S)


class Unpaused(Device):
    """e1000: a device without pause callback, whose thread writes until the process ends.

    The blob is as new as the moment at which bhyve saves the blob, which is after
    bhyve saved the memory.  So a memory image taken before that is too old.
    """

    def __init__(self, name: str, kind: str, memory: Memory, page: int) -> None:
        super().__init__(name, kind)
        self.received = 0
        self._memory = memory
        self._page = page
        self._lock = threading.Lock()

    def fields(self) -> dict[str, Any]:
        self._receive()
        return {"received": self.received}

    def take(self, fields: dict[str, Any]) -> None:
        self.received = number(fields, "received")

    def memory_complaints(self) -> Iterator[str]:
        found = _COUNTER.unpack_from(self._memory.read(self._page))[0]
        if found < self.received:
            yield f"memory of {self.name}: expected at least {self.received} found {found}"
        self.received = max(found, self.received)

    def start(self) -> None:
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def _receive(self) -> None:
        with self._lock:
            self.received += 1
            self._memory.write(self._page, _COUNTER.pack(self.received))

    def _run(self) -> None:
        while True:
            time.sleep(_TICK_S / 4)
            self._receive()


class Uart(Device):
    """lpc with the UART of com1, which appends each line to its file at once."""

    def __init__(self, name: str, kind: str, memory: Memory, path: str) -> None:
        """path: lpc.com1.path, "" for no file.  Raises GuestError if the file cannot be opened."""
        super().__init__(name, kind)
        self.sent_bytes = 0
        self._memory = memory
        self._lock = threading.Lock()
        self._fd = -1
        if path:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._fd = os.open(path, flags, 0o600)
            except OSError as error:
                raise GuestError(f"unable to open {path} for com1: {error}") from error

    def write(self, line: str) -> None:
        """Print a line; count its bytes in guest memory and in the UART."""
        data = line.encode() + b"\n"
        with self._lock:
            self.sent_bytes += len(data)
            self._memory.write(UART_PAGE, _COUNTER.pack(self.sent_bytes))
            if self._fd >= 0:
                os.write(self._fd, data)

    def fields(self) -> dict[str, Any]:
        return {"sent_bytes": self.sent_bytes}

    def take(self, fields: dict[str, Any]) -> None:
        self.sent_bytes = number(fields, "sent_bytes")

    def memory_complaints(self) -> Iterator[str]:
        found = _COUNTER.unpack_from(self._memory.read(UART_PAGE))[0]
        if found != self.sent_bytes:
            yield f"bytes sent to com1: expected {found} (memory) found {self.sent_bytes} (blob)"


def make_devices(config: Config, memory: Memory, gate: Gate, directory: Path) -> list[Device]:
    """Return the devices of a configuration, ascending by slot, then atkbdc.

    Raises GuestError if a device is unknown or its host resource cannot be
    opened.
    """
    devices: list[Device] = []
    for index, (kind, place) in enumerate(config.devices()):
        constants = _open(config, kind, f"pci.{place}", directory)
        name = f"{kind}@pci.{place}"
        page = DEVICE_PAGE + index
        if kind in PAUSABLE:
            devices.append(Ticker(name, kind, memory, page, gate))
        elif kind == "e1000":
            devices.append(Unpaused(name, kind, memory, page))
        elif kind == "lpc":
            devices.append(Uart(name, kind, memory, config.get("lpc.com1.path")))
        else:
            devices.append(Device(name, kind))
        devices[-1].constants = constants
    devices.append(Device("atkbdc", "atkbdc"))
    return devices


def uart_of(devices: Sequence[Device]) -> Uart | None:
    """Return the UART that the guest prints to, None if the guest has no lpc."""
    return next((device for device in devices if isinstance(device, Uart)), None)


def _open(config: Config, kind: str, key: str, directory: Path) -> Mapping[str, bool]:
    """Open a device's host resources until bhyve ends; return the device's constants.

    Raises GuestError if one cannot be opened.  Source: usr.sbin/bhyve/block_if.c, blockif_open();
    pci_virtio_block.c, pci_vtblk_init(); pci_virtio_net.c, pci_vtnet_init(),
    FreeBSD 15.1, read.
    """
    if kind not in KNOWN:
        raise GuestError(f"{key}: unknown device {kind!r}")
    paths = [config.get(f"{key}.path")] if kind in BLOCK else []
    if kind == "ahci":
        ports = (word for word in config.keys if word.startswith(f"{key}.port."))
        paths = [config.get(port) for port in ports if port.endswith(".path")]
    for path in paths:
        _open_disk(key, path)
    if kind in NET:
        _open_tap(config, key, directory)
    if kind == "virtio-net":
        return {"mtu": bool(config.get(f"{key}.mtu"))}
    disk = StandinHost(directory).disk(paths[0]) if kind == "virtio-blk" else None
    if disk is None:
        return {}
    is_writable = disk.is_writable and not config.is_set(f"{key}.ro")
    return {"can_delete": disk.can_delete, "read_only": not is_writable}


def _open_disk(key: str, path: str) -> None:
    """Open a disk read-write, or read-only if that fails: bhyve does so without a message."""
    for flags in (os.O_RDWR, os.O_RDONLY):
        try:
            os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            why = error.strerror
        else:
            return
    raise GuestError(f"{key}: could not open {path!r}: {why}")


def _open_tap(config: Config, key: str, directory: Path) -> None:
    backend = config.get(f"{key}.backend")
    if not backend.startswith("tap"):
        return
    try:
        os.open(directory / "net" / backend, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise GuestError(f"{key}: open of tap device {backend} failed") from None
