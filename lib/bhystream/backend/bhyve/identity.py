"""The host's half of the HOST section.  Most keys are names of FreeBSD's sysctls.

| key | type | from | why |
| --- | --- | --- | --- |
| hypervisor | string | host.kind | "bhyve" or "standin"; neither takes the other's guests |
| hw.machine | string | sysctl | snapshots exist on amd64 only |
| hw.model | string | sysctl | the CPU's brand: a proxy for its features |
| hw.pagesize | int, bytes | sysctl | 4096 |
| kern.osrelease | string | sysctl | for people; the verdict ignores it |
| kern.osreldate | int | sysctl | __FreeBSD_version; a jail's may differ from its host's |
| kern.build_id | string | sysctl | names one build of the kernel; newer kernels only |
| machdep.tsc_freq | int, Hz | sysctl | the guest's TSC goes on at this rate, unscaled |
| cpu.vendor | string | host.cpu_vendor() | "intel", "amd": neither loads the other's vCPUs |
| bhyve.hash | string | host.program_hash() | names one build of bhyve |
| vmm.hash | string | host.module_hash() | names one build of vmm.ko, which no build_id does |

The last five keys, hw.model and kern.osreldate tell whether two hosts are built
alike.  A snapshot is portable between such hosts only, because its blobs are
the kernel's and bhyve's own structures, without a version.  A key for which the
host has no value is left out.  kern.hostuuid is not sent: bhyrecv does not need it.

Source: sys/kern/kern_mib.c for hw and kern; sys/x86/x86/tsc.c for
machdep.tsc_freq, a u64.  All but vmm.hash were run on FreeBSD 15.1.
"""

from __future__ import annotations

from bhystream.backend.bhyve.host import Host

# The source's NAME.conf, which decides nothing: an object of strings.
CONF = "vm-bhyve.conf"
# Whether SIGTERM presses the guest's power button; see powerbutton.py.
POWER_BUTTON = "power_button"
_STRINGS = ("hw.machine", "hw.model", "kern.osrelease", "kern.build_id")
_INTEGERS = ("hw.pagesize", "kern.osreldate", "machdep.tsc_freq")
_MAX_DIGITS = 20  # the digits of the largest u64


def describe(host: Host) -> dict[str, str | int]:
    """Return the HOST section of a bhyve or stand-in host, without "program".

    Raises what the methods of host raise.
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
    """Return the value of an integer sysctl from its printed form; None for any other text."""
    text = (printed or "").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        return None
    return int(text)


def _text(printed: str | None) -> str | None:
    return (printed or "").strip() or None
