"""bhyve's snapshot files: what is accepted in them, and that no byte is lost on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import snapshot
from bhystream.backend.bhyve.layout import layout_of, memory_spans
from bhystream.backend.bhyve.snapshot import cut, join, parse
from bhystream.backend.bhyve.snapshotfiles import Files, read_states
from bhystream.errors import FormatError, GuestError, UsageError
from bhystream.guest import Segment, State
from bhystream.stream import format as fmt
from support.descriptors import descriptors

from .snapshot_files import DEVICES, KERNEL, MEMORY, Json, made, text_of

GIB = 1 << 30


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A sound snapshot, except that FILE is a hole."""
    found = Files(tmp_path, "web1.save")
    meta, kern = made()
    found.meta.write_bytes(text_of(meta))
    found.kern.write_bytes(kern)
    found.memory.touch()
    os.truncate(found.memory, MEMORY)
    return found


def test_a_snapshot_of_freebsd_14_is_understood() -> None:
    value, kern = made()
    meta = parse(text_of(value))
    assert (meta.vmname, meta.ncpus, meta.memory_bytes, meta.memflags) == ("web1", 2, MEMORY, 0)
    assert [item.name for item in meta.items] == [*KERNEL, *DEVICES]
    assert meta.kern_bytes == len(kern)
    assert meta.devices == DEVICES


def test_the_words_of_freebsd_13_are_understood() -> None:
    value, _ = made()
    structs = [
        {"debug_name": e["device"], "snapshot_req": i, **e}
        for i, e in enumerate(value["kern_structs"])
    ]
    for entry in structs:
        del entry["device"]
    old = {
        "basic metadata": value["basic metadata"],
        "structs": structs,
        "devices": [
            {"snapshot_req": e["device"], "size": e["size"], "file_offset": e["file_offset"]}
            for e in value["devices"]
        ],
    }
    assert parse(text_of(old)) == parse(text_of(value))


def test_unknown_keys_and_another_order_of_the_lists_change_nothing() -> None:
    value, _ = made()
    other = {"version": {"of": ["what", 1, None, True]}, **value}
    other["devices"] = value["devices"][::-1]
    other["kern_structs"] = [{"new": True, **entry} for entry in value["kern_structs"]]
    assert parse(text_of(other)) == parse(text_of(value))


def test_the_states_stand_in_the_order_of_the_file() -> None:
    value, kern = made()
    states = cut(text_of(value), kern)
    assert [state.name for state in states] == [
        "meta",
        *(f"kern/{name}" for name in KERNEL),
        *(f"dev/{name}" for name in DEVICES),
    ]
    assert all(type(state.data) is bytes for state in states)


def test_cut_and_join_are_inverse() -> None:
    value, kern = made()
    text = text_of(value)
    states = cut(text, memoryview(kern))
    meta, found, pieces = join(states)
    assert (meta, found, b"".join(pieces)) == (parse(text), text, kern)
    assert all(piece is state.data for piece, state in zip(pieces, states[1:], strict=True))
    assert cut(text, b"".join(pieces)) == states


def test_cut_refuses_a_kern_of_another_size() -> None:
    value, kern = made()
    with pytest.raises(FormatError, match=f"kern: {len(kern) - 1} bytes where meta says"):
        cut(text_of(value), kern[:-1])


def at(value: Json, *keys: str | int) -> Any:
    for key in keys:
        value = value[key]  # type: ignore[index]
    return value


def put(*path: str | int, to: object) -> Callable[[Json], None]:
    """Return a function that sets one value of a .meta."""

    def change(value: Json) -> None:
        at(value, *path[:-1])[path[-1]] = to

    return change


def drop(*path: str | int) -> Callable[[Json], None]:
    def change(value: Json) -> None:
        del at(value, *path[:-1])[path[-1]]

    return change


def shift(bytes_: int) -> Callable[[Json], None]:
    """Return a function that moves the second device and all behind it."""

    def change(value: Json) -> None:
        for entry in value["devices"][1:]:
            entry["file_offset"] += bytes_

    return change


def grow(value: Json) -> None:
    """Make blobs of which each is small enough, but all together are too large."""
    start = value["devices"][0]["file_offset"]
    size = snapshot.MAX_BLOB_BYTES
    value["devices"] = [
        {"device": f"d{i}", "size": size, "file_offset": start + i * size} for i in range(4)
    ]


def twice(value: Json) -> None:
    value["devices"][2]["device"] = value["devices"][1]["device"]


