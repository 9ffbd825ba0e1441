"""Values that bhyve makes up if none is configured, made explicit before a guest moves.

The guest sees these values, which depend on the host or on a path.  So on
another host, or with a disk under another path, the guest would find another
machine.  A value is computed here if bhyve's rule for the value was read;
otherwise the guest is refused, with a hint.

    mac   00:a0:98 and the first three bytes of MD5("SLOT-FUNC-NAME"), decimal; NAME is the
          guest's.  Source: freebsd/freebsd-src@1ff57e3a usr.sbin/bhyve/net_utils.c, net_genmac()
    ser   "BHYVE-" and the first six bytes of MD5(path), as XXXX-XXXX-XXXX, for virtio-blk and
          each AHCI port.  Source: freebsd/freebsd-src@03ccfdd2 usr.sbin/bhyve/pci_ahci.c; the
          same in pci_virtio_block.c, whose buffer holds 20 characters and the NUL
    uuid  not computable: the MD5 covers the whole hostname buffer, also the bytes after the NUL.
          Source: freebsd/freebsd-src@04f55b5b usr.sbin/bhyve/smbiostbl.c
    sockets = cpus, cores = threads = 1; cpus = sockets * cores * threads if cpus is not
          given.  Source: freebsd/freebsd-src@0040b685 usr.sbin/bhyve/bhyverun.c
    memory.size 256M, or the sum of the memory domains' sizes, which win.
          Source: bhyve_config(5)
    domains.N.size an equal share of memory.size for every domain, if any domain has no size.
          Source: bhyverun.c, calc_mem_affinity(), FreeBSD 15.1

Read, not run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.keys import Slot, refuse, shown
from bhystream.backend.refusals import Refusals
from bhystream.guest import PAGE_BYTES

_SIZE = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)([kmgtpe]?)(b?)", re.ASCII | re.IGNORECASE)
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_MIB = 1 << 20
_TOPOLOGY = ("sockets", "cores", "threads")
# With the UUID that the guest shows, bhyve makes the same table as without one: the bytes of the
# default, which SMBIOS 2.6 shows in this order.  Source: usr.sbin/bhyve/smbiostbl.c,
# smbios_type1_initializer(); stand/libsa/smbios.c, smbios_setuuid(), FreeBSD 15.1, read, not run.
_UUID_CURE = (
    "set uuid=UUID in the file of -C to the one that the guest shows (kenv smbios.system.uuid,"
    " or /sys/class/dmi/id/product_uuid)"
)


def default_mac(slot: Slot, name: str) -> str:
    """Return the MAC address of a card without a mac key.  name: the guest's."""
    seed = f"{slot.slot}-{slot.func}-{name}"[:79]
    digest = _md5(seed)
    return ":".join(f"{octet:02x}" for octet in b"\x00\xa0\x98" + digest[:3])


def default_serial(path: str) -> str:
    """Return the serial number of a disk without a ser key, 20 characters."""
    digest = _md5(path).hex().upper()
    return f"BHYVE-{digest[0:4]}-{digest[4:8]}-{digest[8:12]}"


def _md5(text: str) -> bytes:
    import hashlib  # loads OpenSSL, and most configurations leave nothing to make up

    return hashlib.md5(os.fsencode(text), usedforsecurity=False).digest()


def memory_bytes(size: str) -> int:
    """Return the bytes of a memory.size as bhyve reads the text.

    A number without a suffix, and below 1048576, counts MiB.  Raises
    IncompatibleError if the text is no size, or the size no multiple of a page.
    Source: freebsd/freebsd-src lib/libvmmapi/vmmapi.c, vm_parse_memsize(); expand_number(3).
    """
    found = _SIZE.fullmatch(size)
    if not found:
        raise refuse(f"memory.size: {shown(size)} is no size")
    count = known.strtol(found[1])
    if count is None:
        raise refuse(f"memory.size: {shown(size)} is no size")
    if not found[2] and not found[3]:
        size_bytes = count * _MIB if count < _MIB else count
    else:
        size_bytes = count << _SHIFT[found[2].lower()]
    if size_bytes == 0 or size_bytes % PAGE_BYTES:
        raise refuse(f"memory.size: {shown(size)} is no multiple of {PAGE_BYTES} bytes")
    return size_bytes


