"""bhyve's snapshot files: read, cut into states, joined again.

A snapshot is three files in one directory:

    FILE         the guest's memory: lowmem, highmem directly behind it
    FILE.kern    opaque blobs back to back: structures of the kernel, then devices
    FILE.meta    JSON by libxo: whose it is, and where in FILE.kern each blob lies

A stream carries the last two as states: "meta", the text as it is, and then
every blob in the order of the file, "kern/vmcx", "dev/virtio-blk@pci.0.3.0".
Both ways are byte for byte, so the destination's bhyve reads what the
source's wrote; what is in a blob only a bhyve and a kernel of the same build
know.

The FPU of the vCPUs, which bhyve does not save, are optional states, "fpu/0";
in files they are a fourth one, FILE.fpu, which is ours and not bhyve's: JSON,
a state's name and its bytes in base64.

The text may come out of a stream, so nothing in it is believed before it is
checked.  Source: usr.sbin/bhyve/snapshot.c, FreeBSD 14 and 15.1; run on 15.1,
emulated AMD.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, LOWMEM_LIMIT_BYTES
from bhystream.errors import FormatError
from bhystream.guest import MAX_GUEST_PAGES, MAX_STATE_BYTES, PAGE_BYTES, Layout, Segment, State
from bhystream.strict_json import unpack_json

# What FILE is called where we name it.
FILE = "ckp"
META = "meta"
MAX_META_BYTES = 1 << 20
# Source: snapshot.c, the buffer of one blob in FreeBSD 14.
MAX_BLOB_BYTES = 40 << 20
# The text and the blobs become states of one stream.
MAX_ALL_BYTES = MAX_STATE_BYTES
MAX_MEMORY_BYTES = MAX_GUEST_PAGES * PAGE_BYTES
MAX_ITEMS = 1024
MAX_VCPUS = 1 << 16
SLOW_BYTES_PER_SECOND = 100 << 20  # of a slow disk: how long a memory file may take
# What FreeBSD 14 saves of the kernel, and what no kernel can do without.
_KERNEL_14 = frozenset(
    ("vhpet", "vm", "vioapic", "vlapic", "vmcx", "vatpit", "vatpic", "vpmtmr", "vrtc")
)
_KERNEL_ALWAYS = frozenset(("vm", "vlapic", "vmcx"))
# Its own words first; FreeBSD 13's behind them.
_KERNEL_LISTS = ("kern_structs", "structs")
_NAME_KEYS = ("device", "debug_name", "snapshot_req")
# Printable, no space (a state's name has none), no slash.
_NAME = re.compile(r"[\x21-\x2e\x30-\x7e]{1,100}")
FPU_NAME = re.compile(r"fpu/(0|[1-9][0-9]{0,4})", re.ASCII)
_VMNAME = re.compile(r"[\x21-\x2e\x30-\x7e]{1,229}")


@dataclass(frozen=True)
class Item:
    """One blob of FILE.kern.  offset_bytes: of its first byte there."""

    kind: Literal["kern", "dev"]
    name: str
    size_bytes: int
    offset_bytes: int

    @property
    def state_name(self) -> str:
        """Return the name that its state has in a stream."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class Meta:
    """What FILE.meta says.  items: in the order of FILE.kern, which they fill."""

    vmname: str
    ncpus: int
    memory_bytes: int
    memflags: int
    items: tuple[Item, ...]

    @property
    def kern_bytes(self) -> int:
        """Return the size that FILE.kern has."""
        return sum(item.size_bytes for item in self.items)

    @property
    def devices(self) -> tuple[str, ...]:
        """Return the names of the devices, in their order."""
        return tuple(item.name for item in self.items if item.kind == "dev")


def memory_spans(memory_bytes: int) -> list[tuple[int, int, int]]:
    """Return (gpa, offset in FILE, length) of lowmem and, above 3 GiB, of highmem.

    All in bytes.  Source: FreeBSD lib/libvmmapi/vmmapi.c, vm_setup_memory().
    """
    low = min(memory_bytes, LOWMEM_LIMIT_BYTES)
    spans = [(0, 0, low)]
    if memory_bytes > low:
        spans.append((HIGHMEM_BASE_GPA, low, memory_bytes - low))
    return spans


def layout_of(memory_bytes: int) -> Layout:
    """Return the segments of a guest with so much memory."""
    names = ("lowmem", "highmem")
    spans = memory_spans(memory_bytes)
    return Layout(
        tuple(
            Segment(name, gpa, length // PAGE_BYTES)
            for name, (gpa, _, length) in zip(names, spans, strict=False)
        )
    )


def parse(text: bytes) -> Meta:
    """Parse FILE.meta.  Raises FormatError, which says what in it is wrong.

    Keys that are not known are passed over.  The lists may stand in any order;
    what counts is where the blobs lie.
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
    # bool is an int to Python, not to us.
    if type(value) is not int:
        raise FormatError(f"meta: {where}{key} is missing or not a number")
    if not low <= value <= high:
        raise FormatError(f"meta: {where}{key} {value} is not within {low} to {high}")
    return value


def _items(top: Mapping[str, Any], room_bytes: int) -> tuple[Item, ...]:
    """Return the blobs in the order of the file, which they fill without a gap."""
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
    """Refuse a snapshot without the state of the vCPUs.

    A kernel that saves what we have not heard of may have moved the rest there.
    """
    needed = _KERNEL_ALWAYS if names - _KERNEL_14 else _KERNEL_14
    missing = sorted(needed - names)
    if missing:
        raise FormatError(f"meta: kern/{missing[0]} is missing")


def cut(meta_text: bytes, kern: bytes | memoryview) -> list[State]:
    """Cut a snapshot into the states of a stream: "meta", then every blob.

    Copies each blob once.  Raises FormatError for a text that is none, and
    for a FILE.kern of another size.
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
    """The states of a stream as they come: meta, then those that it lists, in its order.

    meta: what it says, when it has come.  Optional states are not its affair.
    """

    def __init__(self) -> None:
        self.meta: Meta | None = None
        self._names: list[str] = []
        self._came = 0

    def take(self, state: State) -> None:
        """Check the next state.  Raises FormatError."""
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
        """Return what meta says, if all have come.  Raises FormatError."""
        if self.meta is None:
            raise FormatError("state meta is missing, or not the first")
        if self._came < len(self._names):
            raise FormatError(f"state {self._names[self._came]} is missing: meta lists it")
        return self.meta


def join(states: Sequence[State]) -> tuple[Meta, bytes, list[bytes]]:
    """Put the states of a stream together: (what meta says, its text, FILE.kern in pieces).

    The inverse of cut(), without a copy; optional states are passed over.  Raises FormatError
    for states that are not those which the text lists, in its order, each of
    its size.
    """
    needed = [state for state in states if not state.is_optional]
    order = Order()
    for state in needed:
        order.take(state)
    meta = order.end()
    return meta, needed[0].data, [state.data for state in needed[1:]]


def require_same(planned: Meta, found: Meta) -> None:
    """Raise FormatError where a guest's state is not shaped as its rehearsal said.

    bhyve has read the rehearsal's text: it takes each blob from where that
    says it lies.
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
        f"state meta: {other} is one that the rehearsal had not"
        if other
        else "state meta: its order is not that of the rehearsal"
    )


def fpu_states(states: Sequence[State]) -> list[State]:
    """Return the optional states that we know: the FPU of each vCPU."""
    return [state for state in states if state.is_optional and FPU_NAME.fullmatch(state.name)]
