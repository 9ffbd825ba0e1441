"""Configuration -> the file and the argv that start bhyve.

bhyve gets the whole configuration in a bhyve_config(5) file, `bhyve -k FILE`.
Such a file has no quoting, and no value in it can become another option.

The file names a boot ROM and its variables by both of their names.  FreeBSD 14
knows lpc.bootrom and ignores bootrom; 15.1 takes bootrom, and complains of
lpc.bootrom only if bootrom is missing.
Source: bhyverun_machdep.c, end of bhyve_optparse(), FreeBSD 15.1, read; the
complaint was seen on 15.1.

Confirmed in source, never run: bhyve reads the file of -k as soon as it meets
the option, and only notes -r.  bhyve then sets the snapshot's name, and after
that the command line's, which wins.  The topology comes from -k and must
multiply to the cpus of -k.  The snapshot's ncpus and memsize replace cpus and
memory.size; memory.wired stays the configuration's.
Source: fel1x-developer/freebsd-src@2d614aa2 usr.sbin/bhyve/bhyverun.c, main();
the same in revytechinc/freebsd-src-nested-vm@02c13c93.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bhystream.backend.bhyve.keys import BACKENDS, KEY, NAME, VALUE, refuse, shown, told

_TWO_NAMES = {"lpc.bootrom": "bootrom", "lpc.bootvars": "bootvars"}


def config_file(keys: Mapping[str, str]) -> str:
    """Return the text of a bhyve_config(5) file.

    keys: the whole configuration, with this host's resources.
    An interface whose name begins with no backend's prefix gets type=tap,
    because bhyve infers the type from the name.  Source: net_backends.c,
    netbe_init().  Raises IncompatibleError for a key or value that cannot stand
    in such a file.
    """
    whole = dict(keys)
    for key, value in list(whole.items()):
        if key.endswith(".backend") and not value.startswith(BACKENDS):
            whole.setdefault(f"{key.removesuffix('backend')}type", "tap")
        if key in _TWO_NAMES:
            whole[_TWO_NAMES[key]] = value
    lines = []
    for key, value in sorted(whole.items()):
        if not KEY.fullmatch(key) or not VALUE.fullmatch(value):
            raise refuse(f"{told(shown(key), value)} cannot be written")
        lines.append(f"{key}={value}\n")
    return "".join(lines)


def argv(program: Sequence[str], name: str, config_path: str, snapshot_path: str) -> list[str]:
    """Return the argv that restores a guest.

    program: the words that run bhyve.  name: the guest's name here, which wins
    over the snapshot's.  config_path: a file with config_file()'s text.
    snapshot_path: the memory file of a snapshot, with .kern and .meta beside
    it.  Raises IncompatibleError if the name cannot be a guest's.
    """
    if not NAME.fullmatch(name):
        raise refuse(f"name: {shown(name)} cannot be a guest's")
    return [*program, "-k", config_path, "-r", snapshot_path, name]
