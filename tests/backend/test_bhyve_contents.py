"""What a stream says of a bhyve guest is checked on any host, section by section."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bhystream import hypervisors
from bhystream.errors import BhyError, FormatError, IncompatibleError
from bhystream.guest import Head, State
from bhystream.stream.verify import Walk
from support.both import Input
from support.streams import CONFIG, DEVICES, END, LAYOUT, REHEARSAL, STATE, STATE_OPTIONAL

from .bhyve_stream import FPU, KERN, META, states_of, whole
from .snapshot_files import CONFIG as SECTION
from .snapshot_files import DEVICES as NAMES
from .snapshot_files import MEMORY, Json, text_of

TYPES = {CONFIG: "CONFIG", DEVICES: "DEVICES", END: "END", LAYOUT: "LAYOUT",
         REHEARSAL: "REHEARSAL", STATE: "STATE", STATE_OPTIONAL: "STATE_OPTIONAL"}  # fmt: skip


def read(raw: bytes) -> list[State]:
    """Read a stream with the checks of its hypervisor; return the stream's states."""
    walk, states = Walk(Input(raw)), []
    for event in walk.events():
        match event:
            case Head():
                contents = hypervisors.open_contents(event.host["hypervisor"])
                assert contents is not None
                walk.understand(contents, event)
            case State():
                states.append(event)
    walk.expect_end_of_input()
    return states


def refused(raw: bytes, error: type[BhyError], kind: int, message: str) -> None:
    """Assert that a stream is refused, and that the error names a section of type `kind`."""
    with pytest.raises(error) as caught:
        read(raw)
    found = re.fullmatch(r"section \d+ \((\w+)\) at offset 0x[0-9a-f]+: (.*)", str(caught.value))
    assert found, str(caught.value)
    assert found[1] == TYPES[kind] and re.match(message, found[2]), str(caught.value)


def meta_with(change: Callable[[Json], object]) -> bytes:
    found = copy.deepcopy(META)
    change(found)
    return text_of(found)


def basic(**changes: int) -> bytes:
    return meta_with(lambda meta: meta["basic metadata"].update(changes))


def renamed(old: str, new: str) -> bytes:
    text = text_of(META)
    assert old.encode() in text
    return text.replace(f'"{old}"'.encode(), f'"{new}"'.encode())


def grown() -> list[State]:
    """Return the states of a guest whose last device has one byte more."""
    found = copy.deepcopy(META)
    found["devices"][-1]["size"] += 1
    return states_of(found, KERN + b"1")


@pytest.mark.parametrize("kind", ["bhyve", "standin"])
def test_a_sound_stream_is_taken(kind: str) -> None:
    assert read(whole(hypervisor=kind).raw) == [*states_of(), FPU]
    assert read(whole(hypervisor=kind, plan=text_of(META)).raw)[0].name == "meta"


def test_snapshot_files_without_a_configuration_are_taken() -> None:
    keys = {"cpus": "2", "memory.size": str(MEMORY)}
    assert read(whole(config={"name": "web1", "keys": keys, "resources": {}}).raw)


def test_order_and_host_bridge_of_the_devices_do_not_matter() -> None:
    for names in (NAMES[1:], NAMES[::-1]):
        assert read(whole(devices=names).raw)


def test_optional_states_of_other_names_are_left_out() -> None:
    others = [State(name, b"x", is_optional=True) for name in ("other", "fpu/x", "fpu/00", "fpu/")]
    assert read(whole([*states_of(), *others]).raw)[-4:] == others


Change = Callable[[list[State]], Sequence[State]]