def without(name: str) -> Callable[[Json], None]:
    """Return a function that removes a kernel structure and closes the gap."""

    def change(value: Json) -> None:
        value["kern_structs"] = [e for e in value["kern_structs"] if e["device"] != name]
        end = 0
        for entry in value["kern_structs"] + value["devices"]:
            entry["file_offset"] = end
            end += entry["size"]

    return change


BASIC = "basic metadata"
WRONG: list[tuple[str, Callable[[Json], None], str]] = [
    ("no-basic", drop(BASIC), "basic metadata is missing"),
    ("basic-list", put(BASIC, to=[]), "basic metadata is missing or not a JSON object"),
    ("no-vmname", drop(BASIC, "vmname"), "vmname is missing"),
    ("vmname-path", put(BASIC, "vmname", to="../x"), "vmname is missing or not a name"),
    ("vmname-long", put(BASIC, "vmname", to="x" * 230), "vmname is missing or not a name"),
    ("no-ncpus", drop(BASIC, "ncpus"), "ncpus is missing or not a number"),
    ("ncpus-text", put(BASIC, "ncpus", to="2"), "ncpus is missing or not a number"),
    ("ncpus-bool", put(BASIC, "ncpus", to=True), "ncpus is missing or not a number"),
    ("ncpus-0", put(BASIC, "ncpus", to=0), "ncpus 0 is not within 1 to"),
    ("memsize-0", put(BASIC, "memsize", to=0), "memsize 0 is not within"),
    ("memsize-odd", put(BASIC, "memsize", to=4097), "memsize 4097 is not a multiple of 4096"),
    ("memsize-huge", put(BASIC, "memsize", to=1 << 62), "memsize 4611686018427387904 is not"),
    ("memflags", put(BASIC, "memflags", to=-1), "memflags -1 is not within"),
    ("no-kernel", drop("kern_structs"), "0 lists of kernel structures"),
    ("two-kernels", put("structs", to=[]), "2 lists of kernel structures"),
    ("no-devices", drop("devices"), "devices is missing or not a list"),
    ("devices-object", put("devices", to={}), "devices is missing or not a list"),
    ("many", put("devices", to=[{}] * 1025), "devices is missing or not a list of at most 1024"),
    ("entry", put("devices", 0, to=7), r"devices\[0\] is missing or not a JSON object"),
    ("no-name", drop("devices", 0, "device"), r"devices\[0\] has no name"),
    ("name-slash", put("devices", 0, "device", to="a/b"), r"devices\[0\] has no name"),
    ("name-space", put("devices", 0, "device", to="a b"), r"devices\[0\] has no name"),
    ("name-wide", put("devices", 0, "device", to="\u00e9"), r"devices\[0\] has no name"),
    ("name-long", put("devices", 0, "device", to="x" * 101), r"devices\[0\] has no name"),
    ("name-twice", twice, "dev/virtio-blk@pci.0.3.0 is there 2 times"),
    ("no-size", drop("devices", 0, "size"), r"devices\[0\].size is missing"),
    ("size-0", put("devices", 0, "size", to=0), r"devices\[0\].size 0 is not within 1"),
    ("size-huge", put("devices", 0, "size", to=1 << 40), r"devices\[0\].size 1099511627776 is"),
    ("offset", put("devices", 0, "file_offset", to=-1), r"devices\[0\].file_offset -1 is not"),
    ("first", put("kern_structs", 0, "file_offset", to=1), "kern/vhpet at 1 leaves a gap"),
    ("gap", shift(1), "dev/virtio-blk@pci.0.3.0 at [0-9]+ leaves a gap"),
    ("overlap", shift(-1), "dev/virtio-blk@pci.0.3.0 at [0-9]+ overlaps what ends at"),
    ("too-much", grow, "the blobs have [0-9]+ bytes, more than"),
    ("no-vmcx", without("vmcx"), "kern/vmcx is missing"),
    ("no-vrtc", without("vrtc"), "kern/vrtc is missing"),
]


