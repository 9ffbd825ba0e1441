"""The announcement of a guest on FreeBSD: a RARP request, as if the guest had sent it.

A frame that is written to a tap with bpf(4) goes the way of the host's own frames: if the tap
is a member of a bridge, to every member, and to the guest; but the bridge learns nothing
from such a frame.  With BIOCFEEDBACK a copy also goes the way of the frames that the guest
sends.  The bridge then notes that the frame's source is behind this tap, unless the bridge has
that address as static or sticky, and sends the copy to all other members.  So one write
tells the bridge and all that is behind it; the other members get the frame twice.  The
interfaces of vmnet are taps too.
Source: sys/net/bpf.c, bpfwrite(); sys/net/if_ethersubr.c, ether_output() and
ether_input_internal(); sys/net/if_bridge.c, bridge_output(), bridge_input(),
bridge_forward() and bridge_rtupdate(); run on FreeBSD 15.1, with a bridge of taps and of a
vmnet interface; a sticky address was read only, and FreeBSD 14 and 16 were not looked at.
Not taken: the ioctl BRDGSADDR, which writes the bridge's table only, and makes a static
address dynamic; a write to the bridge's own interface, from which the bridge learns nothing.

The later announcements come from a process of their own, this module's main(), which has none
of bhyrecv's descriptors: bhyrecv, and an ssh around it, end without waiting for them.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Mapping

from bhystream import inherited
from bhystream.backend.bhyve.ioctl import IOC_IN, number
from bhystream.backend.process import Identity, await_end
from bhystream.errors import GuestError

DELAYS_S = (1.0, 2.0, 5.0)
"""When the later announcements come, counted from the first."""

# Source: sys/net/bpf.h; sys/net/if.h, struct ifreq: a name and a union, 16 bytes each.
_IFREQ = struct.Struct("<16s16x")
BIOCSETIF = number(IOC_IN, "B", 108, _IFREQ.size)
BIOCSHDRCMPLT = number(IOC_IN, "B", 117, 4)
BIOCFEEDBACK = number(IOC_IN, "B", 124, 4)

_BPF = "/dev/bpf"  # Source: bpf(4)
_ONE = struct.pack("<I", 1)

# An Ethernet header and an ARP packet.  Source: RFC 826, RFC 903.
_RARP = struct.Struct(">6s6sHHHBBH6s4s6s4s")
_BROADCAST = b"\xff" * 6
_ETHERTYPE_RARP = 0x8035
_ETHERNET, _IPV4 = 1, 0x0800
_REVERSE_REQUEST = 3
_MIN_FRAME_BYTES = 60


def rarp(mac: str) -> bytes:
    """Return the frame that announces a MAC address: the same as that of QEMU's announce-self.

    Source: QEMU net/announce.c, announce_self_create().
    """
    own, no_ip = bytes.fromhex(mac.replace(":", "")), bytes(4)
    packet = (_ETHERNET, _IPV4, len(own), len(no_ip), _REVERSE_REQUEST, own, no_ip, own, no_ip)
    return _RARP.pack(_BROADCAST, own, _ETHERTYPE_RARP, *packet).ljust(_MIN_FRAME_BYTES, b"\0")


def send(cards: Mapping[str, str]) -> list[str]:
    """Announce each card once; return why which of them could not be announced.

    cards: the MAC address behind each interface.
    """
    failed = []
    for interface, mac in cards.items():
        try:
            _write(interface, rarp(mac))
        except OSError as error:
            failed.append(f"{interface}: {error.strerror}")
    return failed


def _write(interface: str, frame: bytes) -> None:
    """Write a frame, with the source that the frame has, out of an interface and into it."""
    fd = os.open(_BPF, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, BIOCSETIF, _IFREQ.pack(os.fsencode(interface)))
        fcntl.ioctl(fd, BIOCSHDRCMPLT, _ONE)
        fcntl.ioctl(fd, BIOCFEEDBACK, _ONE)
        os.write(fd, frame)
    finally:
        os.close(fd)


def announce(cards: Mapping[str, str], process: Identity) -> None:
    """See host.Host.announce()."""
    since = time.monotonic()
    failed = send(cards)
    order = json.dumps({"cards": dict(cards), "process": process, "since": since})
    try:
        child = subprocess.Popen(
            [*inherited.program("backend.bhyve.freebsd_announce"), order],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        failed.append(f"only once: cannot run {sys.executable}: {error.strerror}")
    else:
        child.returncode = 0  # nobody waits for it; else Popen's destructor would warn
    if failed:
        raise GuestError("; ".join(failed))


def repeat(cards: Mapping[str, str], process: Identity, since: float) -> None:
    """Announce the cards at the later times, as long as the guest's bhyve lives.

    since: when the first announcement was, in seconds of the monotonic clock, which is the same
    for all processes of a host.  Raises GuestError if the process cannot be watched.
    """
    for delay in DELAYS_S:
        if await_end(process, max(since + delay - time.monotonic(), 0.0)):
            return
        send(cards)


def main(argv: list[str]) -> int:
    """Make the later announcements; return the exit status.  argv[1]: announce()'s order."""
    os.chdir("/")  # only after the imports: a relative PYTHONPATH counts from bhyrecv's directory
    order = json.loads(argv[1])
    repeat(order["cards"], Identity(*order["process"]), order["since"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
