"""The one place that knows which hypervisors there are.

An operand names its hypervisor by a prefix ("qemu:/path"), a stream by its
HOST section, a record by the "hypervisor" of its revive data.  Backends are
imported here when one is needed, so a start pays for one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bhystream.backend.base import Paused, Sink, Source
from bhystream.errors import GuestError, IncompatibleError, UsageError
from bhystream.format import GUEST_NAME

_QEMU = "qemu:"


def open_source(operand: str) -> Source:
    """Open the running guest that an operand names.

    Raises UsageError for an operand that names none, GuestError, and
    IncompatibleError for a guest that cannot be moved.
    """
    if not operand.startswith(_QEMU):
        raise UsageError(f"guest {operand}: not qemu:/path/to/qmp.sock")
    from bhystream.backend.qemu.source import QemuSource

    return QemuSource(_qmp_path(operand))


def open_sink(
    hypervisor: str,
    operand: str | None,
    stream_name: str,
    resources: Mapping[str, str],
    base: Path,
    *,
    force: bool,
) -> tuple[Sink, str, str]:
    """Return the sink for a stream's hypervisor, the guest's name and operand here.

    operand: the destination's, or None for the stream's name.  Raises
    IncompatibleError for a hypervisor that is not known.
    """
    if hypervisor != "qemu":
        raise IncompatibleError(f"the guest's hypervisor {hypervisor!r} is not known here")
    from bhystream.backend.qemu.sink import QemuSink

    name = stream_name
    if operand is not None and not operand.startswith(_QEMU):
        if not GUEST_NAME.fullmatch(operand):
            raise UsageError(f"guest {operand}: not a guest's name, nor qemu:/path/to/qmp.sock")
        name = operand
        path = str(base / f"{name}.qmp")
    elif operand is not None:
        path = _qmp_path(operand)
    else:
        path = str(base / f"{name}.qmp")
    sink = QemuSink(path, resources, name, state_dir=str(base), force=force)
    return sink, name, _QEMU + path


def _qmp_path(operand: str) -> str:
    path = operand.removeprefix(_QEMU)
    if not path.startswith("/"):
        raise UsageError(f"guest {operand}: the path of the QMP socket is not absolute")
    return path


def open_paused(revive: Mapping[str, Any]) -> Paused:
    """Find a recorded guest again.  Raises GuestError if it is not the same."""
    if revive.get("hypervisor") != "qemu":
        raise GuestError(f"the record's hypervisor {revive.get('hypervisor')!r} is not known here")
    from bhystream.backend.qemu.paused import open_paused as open_qemu

    return open_qemu(revive)
