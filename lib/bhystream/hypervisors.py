"""The one module that knows every hypervisor.

An operand names its hypervisor by its form, a stream by its HOST section, a
record by the "hypervisor" of its revive data:

    web1                 a bhyve guest of this host; if BHYSEND_VMM_DIR names
                         a stand-in's directory, a guest of the stand-in
    qemu:/run/web1.qmp   a QEMU guest
    ./web1.ckp, /a/ckp   bhyve's snapshot files, which are sent and received cold

A backend is imported when it is needed, so a program loads only one backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from bhystream.errors import GuestError, IncompatibleError, UsageError
from bhystream.guest import BHYVE, GUEST_NAME

if TYPE_CHECKING:
    from bhystream.backend.base import Paused, Sink, Snapshot, Source
    from bhystream.backend.bhyve.host import Host
    from bhystream.stream.contents import Contents

_QEMU = "qemu:"


class Sending(NamedTuple):
    """What the command line says about a source.

    operand: as above; open_source() does not take the path of snapshot files.
    config: -C, or None.  force: -f.  base: the state directory.
    """

    operand: str
    base: Path
    config: str | None = None
    force: bool = False

    @property
    def is_cold(self) -> bool:
        """Say whether the operand is the path of snapshot files."""
        return "/" in self.operand and not self.operand.startswith(_QEMU)


class Receiving(NamedTuple):
    """What the command line and the stream say about a sink.

    operand: the destination's, or None for the guest's name in the stream.
    base: the state directory.  id_: the stream's id.  resources: -o.  dropped:
    -x.  directory: -S, or None.  force: -f.  is_kept: the stream is of the kept
    form.  unstarted: -u.  below: --below.
    """

    operand: str | None
    base: Path
    id_: str
    resources: Mapping[str, str] = MappingProxyType({})
    dropped: Sequence[str] = ()
    directory: str | None = None
    force: bool = False
    is_kept: bool = False
    unstarted: bool = False
    below: Sequence[str] = ()


def open_source(what: Sending, on_wait: Callable[[], None] = lambda: None) -> Source:
    """Open the guest that an operand names.

    on_wait: called now and then while this waits for the hypervisor; what it raises ends the wait.

    Raises UsageError if the operand cannot name a guest of this host, GuestError,
    AccessError, and IncompatibleError if the guest cannot be moved.
    """
    if what.operand.startswith(_QEMU):
        if what.config is not None:
            raise UsageError("-C: QEMU tells its own configuration")
        from bhystream.backend.qemu.source import QemuSource

        return QemuSource(_qmp_path(what.operand), force=what.force, on_wait=on_wait)
    name = _name(what.operand)
    host = _host_of(f"guest {name}: bhyve guests live on FreeBSD")
    from bhystream.backend.bhyve.source import BhyveSource

    return BhyveSource(host, name, what.base, what.config, force=what.force)


def open_host(environment: Mapping[str, str] = os.environ) -> Host:
    """Return the stand-in's host if BHYSEND_VMM_DIR names one, else FreeBSD's.

    Raises NoBhyveError if this system has neither.
    """
    from bhystream.backend.bhyve.host import VMM_DIR

    directory = environment.get(VMM_DIR)
    if directory:
        from bhystream.standin.kernel import StandinHost

        return StandinHost(Path(directory))
    from bhystream.backend.bhyve.freebsd import FreeBsdHost

    return FreeBsdHost()


def recorded_host(vmm_dir: str) -> Host:
    """Return the host of a record.  vmm_dir: the stand-in's directory, "" for FreeBSD.

    Raises NoBhyveError if this system has no such host.
    """
    from bhystream.backend.bhyve.host import VMM_DIR

    return open_host({VMM_DIR: vmm_dir} if vmm_dir else {})


def _host_of(why: str) -> Host:
    """Return the host of a bhyve operand.

    Raises UsageError, which begins with `why`, if this system has no bhyve.
    """
    from bhystream.backend.bhyve.host import NoBhyveError

    try:
        return open_host()
    except NoBhyveError:
        raise UsageError(f"{why}; a QEMU guest is qemu:/path/to/qmp.sock") from None


def open_snapshot(what: Sending) -> Snapshot:
    """Open the snapshot files that an operand names.

    Raises UsageError if this host has no bhyve, GuestError, AccessError.
    """
    from bhystream.backend.bhyve import identity
    from bhystream.backend.bhyve.cold import SnapshotSource
    from bhystream.backend.bhyve.opened import read_config
    from bhystream.backend.bhyve.snapshotfiles import Files, read_meta

    # The stream names the host of the files.
    host = _host_of(
        f"guest {what.operand}: bhyve's snapshot files are sent from their FreeBSD host"
    )
    path = Path(what.operand).absolute()
    section = None
    if what.config is not None:
        meta, _ = read_meta(Files(path.parent, path.name))
        section = read_config(what.config, meta.vmname).section
    return SnapshotSource(path, section, identity.describe(host))


def open_contents(hypervisor: str) -> Contents | None:
    """Return the checker of a hypervisor's sections in one stream; None if it is not known here."""
    if hypervisor in BHYVE:
        from bhystream.backend.bhyve.contents import BhyveContents

        return BhyveContents()
    if hypervisor == "qemu":
        from bhystream.backend.qemu.contents import QemuContents

        return QemuContents()
    return None


