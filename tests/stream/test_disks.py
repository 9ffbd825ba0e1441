"""A malformed stream for each rule of bhystream(5), DISKS; and a sound one."""

from __future__ import annotations

import struct

import pytest

from bhystream.errors import FormatError
from bhystream.stream.disks import Disk, Sample, pack, unpack
from support.both import agree, refused_last
from support.streams import DISKS, END, NO_MEMORY, PLAIN, Maker, before, disk, disks

ONE = (b"disk0", 1 << 20, [(0, 512, 7)])
PLACE = "the section may not stand here"
NAME = "the name is not 1 to 255 printable characters"
RESERVED = "reserved field is not zero"


def test_what_is_packed_is_what_both_readers_find() -> None:
    given = (
        Disk("disk0", 1 << 40, (Sample(0, 65536, 1), Sample(65536, 512, 2**64 - 1))),
        Disk("pci.0.3.0.path", 512, (Sample(0, 512, 3),)),
    )
    raw = pack(given)
    assert unpack(raw) == given
    recorder, found = agree(before(DISKS, PLAIN).add(DISKS, raw).end().raw)
    assert recorder.disks is not None and recorder.disks.disks == given
    assert [tuple(one) for one in found.disks] == [tuple(one) for one in given]


@pytest.mark.parametrize(
    ("maker", "last"),
    [
        (Maker().host(), "HOST"),
        (Maker().head(), "HEAD_END"),
        (Maker().head().round_0(), "ROUND_END"),
        (Maker().head().round_0().state(b"n", 0, b"x", flags=1), "STATE"),
        (before(DISKS).add(DISKS, disks(ONE)), "DISKS"),
        (before(END).end(), "END"),
        (Maker(mandatory=NO_MEMORY).head(), "HEAD_END"),
    ],
)
def test_it_stands_between_time_and_end_and_once(maker: Maker, last: str) -> None:
    refused_last(maker.add(DISKS, disks(ONE)), FormatError, f"it may not follow {last}", PLACE)


@pytest.mark.parametrize(
    ("raw", "message", "why"),
    [
        (disks(ONE, zero=1), RESERVED, RESERVED),
        (disks(count=0), "0 disks are not 1 to 32", "number of disks is not 1 to 32"),
        (
            disks(*((b"d%d" % n, 512, [(0, 512, 0)]) for n in range(33))),
            "33 disks are not 1 to 32",
            "number of disks is not 1 to 32",
        ),
        (disks(ONE, count=2), "length is too small", "wrong length"),
        (disks(ONE)[:-1], "length is too small", "wrong length"),
        (disks(ONE) + bytes(8), "length does not fit 1 disks", "wrong length"),
        (disks(ONE, ONE), "two disks have the same name", "disk name occurs twice"),
        (disks((b"", 512, [(0, 512, 0)])), NAME, "disk name is not 1 to 255 bytes"),
        (disks((b"n" * 256, 512, [(0, 512, 0)])), NAME, "disk name is not 1 to 255 bytes"),
        (disks((b"a b", 512, [(0, 512, 0)])), NAME, "bad disk name"),
        (
            struct.pack("<II", 1, 0) + disk(*ONE, zero=1),
            "disk0: reserved field or padding is not zero",
            RESERVED,
        ),
        (
            disks(ONE).replace(b"disk0\0", b"disk0\1"),
            "disk0: reserved field or padding is not zero",
            "filling of the disk name is not zero",
        ),
        (
            struct.pack("<II", 1, 0) + disk(*ONE, sample_zero=1),
            "disk0: reserved field is not zero",
            RESERVED,
        ),
        (
            disks((b"d", 1 << 30, [])),
            "d: 0 samples are not 1 to 1024",
            "number of samples is not 1 to 1024",
        ),
        (
            disks((b"d", 1 << 30, [(512 * n, 512, 0) for n in range(1025)])),
            "d: 1025 samples are not 1 to 1024",
            "number of samples is not 1 to 1024",
        ),
        (
            disks((b"d", 1 << 30, [(0, 0, 0)])),
            "d: a sample of 0 bytes",
            "length of a sample is not 512 to 65536",
        ),
        (
            disks((b"d", 1 << 30, [(0, 65536 + 512, 0)])),
            "d: a sample of 66048 bytes",
            "length of a sample is not 512 to 65536",
        ),
        (
            disks((b"d", 1 << 30, [(0, 513, 0)])),
            "d: a sample of 513 bytes",
            "sample is not a multiple of 512",
        ),
        (
            disks((b"d", 1 << 30, [(256, 512, 0)])),
            "d: the sample at 256 is out of order",
            "sample is not a multiple of 512",
        ),
        (
            disks((b"d", 1 << 30, [(512, 1024, 0), (1024, 512, 0)])),
            "d: the sample at 1024 is out of order",
            "samples do not ascend",
        ),
        (
            disks((b"d", 1023, [(0, 512, 0), (512, 512, 0)])),
            "d: the sample at 512 ends beyond the disk",
            "sample ends outside the disk",
        ),
        (
            disks((b"d", 2**64 - 1, [(2**64 - 512, 512, 0)])),
            "d: the sample at 18446744073709551104 ends beyond the disk",
            "sample ends outside the disk",
        ),
    ],
)
def test_a_malformed_one_is_refused(raw: bytes, message: str, why: str) -> None:
    refused_last(before(DISKS).add(DISKS, raw), FormatError, message, why)
