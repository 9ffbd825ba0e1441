"""Which host this is: FreeBSD, or a stand-in's directory.

A module of its own, so that what the two are made of need not know them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from bhystream.backend.bhyve.host import VMM_DIR, Host


def open_host(environment: Mapping[str, str] = os.environ) -> Host:
    """Return the host: the stand-in's where BHYSEND_VMM_DIR names one, else FreeBSD's.

    Raises NoBhyveError on a system that has neither.
    """
    directory = environment.get(VMM_DIR)
    if directory:
        from bhystream.standin.kernel import StandinHost

        return StandinHost(Path(directory))
    from bhystream.backend.bhyve.freebsd import FreeBsdHost

    return FreeBsdHost()
