"""Configuration -> what bhyve is started with.

Everything is handed over in a bhyve_config(5) file, `bhyve -k FILE`: it has no
quoting, and no value of it can become another option.

A boot ROM and its variables are written under both their names: 14 knows
lpc.bootrom and passes over bootrom, 15.1 takes bootrom, and complains of
lpc.bootrom only where it stands alone.
Source: bhyverun_machdep.c, end of bhyve_optparse(), FreeBSD 15.1, read; the
complaint was seen there.

Confirmed in source, never run: -k is read where it stands, -r is only noted;
then the snapshot's name is set, then the command line's over it.  The
topology comes from -k and must multiply to its cpus; ncpus and memsize of the
snapshot replace cpus and memory.size, memory.wired stays the configuration's.
Source: fel1x-developer/freebsd-src@2d614aa2 usr.sbin/bhyve/bhyverun.c, main();
revytechinc/freebsd-src-nested-vm@02c13c93, the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bhystream.backend.bhyve.keys import BACKENDS, KEY, NAME, VALUE, refuse, shown, told

_TWO_NAMES = {"lpc.bootrom": "bootrom", "lpc.bootvars": "bootvars"}


def config_file(keys: Mapping[str, str]) -> str:
    """Return the text of a bhyve_config(5) file.

    keys: the whole configuration, this host's resources too.
    An interface whose name begins with no backend's prefix gets type=tap:
    bhyve infers the type from the name.  Source: net_backends.c, netbe_init().
    Raises IncompatibleError for what cannot stand in such a file.
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

    program: the words that run bhyve.  name: the guest's here.  config_path:
    of config_file()'s text.  snapshot_path: the memory file of a snapshot,
    with .kern and .meta beside it.  The name on the command line wins over the snapshot's.
    """
    if not NAME.fullmatch(name):
        raise refuse(f"name: {shown(name)} cannot be a guest's")
    return [*program, "-k", config_path, "-r", snapshot_path, name]
