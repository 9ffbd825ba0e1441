"""Each cap of bhystream(5), GUESTS OF BHYVE: what is as large as the cap is taken, no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from backend.snapshot_files import made
from bhystream.backend.bhyve import fpu, keys, snapshot
from bhystream.backend.bhyve.validate import validate
from bhystream.errors import FormatError, GuestError, IncompatibleError
from bhystream.guest import State

Section = dict[str, Any]
REQUIRED = {
    "cpus": "1", "sockets": "1", "cores": "1", "threads": "1", "memory.size": str(1 << 20),
    "uuid": "4ca2e2b7-6f0b-11ef-8a6a-0cc47a8c1a2e",
}  # fmt: skip


def slots(count: int) -> list[str]:
    """Return the keys of so many slots, in the order in which words are counted."""
    return [f"pci.{at // 248}.{at % 248 // 8}.{at % 8}" for at in range(count)]


def with_keys(count: int) -> Section:
    devices = {f"{slot}.device": "virtio-rnd" for slot in slots(count - len(REQUIRED))}
    return {"name": "web1", "keys": REQUIRED | devices, "resources": {}}


def with_resources(count: int) -> Section:
    """Return a section with serial ports, a boot ROM and disks, which have two keys each."""
    found = {f"com{at}": f"lpc.com{at}.path" for at in range(1, 5)}
    found |= {"bootrom": "lpc.bootrom", "bootvars": "lpc.bootvars"}
    disks = slots(count - len(found))
    of_disks = {f"{slot}.device": "virtio-blk" for slot in disks}
    of_disks |= {f"{slot}.ser": "D" for slot in disks}
    found |= {f"disk{at}": f"{slot}.path" for at, slot in enumerate(disks)}
    return {"name": "web1", "keys": REQUIRED | of_disks, "resources": found}


@pytest.mark.parametrize(
    ("make", "most", "said"),
    [
        (with_keys, 1024, "keys has more than 1024 entries"),
        (with_resources, 512, "resources has more than 512 entries"),
    ],
)
def test_the_entries_of_a_section(make: Callable[[int], Section], most: int, said: str) -> None:
    for count in (most - 1, most):
        assert validate(make(count)) == make(count)
    with pytest.raises(IncompatibleError, match=said):
        validate(make(most + 1))


@pytest.mark.parametrize(
    ("text", "most"),
    [(lambda count: ".".join(["a"] * count), 8), (lambda count: "a." + "b" * count, 64)],
    ids=["words", "characters of a word"],
)
def test_the_length_of_a_key(text: Callable[[int], str], most: int) -> None:
    assert keys.KEY.fullmatch(text(most)) and not keys.KEY.fullmatch(text(most + 1))


def test_the_length_of_a_value() -> None:
    assert keys.VALUE.fullmatch("v" * 1023) and not keys.VALUE.fullmatch("v" * 1024)
    assert not keys.VALUE.fullmatch("")


def meta(**changes: Any) -> bytes:
    """Return a FILE.meta with other values in its first object, or in the first device."""
    value, _ = made()
    value["basic metadata"] |= {key: new for key, new in changes.items() if key in BASIC}
    first = value["devices"][0]
    grown = changes.get("size", first["size"]) - first["size"]
    for each in value["devices"][1:]:
        each["file_offset"] += grown
    first |= {key: new for key, new in changes.items() if key not in BASIC}
    return json.dumps(value).encode()


BASIC = ("vmname", "ncpus", "memsize", "memflags")


def pieces(count: int) -> bytes:
    """Return a FILE.meta with so many devices of one byte."""
    value, _ = made()
    start = value["devices"][0]["file_offset"]
    value["devices"] = [
        {"device": f"d{at}", "size": 1, "file_offset": start + at} for at in range(count)
    ]
    return json.dumps(value).encode()


def whole(count: int) -> bytes:
    """Return a FILE.meta whose text and pieces have so many bytes together."""
    value, _ = made()
    start, longest = value["devices"][0]["file_offset"], snapshot.MAX_BLOB_BYTES
    rest = count - start - 3 * longest
    sizes = [longest] * 3 + [rest]
    for _ in range(3):  # the length of the text depends on the last size
        value["devices"] = [
            {"device": f"d{at}", "size": size, "file_offset": start + longest * at}
            for at, size in enumerate(sizes)
        ]
        text = json.dumps(value).encode()
        sizes[3] = rest - len(text)
    return text


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda most: meta().ljust(most), 1048576),
        (pieces, 1024),
        (lambda most: meta(vmname="v" * most), 229),
        (lambda most: meta(device="d" * most), 100),
        (lambda most: meta(size=most), 41943040),
        (lambda most: meta(memflags=most), 2**32 - 1),
        (lambda most: meta(ncpus=most), 1 << 16),
        (whole, 134217728),
    ],
    ids=["text", "devices", "vmname", "name", "size", "memflags", "ncpus", "all states"],
)
def test_the_caps_of_a_meta(make: Callable[[int], bytes], most: int) -> None:
    snapshot.parse(make(most))
    with pytest.raises(FormatError, match=r"^meta: "):
        snapshot.parse(make(most + 1))


@pytest.mark.parametrize(("xcr0", "least", "most"), [(0, 520, 520), (7, 520 + 576, 16384)])
def test_the_length_of_the_registers_of_a_vcpu(xcr0: int, least: int, most: int) -> None:
    def state(count: int) -> State:
        return State("fpu/0", xcr0.to_bytes(8, "little") + bytes(count - 8), is_optional=True)

    for count in (least, most):
        assert fpu.parse(state(count))[:2] == (0, xcr0)
    for count in (least - 1, most + 1):
        with pytest.raises(GuestError):
            fpu.parse(state(count))
