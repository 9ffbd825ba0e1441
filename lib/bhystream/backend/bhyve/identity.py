"""The host's half of the HOST section, in names from the field.

| key | type | from | why |
| --- | --- | --- | --- |
| hypervisor | string | host.kind | "bhyve" or "standin"; neither takes the other's |
| hw.machine | string | sysctl | snapshots are amd64's only |
| hw.model | string | sysctl | the CPU's brand: a proxy for its features |
| hw.pagesize | int, bytes | sysctl | 4096 |
| kern.osrelease | string | sysctl | for people; not judged |
| kern.osreldate | int | sysctl | __FreeBSD_version; a jail may show another than its host's |
| kern.build_id | string | sysctl | names one build of the kernel; newer kernels only |
| machdep.tsc_freq | int, Hz | sysctl | the guest's TSC goes on at this rate, unscaled |
| cpu.vendor | string | host.cpu_vendor() | "intel", "amd": neither loads the other's vCPUs |
| bhyve.hash | string | host.program_hash() | names one build of bhyve |
| vmm.hash | string | host.module_hash() | names one build of vmm.ko, in no build_id |

The last five, hw.model and kern.osreldate tell whether two hosts are built
alike, which is all that makes a snapshot portable: its blobs are the kernel's
and bhyve's own structures, without a version.  A key whose value the host
does not have is left out.  kern.hostuuid stays at home: nothing here needs it.

Source: sys/kern/kern_mib.c for hw and kern; sys/x86/x86/tsc.c for
machdep.tsc_freq, a u64.  All but vmm.hash were run on FreeBSD 15.1.
"""

from __future__ import annotations

from bhystream.backend.bhyve.host import Host

_STRINGS = ("hw.machine", "hw.model", "kern.osrelease", "kern.build_id")
_INTEGERS = ("hw.pagesize", "kern.osreldate", "machdep.tsc_freq")
_MAX_DIGITS = 20  # of a u64


def describe(host: Host) -> dict[str, str | int]:
    """Return the HOST section of a bhyve or stand-in host, without "program".

    Raises what the host raises.
    """
    found: dict[str, str | int | None] = {"hypervisor": host.kind}
    for name in _STRINGS:
        found[name] = _text(host.sysctl(name))
    for name in _INTEGERS:
        found[name] = integer(host.sysctl(name))
    found["cpu.vendor"] = _text(host.cpu_vendor())
    found["bhyve.hash"] = _text(host.program_hash())
    found["vmm.hash"] = _text(host.module_hash())
    return {key: value for key, value in found.items() if value is not None}


def integer(printed: str | None) -> int | None:
    """Return the value of an integer sysctl as it was printed; None for anything else."""
    text = (printed or "").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        return None
    return int(text)


def _text(printed: str | None) -> str | None:
    return (printed or "").strip() or None