def topology(keys: Mapping[str, str]) -> dict[str, str]:
    """Return cpus, sockets, cores and threads, all explicit.

    Raises IncompatibleError if a number is out of range, or if the numbers do
    not agree: bhyve would not start.
    """
    given: dict[str, int] = {}
    for key in ("cpus", *_TOPOLOGY):
        if key in keys:
            value = known.number(1, 65535)(keys[key])
            if value is None:
                raise refuse(f"{key}: {shown(keys[key])} is no number from 1 to 65535")
            given[key] = int(value)
    sockets = given.get("sockets", given.get("cpus", 1))
    cores, threads = given.get("cores", 1), given.get("threads", 1)
    total = sockets * cores * threads
    if given.get("cpus", total) != total or total > 65535:
        raise refuse(
            f"{sockets} sockets of {cores} cores of {threads} threads are not"
            f" {given.get('cpus', 'at most 65535')} cpus",
            f"set cpus={total}, or correct the others",
        )
    counts = {"cpus": total, "sockets": sockets, "cores": cores, "threads": threads}
    return {key: str(count) for key, count in counts.items()}


def domains(keys: Mapping[str, str]) -> dict[str, str]:
    """Return domains.N.size of each memory domain, and memory.size, their sum; in bytes.

    Returns {} if there are no domains.  Raises IncompatibleError for domains
    with which bhyve would not start, or which bhyve would ignore.
    Source: bhyverun.c, calc_mem_affinity() and set_vcpu_affinities(), FreeBSD 15.1.
    """
    found = sorted({int(domain[1]) for domain in map(known.DOMAIN.fullmatch, keys) if domain})
    for at, domain in enumerate(found):
        if domain != at:
            raise refuse(
                f"domains.{domain}: there is no domains.{at}", "number the domains from 0 on"
            )
        if f"domains.{domain}.cpus" not in keys:
            raise refuse(f"domains.{domain}.cpus is missing", f"set domains.{domain}.cpus")
    if not found:
        return {}
    sizes = [keys.get(f"domains.{domain}.size") for domain in found]
    given = [memory_bytes(size) for size in sizes if size is not None]
    if len(given) < len(found):
        total = memory_bytes(keys.get("memory.size", "256M"))
        if total % (len(found) * PAGE_BYTES):
            raise refuse(f"memory.size: {len(found)} domains cannot share it", "set domains.N.size")
        given = [total // len(found)] * len(found)
    shares = {f"domains.{domain}.size": str(size) for domain, size in enumerate(given)}
    return {**shares, "memory.size": str(sum(given))}


def explicit(
    keys: Mapping[str, str], devices: Mapping[Slot, str], name: str, against: Refusals
) -> dict[str, str]:
    """Return the keys to add to `keys` so that no default depends on the host.

    keys: the source's own, with the source's resources.  name: the guest's.  against: gets
    an IncompatibleError for each default that cannot be computed.
    """
    added: dict[str, str] = {}
    with against.collecting():
        added |= {key: value for key, value in topology(keys).items() if key not in keys}
    added |= {} if "memory.size" in keys else {"memory.size": "256M"}
    with against.collecting():
        added |= domains(keys)
    if "uuid" not in keys:
        against.add(refuse("uuid is not set: the default changes with the host", _UUID_CURE))
    for slot, device in devices.items():
        if device in ("virtio-net", "e1000") and f"{slot}.mac" not in keys:
            added[f"{slot}.mac"] = default_mac(slot, name)
    for disk in known.disks(keys, devices):
        if f"{disk}.ser" in keys or f"{disk}.serial" in keys:
            continue
        if f"{disk}.path" in keys:
            added[f"{disk}.ser"] = default_serial(keys[f"{disk}.path"])
        else:
            what = f"{disk}.ser is not set: the default changes with the path"
            against.add(refuse(what, f"set {disk}.ser"))
    return added