@pytest.mark.parametrize(("change", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_meta_that_lies_is_refused_by_name(change: Callable[[Json], None], message: str) -> None:
    value, _ = made()
    change(value)
    with pytest.raises(FormatError, match=f"^meta: {message}"):
        parse(text_of(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON in UTF-8"),
        (b"[1]", "the text is missing or not a JSON object"),
        (b'{"devices":1,"devices":2}', "a JSON name occurs twice"),
        (b'{"a":' + b"9" * 5000 + b"}", "does not fit 64 bits"),
        (b'{"basic metadata":{"ncpus":1.5}}', "not an integer"),
        (b"[" * 200_000, "nests too deep"),
        (b'{"x":' + b"[" * 20 + b"]" * 20 + b"}", "nests too deep"),
        (b" " * (snapshot.MAX_META_BYTES + 1), "1048577 bytes are more than 1048576"),
    ],
    ids=["empty", "binary", "array", "twice", "number", "fraction", "bomb", "deep", "long"],
)
def test_a_text_that_is_no_meta_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=f"^meta: .*{message}"):
        parse(text)


def test_a_newer_kernel_may_save_other_structures() -> None:
    value, _ = made()
    without("vrtc")(value)
    value["kern_structs"][0]["device"] = "vclock"
    assert parse(text_of(value)).items[0].state_name == "kern/vclock"
    without("vlapic")(value)
    with pytest.raises(FormatError, match="kern/vlapic is missing"):
        parse(text_of(value))


def test_a_snapshot_fits_the_limits_of_a_stream() -> None:
    # Otherwise a guest could be paused whose state cannot be sent.
    assert snapshot.MAX_ALL_BYTES <= fmt.MAX_STATE_BYTES
    assert 2 * snapshot.MAX_ITEMS < fmt.MAX_STATES
    assert snapshot.MAX_ITEMS <= fmt.MAX_DEVICES


def swap(states: list[State]) -> list[State]:
    return [*states[:3], states[4], states[3], *states[5:]]


def resized(states: list[State]) -> list[State]:
    """Move one byte from a blob to the next, so that the total size stays the same."""
    first, second = states[1].data, states[2].data
    moved = [State(states[1].name, first[:-1]), State(states[2].name, first[-1:] + second)]
    return [states[0], *moved, *states[3:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "state meta is missing, or not the first"),
        (lambda s: [*s[1:], s[0]], "state meta is missing, or not the first"),
        (lambda s: s[:-1], "state dev/atkbdc is missing: meta lists it"),
        (lambda s: [*s, State("dev/x", b"")], "state dev/x is one that meta does not list"),
        (lambda s: [*s, s[-1]], "state dev/atkbdc is there 2 times"),
        (swap, "state kern/vlapic stands where kern/vioapic belongs"),
        (resized, "state kern/vhpet has 99 bytes where meta says 100"),
    ],
    ids=["none", "meta-last", "missing", "extra", "twice", "order", "sizes"],
)
def test_states_that_are_not_those_of_the_meta_are_refused(
    change: Callable[[list[State]], list[State]], message: str
) -> None:
    value, kern = made()
    with pytest.raises(FormatError, match=message):
        join(change(cut(text_of(value), kern)))


def test_optional_states_are_passed_over_wherever_they_stand() -> None:
    value, kern = made()
    states = cut(text_of(value), kern)
    odd = [State("fpu/0", b"x", is_optional=True), State("meta", b"", is_optional=True)]
    assert join([odd[1], *states[:3], odd[0], *states[3:]]) == join(states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("basic metadata", "ncpus", to=3), "ncpus is 3, the rehearsal had 2"),
        (put("basic metadata", "memsize", to=4096), "memory_bytes is 4096, the rehearsal had"),
        (
            lambda value: value["devices"].pop(),
            "dev/atkbdc of the rehearsal is missing",
        ),
        (
            put("devices", 3, "size", to=1),
            r"dev/atkbdc has 1 bytes, the rehearsal had \d+",
        ),
        (
            lambda value: value["devices"].append(
                {"device": "xhci@pci.0.9.0", "size": 8, "file_offset": kern_bytes(value)}
            ),
            "dev/xhci@pci.0.9.0 was not in the rehearsal",
        ),
        (
            lambda value: exchange_names(value["devices"][1], value["devices"][2]),
            r"dev/virtio-blk@pci.0.3.0 has \d+ bytes, the rehearsal had",
        ),
    ],
)
def test_a_state_that_is_not_shaped_as_in_the_rehearsal_is_refused(
    change: Callable[[Json], object], message: str
) -> None:
    value, _ = made()
    planned = parse(text_of(value))
    snapshot.require_same(planned, parse(text_of(value)))
    change(value)
    with pytest.raises(FormatError, match=f"state meta: {message}"):
        snapshot.require_same(planned, parse(text_of(value)))


def test_a_state_in_another_order_than_in_the_rehearsal_is_refused() -> None:
    value, _ = made()
    one, other = value["devices"][1:3]
    other["size"] = one["size"]
    value["devices"][3]["file_offset"] = other["file_offset"] + other["size"]
    planned = parse(text_of(value))
    exchange_names(one, other)
    with pytest.raises(FormatError, match="its order is not that of the rehearsal"):
        snapshot.require_same(planned, parse(text_of(value)))


def exchange_names(one: Json, other: Json) -> None:
    one["device"], other["device"] = other["device"], one["device"]