# A missing state is noticed at the next state, or at END.
STATES: list[tuple[str, Change, int, str]] = [
    ("none", lambda s: [], END, "state meta is missing, or not the first"),
    ("only-fpu", lambda s: [FPU], END, "state meta is missing, or not the first"),
    ("no-meta", lambda s: s[1:], STATE, "state meta is missing, or not the first"),
    ("meta-last", lambda s: [*s[1:], s[0]], STATE, "state meta is missing, or not the first"),
    ("of-qemu", lambda s: [State("qemu", b"QEVM")], STATE, "state meta is missing"),
    ("only-meta", lambda s: s[:1], END, "state kern/vhpet is missing: meta lists it"),
    ("last-missing", lambda s: s[:-1], END, "state dev/atkbdc is missing: meta lists it"),
    ("first-missing", lambda s: [s[0], *s[2:]], STATE, "state kern/vm stands where kern/vhpet"),
    ("extra", lambda s: [*s, State("dev/x", b"")], STATE, "state dev/x is one that meta does not"),
    ("order", lambda s: [*s[:3], s[4], s[3], *s[5:]], STATE, "state kern/vlapic stands where"),
    ("short", lambda s: [s[0], State(s[1].name, s[1].data[1:]), *s[2:]], STATE,
     "state kern/vhpet has 99 bytes where meta says 100"),
    ("empty", lambda s: [s[0], State(s[1].name, b""), *s[2:]], STATE, "state kern/vhpet has 0"),
    ("no-text", lambda s: [State("meta", b""), *s[1:]], STATE, "meta: not JSON in UTF-8"),
    ("cut-text", lambda s: [State("meta", s[0].data[:99]), *s[1:]], STATE, "meta: not JSON"),
    ("another-memory", lambda s: [State("meta", basic(memsize=2 * MEMORY)), *s[1:]], STATE,
     "meta: memsize is 33554432, not memory.size"),
    ("other-vcpus", lambda s: [State("meta", basic(ncpus=1)), *s[1:]], STATE,
     "meta: ncpus is 1, not cpus"),
    ("no-vcpus-state", lambda s: [State("meta", renamed("vmcx", "vmcy")), *s[1:]], STATE,
     "meta: kern/vmcx is missing"),
    ("another-device", lambda s: [State("meta", renamed("atkbdc", "vga")), *s[1:]], STATE,
     "meta: it and DEVICES do not agree on 'atkbdc'"),
    ("fpu-short", lambda s: [*s, State("fpu/0", b"x", True)], STATE_OPTIONAL,
     "state fpu/0 with 1 bytes is not of an FPU"),
    ("clock-short", lambda s: [*s, State("clock", b"1234567", True)], STATE_OPTIONAL,
     "state clock has 7 bytes, not 8"),
    ("fpu-long", lambda s: [*s, State("fpu/0", bytes(16385), True)], STATE_OPTIONAL,
     "state fpu/0 with 16385 bytes"),
    ("fpu-without-xsave", lambda s: [*s, State("fpu/0", b"\7" + FPU.data[1:], True)],
     STATE_OPTIONAL, "state fpu/0 has 0 bytes for XCR0 0x7"),
    ("fpu-of-no-vcpu", lambda s: [*s, State("fpu/2", FPU.data, True)], STATE_OPTIONAL,
     "state fpu/2: the guest has 2 vCPUs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "message"), [one[1:] for one in STATES], ids=[one[0] for one in STATES]
)
def test_states_that_are_not_the_guests_are_refused(
    change: Change, kind: int, message: str
) -> None:
    refused(whole(change(states_of())).raw, FormatError, kind, message)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (b"{", "meta: not JSON"),
        (b"x" * (1 << 20), "meta: not JSON"),
        (basic(ncpus=1), "meta: ncpus is 1, not cpus"),
        (basic(memsize=1 << 40), "meta: memsize is 1099511627776, not memory.size"),
        (renamed("virtio-blk@pci.0.4.0", "e1000@pci.0.4.0"),
         "meta: it and DEVICES do not agree on 'e1000@pci.0.4.0'"),
        (renamed("vmcx", "vmcy"), "meta: kern/vmcx is missing"),
    ],
)  # fmt: skip
def test_a_rehearsal_that_is_not_this_guests_is_refused(plan: bytes, message: str) -> None:
    refused(whole(plan=plan).raw, FormatError, REHEARSAL, message)


