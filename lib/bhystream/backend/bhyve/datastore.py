"""vm-bhyve's guests, found in its datastores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bhystream.backend.bhyve.keys import NAME

if TYPE_CHECKING:
    from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest


def find(datastores: Sequence[Path], name: str, hostname: str) -> VmBhyveGuest | None:
    """Return vm-bhyve's guest of that name, the first in the datastores' order, or None.

    datastores: from Host.datastores(), the default one first.
    """
    if not NAME.fullmatch(name):
        return None
    for datastore in datastores:
        directory = datastore / name
        if (directory / f"{name}.conf").is_file():
            from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest

            return VmBhyveGuest(name, directory, hostname)
    return None