def kern_bytes(value: Json) -> int:
    last = value["devices"][-1]
    return int(last["file_offset"]) + int(last["size"])


@pytest.mark.parametrize(
    "name", ["fpu/", "fpu/01", "fpu/x", "fpu/-1", "fpu/0/", "xfpu/0", "fpu/123456"]
)
def test_only_an_optional_state_of_a_vcpu_is_its_fpu(name: str) -> None:
    good = State("fpu/10", b"", is_optional=True)
    assert snapshot.fpu_states([State(name, b"", is_optional=True), State("fpu/1", b""), good]) == [
        good
    ]


def test_a_snapshot_is_read_whole(files: Files) -> None:
    meta, states = read_states(files, MEMORY)
    assert meta == parse(files.meta.read_bytes())
    assert states == cut(files.meta.read_bytes(), files.kern.read_bytes())


def remake(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def exchange(files: Files) -> None:
    meta, kern = files.meta.read_bytes(), files.kern.read_bytes()
    files.meta.write_bytes(kern)
    files.kern.write_bytes(meta)


def make_directory(files: Files) -> None:
    files.kern.unlink()
    files.kern.mkdir()


def make_fifo(files: Files) -> None:
    files.meta.unlink()
    os.mkfifo(files.meta)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.meta.unlink(), "cannot open .*/web1.save.meta: No such file"),
        (lambda f: f.kern.unlink(), "cannot open .*/web1.save.kern: No such file"),
        (lambda f: os.truncate(f.meta, 0), "web1.save.meta is empty"),
        (lambda f: os.truncate(f.kern, 0), "web1.save.kern is empty"),
        (make_fifo, "web1.save.meta is not a regular file"),
        (make_directory, "web1.save.kern is not a regular file"),
        (lambda f: os.truncate(f.meta, 300), "web1.save.meta is not complete, or not bhyve's"),
        (lambda f: os.truncate(f.kern, 300), "web1.save.kern has 300 bytes .*: it is truncated"),
        (
            lambda f: f.kern.write_bytes(f.kern.read_bytes() + b"x"),
            "web1.save.kern has .* bytes where web1.save.meta says .*: it is too long",
        ),
        (exchange, "web1.save.meta is not complete, or not bhyve's: meta: not JSON"),
        (
            lambda f: f.meta.write_bytes(text_of(made(2 * MEMORY)[0])),
            "web1.save.meta is of another guest: 33554432 bytes of memory, not 16777216",
        ),
        (
            lambda f: os.truncate(f.meta, snapshot.MAX_META_BYTES + 1),
            "web1.save.meta: 1048577 bytes are more than",
        ),
    ],
    ids=[
        "no-meta", "no-kern", "empty-meta", "empty-kern", "fifo", "directory", "cut-meta",
        "cut-kern", "long-kern", "swapped", "another-guest", "long-meta",
    ],
)  # fmt: skip
def test_files_that_are_no_snapshot_are_refused_by_name(
    files: Files, spoil: Callable[[Files], object], message: str
) -> None:
    spoil(files)
    with pytest.raises(GuestError, match=message):
        read_states(files, MEMORY)


def test_no_descriptor_is_lost(files: Files) -> None:
    before = descriptors()
    read_states(files, MEMORY)
    os.truncate(files.kern, 300)
    with pytest.raises(GuestError):
        read_states(files, MEMORY)
    os.truncate(files.kern, 0)
    with pytest.raises(GuestError):
        read_states(files, MEMORY)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("memory_bytes", "spans"),
    [
        (4096, [(0, 0, 4096)]),
        (3 * GIB, [(0, 0, 3 * GIB)]),
        (3 * GIB + 4096, [(0, 0, 3 * GIB), (4 * GIB, 3 * GIB, 4096)]),
        (64 * GIB, [(0, 0, 3 * GIB), (4 * GIB, 3 * GIB, 61 * GIB)]),
    ],
)
def test_memory_lies_below_3_gib_and_above_4(
    memory_bytes: int, spans: list[tuple[int, int, int]]
) -> None:
    assert memory_spans(memory_bytes) == spans


def test_the_layout_names_both_segments() -> None:
    assert layout_of(4 * GIB).segments == (
        Segment("lowmem", 0, 3 * GIB // 4096),
        Segment("highmem", 4 * GIB, GIB // 4096),
    )


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 251])
def test_what_is_no_name_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Files(tmp_path, name)


def test_the_longest_name_of_a_file_is_taken(tmp_path: Path) -> None:
    assert len(Files(tmp_path, "x" * 250).meta.name) == 255