def test_a_state_that_is_not_shaped_as_rehearsed_is_refused() -> None:
    """bhyve has read the plan's text, and would take each blob from the offset in that text."""
    raw = whole(grown(), plan=text_of(META)).raw
    refused(raw, FormatError, STATE, r"state meta: dev/atkbdc has \d+ bytes, the rehearsal had")
    assert read(whole(grown()).raw)


def kernel(*names: str) -> list[State]:
    """Return the states of a guest whose kernel saves other structures."""
    found, blobs, at = copy.deepcopy(META), [], 0
    found["kern_structs"] = [{"device": name, "size": 1} for name in names]
    for word, key in (("kern", "kern_structs"), ("dev", "devices")):
        for entry in found[key]:
            entry["file_offset"], at = at, at + entry["size"]
            blobs.append(State(f"{word}/{entry['device']}", bytes(entry["size"])))
    return [State("meta", text_of(found)), *blobs]


def test_only_a_kernel_with_other_structures_may_lack_some() -> None:
    assert read(whole(kernel("vm", "vlapic", "vmcx", "vnew")).raw)
    for names, missing in (
        (("vm", "vlapic", "vmcx"), "vatpic"),
        (("vm", "vlapic", "vnew"), "vmcx"),
        (("vm", "vmcx", "vnew"), "vlapic"),
        (("vlapic", "vmcx", "vnew"), "vm"),
    ):
        raw = whole(kernel(*names)).raw
        refused(raw, FormatError, STATE, f"meta: kern/{missing} is missing")


BARE = {"cpus": "2", "memory.size": str(MEMORY)}


@pytest.mark.parametrize(
    ("other", "kind", "message"),
    [
        ({"segments": ((b"lowmem", 0, 4095),)}, LAYOUT,
         "the segments are not those of memory.size=16777216"),
        ({"segments": ((b"ram0", 0, 4096),)}, LAYOUT, "the segments are not those"),
        ({"segments": ((b"lowmem", 2**64 - 1, 4096),)}, LAYOUT, "the segments are not those"),
        ({"segments": ((b"lowmem", 0, 4095), (b"highmem", 4 << 30, 1))}, LAYOUT,
         "the segments are not those"),
        ({"devices": (*NAMES, "xhci@pci.0.7.0")}, DEVICES, "it and CONFIG do not agree on 'xhci@"),
        ({"devices": NAMES[:3]}, DEVICES, "it and CONFIG do not agree on 'atkbdc'"),
        ({"devices": (*NAMES, "atkbdc")}, DEVICES, "it and CONFIG do not agree on 'atkbdc'"),
        ({"devices": ()}, DEVICES, "it and CONFIG do not agree on 'atkbdc'"),
        ({"config": {"name": "x"}}, CONFIG, "the stream's configuration: 'keys' is missing"),
        ({"config": {**SECTION, "keys": [1]}}, CONFIG, ".*keys is not an object"),
        ({"config": {**SECTION, "keys": BARE}}, CONFIG, ".*disk0.* is no resource"),
        ({"config": {**SECTION, "keys": {"cpus": "2"}, "resources": {}}}, CONFIG,
         ".*sockets is missing"),
        ({"config": {**SECTION, "keys": {**BARE, "memory.size": "16M"}, "resources": {}}}, CONFIG,
         ".*memory.size: '16M' is not allowed"),
        ({"config": {**SECTION, "keys": {**BARE, "memory.size": "2097153"}, "resources": {}}},
         CONFIG, ".*memory.size: '2097153' is no multiple of 4096"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_agree_with_itself_is_refused(
    other: dict[str, Any], kind: int, message: str
) -> None:
    refused(whole(**other).raw, IncompatibleError, kind, message)
