"""The emulated devices, and their blobs.

Three kinds write guest memory by themselves, as DMA does:

* those with a pause callback (virtio-net, virtio-blk, ahci): a thread counts
  ticks and writes a page of that count; the count in the blob and the page
  must agree after a restore;
* e1000, which has none: its thread goes on until the process is gone, also
  after memory and blobs were saved.  Memory may be ahead of its blob, never
  behind it;
* the UART behind lpc: it counts the bytes that it was given, and the guest
  counts in memory the bytes that it sent.

The others only carry their name and the clock.
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

# Source: dossier, section 11.1.
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
    """A device that only carries its name.  name: as pi_name, "virtio-blk@pci.0.3.0".

    constants: what a blob must have like this device, or its restore fails.
    """

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.constants: Mapping[str, bool] = {}
        self._restored: dict[str, Any] | None = None

    @property
    def can_be_saved(self) -> bool:
        """Whether it has a snapshot callback."""
        return self.kind not in UNSAVED

    def fields(self) -> dict[str, Any]:
        """Return what its blob holds beside name and clock."""
        return {}

    def take(self, fields: dict[str, Any]) -> None:
        """Take over what a blob held."""

    def save(self, clock: int) -> bytes:
        """Return its blob."""
        fields = {"constants": self.constants, **self.fields()}
        return pack_blob(self.name, self.kind, clock, fields)

    def load(self, blob: bytes) -> bool:
        """Take over a blob; what is wrong with it, complaints() says later.

        Returns False for one with other constants.  Source: usr.sbin/bhyve/virtio.c,
        vi_pci_snapshot_consts(), FreeBSD 15.1, read.
        """
        self._restored = unpack_blob(blob)
        self.take(self._restored)
        return not self.constants or self._restored.get("constants") == self.constants

    def complaints(self, clock: int) -> Iterator[str]:
        """Yield what is wrong with the blob that was loaded, now that memory is there."""
        if self._restored is None:
            return
        yield from blob_complaints(self.name, self._restored, clock)
        yield from self.memory_complaints()

    def memory_complaints(self) -> Iterator[str]:
        """Yield where the blob and guest memory do not agree."""
        yield from ()

    def start(self) -> None:
        """Start its threads."""


def blob_complaints(name: str, fields: dict[str, Any], clock: int) -> Iterator[str]:
    """Yield what a blob's own name and clock give away."""
    if fields.get("name") != name:
        yield f"blob {name}: expected {name} found {fields.get('name', 'no name')}"
    if fields.get("clock") != clock:
        yield f"blob {name}: expected clock {clock} found {fields.get('clock', 'no clock')}"


class Ticker(Device):
    """Counts ticks, and writes each into its page.  gate: that which pauses it."""

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
    """e1000: no pause callback, so its thread writes until the process is gone.

    Its blob is as new as the moment in which it is saved, which is after
    memory was: a memory image taken before the process ended is too old.
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
    """lpc, with the UART of com1: what it is given, it appends to its file at once."""

    def __init__(self, name: str, kind: str, memory: Memory, path: str) -> None:
        """path: of lpc.com1.path, "" for nowhere.  Raises GuestError."""
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
        """Print a line: the guest counts it in memory, the UART in itself."""
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
    """Return the devices of a configuration, ascending by slot, and last atkbdc.

    Raises GuestError for a device that is not known, or whose host resource
    is not there.
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
    """Return the UART that the guest prints to."""
    return next((device for device in devices if isinstance(device, Uart)), None)


def _open(config: Config, kind: str, key: str, directory: Path) -> Mapping[str, bool]:
    """Open what a device has on the host, for as long as bhyve lives; return its constants.

    Raises GuestError.  Source: usr.sbin/bhyve/block_if.c, blockif_open();
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
    """Open a disk, to be read where it cannot be written: bhyve says no word of that."""
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
