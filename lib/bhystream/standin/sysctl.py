"""The values of sysctl(8) on a stand-in: from host.json, else of a plausible FreeBSD."""

from __future__ import annotations

from pathlib import Path

from .settings import read_settings

_SYSCTL = {
    # FreeBSD has 1: a device then takes at most INT_MAX bytes at once.
    "debug.devfs_iosize_max_clamp": "0",
    "hw.machine": "amd64",
    "hw.machine_arch": "amd64",
    "hw.model": "Stand-in CPU",
    "hw.ncpu": "2",
    "hw.pagesize": "4096",
    "hw.vmm.maxcpu": "16",
    "hw.vmm.vmx.initialized": "1",
    "kern.build_id": "5374616e64696e0000000000000000000000000f",
    "kern.ostype": "FreeBSD",
    "machdep.tsc_freq": "2500000000",
    "vm.mincore_mapped": "0",
}
# The key is the generation of the checkpoint interface.
_RELEASE = {
    4: {"kern.osreldate": "1501000", "kern.osrelease": "15.1-STANDIN"},
    5: {"kern.osreldate": "1600000", "kern.osrelease": "16.0-STANDIN"},
}


def sysctl(directory: Path, name: str) -> str | None:
    """Return host.json's value, else a plausible value, None if the name is not known.

    Raises GuestError if host.json is invalid.
    """
    settings = read_settings(directory)
    given = settings.sysctl.get(name)
    if given is None and name == "kern.hostuuid":
        import uuid

        return str(uuid.uuid5(uuid.NAMESPACE_URL, str(directory)))
    own = {**_SYSCTL, **_RELEASE[settings.generation]}
    return own.get(name) if given is None else given
