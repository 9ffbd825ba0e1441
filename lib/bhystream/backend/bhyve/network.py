"""A guest's place in the network, which has to be told when the guest runs on another host.

A guest keeps its MAC addresses when it moves, so the other machines of its network need
no news.  But the bridges and switches between them have noted behind which port each
address is, and go on to send the guest's frames to the source until the guest sends a
frame itself, or until the note is too old: after 20 minutes, in an if_bridge(4).
The guest sends none, because bhyve does not tell the guest of the move.
Source: sys/net/if_bridge.c, BRIDGE_RTABLE_TIMEOUT; usr.sbin/bhyve/pci_virtio_net.c,
VTNET_S_HOSTCAPS, has no VIRTIO_NET_F_GUEST_ANNOUNCE; FreeBSD 15.1, read.

Only what is connected by a tap or vmnet interface is announced.  slirp has no network
of the host's.  netgraph and ng_device are not done: a frame for a graph of the
operator's would have to enter the graph at the guest's hook, which bhyve has.
"""

from __future__ import annotations

from collections.abc import Mapping

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.restoredguest import Started

_ANNOUNCED = ("tap", "vmnet")


def cards(keys: Mapping[str, str]) -> dict[str, str]:
    """Return the MAC address behind each tap and vmnet interface of a guest.

    keys: the whole configuration, the resources included.
    Source: usr.sbin/bhyve/net_backends.c, netbe_init(), FreeBSD 15.1: the key type decides, or
    else the interface's name, and both by how they begin.
    """
    found = {}
    for net in known.nets(known.pci_devices(keys)):
        interface = keys.get(f"{net}.backend", "")
        if keys.get(f"{net}.type", interface).startswith(_ANNOUNCED):
            found[interface] = keys[f"{net}.mac"]
    return found


def announce(host: Host, keys: Mapping[str, str], started: Started | None) -> None:
    """Tell the network where a guest is that runs now.  Raises what Host.announce() raises."""
    found = cards(keys)
    if found and started is not None and started.process is not None:
        host.announce(found, started.process)
