"""bhyve's snapshot files: read, cut into states, joined again.

A snapshot is three files in one directory:

    FILE         the guest's memory: lowmem, highmem directly behind it
    FILE.kern    opaque blobs back to back: structures of the kernel, then devices
    FILE.meta    JSON by libxo: the guest's name, and the place of each blob in FILE.kern

A stream carries the last two as states: "meta", the text as it is, and then
every blob in the order of the file, "kern/vmcx", "dev/virtio-blk@pci.0.3.0".
Both cut() and join() keep every byte, so the destination's bhyve reads what the
source's bhyve wrote; only a bhyve and a kernel of the same build know what a
blob contains.

The FPU registers of the vCPUs, which bhyve does not save, are optional states,
"fpu/0".  On disk they are a fourth file, FILE.fpu, which bhyve does not know:
JSON, each state's name with its bytes in base64.

FILE.meta's text may come out of a stream, so nothing in it is believed before
it is checked.  Source: usr.sbin/bhyve/snapshot.c, FreeBSD 14 and 15.1; run on
15.1, emulated AMD.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bhystream.errors import FormatError
from bhystream.guest import MAX_GUEST_PAGES, MAX_STATE_BYTES, PAGE_BYTES, State
from bhystream.strict_json import unpack_json

# FILE's name in the directories that bhysend and bhyrecv make.
FILE = "ckp"
META = "meta"
MAX_META_BYTES = 1 << 20
# The size of bhyve's buffer for one blob.  Source: snapshot.c, FreeBSD 14.
MAX_BLOB_BYTES = 40 << 20
# The text and the blobs become states of one stream, so the stream's limit applies.
MAX_ALL_BYTES = MAX_STATE_BYTES
MAX_MEMORY_BYTES = MAX_GUEST_PAGES * PAGE_BYTES
MAX_ITEMS = 1024
MAX_VCPUS = 1 << 16
SLOW_BYTES_PER_SECOND = 100 << 20  # a slow disk's speed, which limits the time for a memory file
# The kernel structures that FreeBSD 14 saves, and those that every kernel needs.
_KERNEL_14 = frozenset(
    ("vhpet", "vm", "vioapic", "vlapic", "vmcx", "vatpit", "vatpic", "vpmtmr", "vrtc")
)
_KERNEL_ALWAYS = frozenset(("vm", "vlapic", "vmcx"))
# Names in FILE.meta: the present ones first, then those of FreeBSD 13.
_KERNEL_LISTS = ("kern_structs", "structs")
_NAME_KEYS = ("device", "debug_name", "snapshot_req")
# Printable, without a slash and, because a state's name has none, without a space.
_NAME = re.compile(r"[\x21-\x2e\x30-\x7e]{1,100}")
FPU_NAME = re.compile(r"fpu/(0|[1-9][0-9]{0,4})", re.ASCII)
_VMNAME = re.compile(r"[\x21-\x2e\x30-\x7e]{1,229}")


@dataclass(frozen=True)
class Item:
    """One blob of FILE.kern.  offset_bytes: where the blob begins in FILE.kern."""

    kind: Literal["kern", "dev"]
    name: str
    size_bytes: int
    offset_bytes: int

    @property
    def state_name(self) -> str:
        """Return the name that the blob's state has in a stream."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class Meta:
    """The contents of FILE.meta.  items: in the order of FILE.kern, which they fill completely."""

    vmname: str
    ncpus: int
    memory_bytes: int
    memflags: int
    items: tuple[Item, ...]

    @property
    def kern_bytes(self) -> int:
        """Return the size of FILE.kern in bytes."""
        return sum(item.size_bytes for item in self.items)

    @property
    def devices(self) -> tuple[str, ...]:
        """Return the names of the devices, in the order of FILE.kern."""
        return tuple(item.name for item in self.items if item.kind == "dev")