def open_sink(hypervisor: str, stream_name: str, what: Receiving) -> tuple[Sink, str, str]:
    """Return the sink for a stream's hypervisor, and the guest's name and operand here.

    Raises IncompatibleError if the hypervisor is not known here; UsageError.
    """
    if hypervisor in BHYVE:
        return _open_bhyve(hypervisor, stream_name, what)
    if hypervisor != "qemu":
        raise IncompatibleError(f"the guest's hypervisor {hypervisor!r} is not known here")
    if what.directory is not None or what.dropped:
        raise UsageError("-S and -x are for guests of bhyve; this one runs under QEMU")
    from bhystream.backend.qemu.sink import QemuSink

    name = stream_name
    if what.operand is not None and what.operand.startswith(_QEMU):
        path = _qmp_path(what.operand)
    else:
        name = _name(what.operand or stream_name)
        path = str(what.base / f"{name}.qmp")
    sink = QemuSink(
        path,
        what.resources,
        name,
        state_dir=str(what.base),
        force=what.force,
        below=what.below,
    )
    return sink, name, _QEMU + path


def _open_bhyve(hypervisor: str, stream_name: str, what: Receiving) -> tuple[Sink, str, str]:
    name = _name(what.operand or stream_name)
    if what.directory is not None:
        from bhystream.backend.bhyve.cold import FilesSink

        directory = Path(what.directory).absolute()
        return FilesSink(directory, name, force=what.force), name, str(directory / name)
    from bhystream.backend.bhyve.host import NoBhyveError
    from bhystream.backend.bhyve.sink import BhyveSink

    try:
        host = open_host()
    except NoBhyveError as error:
        raise IncompatibleError(
            f"guest {name}: it runs under {hypervisor}; {error}",
            "bhyrecv -S directory makes snapshot files of the guest, on any host",
        ) from None
    sink = BhyveSink(
        host,
        name,
        what.resources,
        what.dropped,
        what.base,
        what.id_,
        force=what.force,
        is_kept=what.is_kept,
        unstarted=what.unstarted,
        below=what.below,
    )
    return sink, name, name


def _name(operand: str) -> str:
    if not GUEST_NAME.fullmatch(operand):
        raise UsageError(
            f"guest {operand}: not a guest's name, nor qemu:/path/to/qmp.sock,"
            " nor the path of snapshot files"
        )
    return operand


def _qmp_path(operand: str) -> str:
    path = operand.removeprefix(_QEMU)
    if not path.startswith("/"):
        raise UsageError(f"guest {operand}: the path of the QMP socket is not absolute")
    return path


def open_paused(revive: Mapping[str, Any]) -> Paused:
    """Find a recorded guest again.  Raises GuestError if the record cannot be used here."""
    kind = revive.get("hypervisor")
    if kind in BHYVE and revive.get("role") == "source":
        from bhystream.backend.bhyve.paused import open_paused

        return open_paused(revive, recorded_host)
    if kind in BHYVE:
        from bhystream.backend.bhyve.loaded import open_loaded

        return open_loaded(revive, recorded_host)
    if kind != "qemu":
        raise GuestError(f"the record's hypervisor {kind!r} is not known here")
    from bhystream.backend.qemu.paused import open_paused as open_qemu

    return open_qemu(revive)


def was_never_released(revive: Mapping[str, Any]) -> bool:
    """Say whether a guest of the destination never ran, and nobody can start it any more.

    revive: the revive field of a record whose bhyrecv has ended.  Returns False if
    this is not known, as for every guest of QEMU: a paused guest of QEMU may have run
    before.  Raises GuestError.
    """
    if revive.get("hypervisor") not in BHYVE:
        return False
    from bhystream.backend.bhyve.loaded import open_loaded

    return open_loaded(revive, recorded_host).was_never_released()


def lies_in_files(revive: Mapping[str, Any]) -> bool:
    """Say whether a guest of the destination lies in files from which it can be started.

    The files are removed when the guest runs, so a guest that was told to run
    and still has its files may never have run.  Returns False for QEMU's guests.
    Raises GuestError.
    """
    if revive.get("hypervisor") not in BHYVE or revive.get("role") != "destination":
        return False
    from bhystream.backend.bhyve.loaded import open_loaded

    return open_loaded(revive, recorded_host).lies_in_files()