def parse(text: bytes) -> Meta:
    """Parse FILE.meta.

    Unknown keys are ignored.  The lists may stand in any order; the items are
    sorted by their offsets.  Raises FormatError, which says what is wrong in the
    text.
    """
    if len(text) > MAX_META_BYTES:
        raise FormatError(f"meta: {len(text)} bytes are more than {MAX_META_BYTES}")
    try:
        value = unpack_json(text)
    except FormatError as error:
        raise FormatError(f"meta: {error}") from None
    top = _object(value, "the text")
    basic = _object(top.get("basic metadata"), "basic metadata")
    vmname = basic.get("vmname")
    if not isinstance(vmname, str) or not _VMNAME.fullmatch(vmname):
        raise FormatError("meta: vmname is missing or not a name")
    memory_bytes = _number(basic, "memsize", 1, MAX_MEMORY_BYTES)
    if memory_bytes % PAGE_BYTES:
        raise FormatError(f"meta: memsize {memory_bytes} is not a multiple of {PAGE_BYTES}")
    return Meta(
        vmname=vmname,
        ncpus=_number(basic, "ncpus", 1, MAX_VCPUS),
        memory_bytes=memory_bytes,
        memflags=_number(basic, "memflags", 0, (1 << 32) - 1),
        items=_items(top, MAX_ALL_BYTES - len(text)),
    )


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"meta: {what} is missing or not a JSON object")
    return value


def _number(of: Mapping[str, Any], key: str, low: int, high: int, where: str = "") -> int:
    value = of.get(key)
    # Python's bool is an int, but true and false are no numbers here.
    if type(value) is not int:
        raise FormatError(f"meta: {where}{key} is missing or not a number")
    if not low <= value <= high:
        raise FormatError(f"meta: {where}{key} {value} is not within {low} to {high}")
    return value


def _items(top: Mapping[str, Any], room_bytes: int) -> tuple[Item, ...]:
    """Return the blobs in the order of FILE.kern, which they fill without a gap."""
    kernel = [key for key in _KERNEL_LISTS if key in top]
    if len(kernel) != 1:
        raise FormatError(f"meta: {len(kernel)} lists of kernel structures where there is one")
    found = _list(top, kernel[0], "kern") + _list(top, "devices", "dev")
    found.sort(key=lambda item: item.offset_bytes)
    at = 0
    for item in found:
        if item.offset_bytes != at:
            what = "overlaps" if item.offset_bytes < at else "leaves a gap behind"
            raise FormatError(
                f"meta: {item.state_name} at {item.offset_bytes} {what} what ends at {at}"
            )
        at += item.size_bytes
    if at > room_bytes:
        raise FormatError(f"meta: the blobs have {at} bytes, more than {room_bytes}")
    for name, count in Counter(item.state_name for item in found).items():
        if count > 1:
            raise FormatError(f"meta: {name} is there {count} times")
    _check_kernel({item.name for item in found if item.kind == "kern"})
    return tuple(found)


def _list(top: Mapping[str, Any], key: str, kind: Literal["kern", "dev"]) -> list[Item]:
    values = top.get(key)
    if not isinstance(values, list) or len(values) > MAX_ITEMS:
        raise FormatError(f"meta: {key} is missing or not a list of at most {MAX_ITEMS}")
    found = []
    for index, value in enumerate(values):
        where = f"{key}[{index}]"
        entry = _object(value, where)
        names = [entry[k] for k in _NAME_KEYS if isinstance(entry.get(k), str)]
        if not names or not _NAME.fullmatch(names[0]):
            raise FormatError(f"meta: {where} has no name of 1 to 100 printable characters")
        # bhyve refuses to restore a blob of no bytes.
        size = _number(entry, "size", 1, MAX_BLOB_BYTES, f"{where}.")
        offset = _number(entry, "file_offset", 0, MAX_ALL_BYTES, f"{where}.")
        found.append(Item(kind, names[0], size, offset))
    return found


def _check_kernel(names: set[str]) -> None:
    """Raise FormatError if a snapshot lacks kernel structures that it needs.

    A kernel that saves a structure which is not known here may have moved others
    into that one, so then only those of _KERNEL_ALWAYS are needed.
    """
    needed = _KERNEL_ALWAYS if names - _KERNEL_14 else _KERNEL_14
    missing = sorted(needed - names)
    if missing:
        raise FormatError(f"meta: kern/{missing[0]} is missing")


def cut(meta_text: bytes, kern: bytes | memoryview) -> list[State]:
    """Cut a snapshot into the states of a stream: "meta", then every blob.

    Copies each blob once.  Raises FormatError if the text is not a FILE.meta,
    or if FILE.kern has another size than the text says.
    """
    meta = parse(meta_text)
    view = memoryview(kern)
    if len(view) != meta.kern_bytes:
        raise FormatError(f"kern: {len(view)} bytes where meta says {meta.kern_bytes}")
    states = [State(META, meta_text)]
    for item in meta.items:
        end = item.offset_bytes + item.size_bytes
        states.append(State(item.state_name, bytes(view[item.offset_bytes : end])))
    return states


class Order:
    """The check of a stream's states as they come: meta, then those that meta lists, in order.

    meta: the parsed state meta, None before it has come.  take() must not be
    called for optional states.
    """

    def __init__(self) -> None:
        self.meta: Meta | None = None
        self._names: list[str] = []
        self._came = 0

    def take(self, state: State) -> None:
        """Check the next state.  Raises FormatError if it is not the one that must come next."""
        if self.meta is None:
            if state.name != META:
                raise FormatError("state meta is missing, or not the first")
            self.meta = parse(state.data)
            self._names = [item.state_name for item in self.meta.items]
            return
        if state.name not in self._names:
            raise FormatError(f"state {state.name} is one that meta does not list")
        if state.name in self._names[: self._came]:
            raise FormatError(f"state {state.name} is there 2 times")
        item = self.meta.items[self._came]
        if state.name != item.state_name:
            raise FormatError(f"state {state.name} stands where {item.state_name} belongs")
        if len(state.data) != item.size_bytes:
            raise FormatError(
                f"state {state.name} has {len(state.data)} bytes where meta says {item.size_bytes}"
            )
        self._came += 1

    def end(self) -> Meta:
        """Return the parsed meta.  Raises FormatError if a state has not come."""
        if self.meta is None:
            raise FormatError("state meta is missing, or not the first")
        if self._came < len(self._names):
            raise FormatError(f"state {self._names[self._came]} is missing: meta lists it")
        return self.meta


def join(states: Sequence[State]) -> tuple[Meta, bytes, list[bytes]]:
    """Join the states of a stream: (parsed meta, meta's text, FILE.kern in pieces).

    The inverse of cut(), without a copy; optional states are ignored.  Raises
    FormatError unless the states are those that meta lists, in that order and
    of those sizes.
    """
    needed = [state for state in states if not state.is_optional]
    order = Order()
    for state in needed:
        order.take(state)
    meta = order.end()
    return meta, needed[0].data, [state.data for state in needed[1:]]


def require_same(planned: Meta, found: Meta) -> None:
    """Raise FormatError if a guest's state is not laid out as its rehearsal said.

    bhyve has read the rehearsal's text, and takes each blob from the place that
    this text names.
    """
    for what in ("ncpus", "memory_bytes"):
        a, b = getattr(planned, what), getattr(found, what)
        if a != b:
            raise FormatError(f"state meta: {what} is {b}, the rehearsal had {a}")
    if planned.items == found.items:
        return
    sizes = {item.state_name: item.size_bytes for item in found.items}
    for item in planned.items:
        size = sizes.pop(item.state_name, None)
        if size is None:
            raise FormatError(f"state meta: {item.state_name} of the rehearsal is missing")
        if size != item.size_bytes:
            raise FormatError(
                f"state meta: {item.state_name} has {size} bytes,"
                f" the rehearsal had {item.size_bytes}"
            )
    other = next(iter(sizes), None)
    raise FormatError(
        f"state meta: {other} was not in the rehearsal"
        if other
        else "state meta: its order is not that of the rehearsal"
    )


def fpu_states(states: Sequence[State]) -> list[State]:
    """Return the optional states that are known: the FPU registers of each vCPU."""
    return [state for state in states if state.is_optional and FPU_NAME.fullmatch(state.name)]
