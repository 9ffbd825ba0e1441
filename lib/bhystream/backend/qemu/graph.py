"""The block graph of a running QEMU: the image in each drive now, and what else uses the disks.

argv tells only what QEMU started with.  Since then a snapshot or a mirror may
have put another image under a disk, a tray may have been emptied or filled, and
a job may copy from a disk or to a disk.  The pause does not end such a job: the
job goes on writing, and QEMU fails an assertion and dies when the state is taken
(seen with 7.2: bdrv_co_write_req_prepare(), BDRV_O_INACTIVE).  If QEMU survives,
the job does not move along, and its work is lost without a message.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bhystream.backend.files import identity
from bhystream.backend.qemu.options import protocol_of
from bhystream.backend.qemu.qmp import Qmp
from bhystream.errors import AccessError, GuestError
from bhystream.strict_json import loads

# The drivers below an image format; as the top node of a drive they mean a raw image.
PROTOCOLS = frozenset({"file", "host_device", "host_cdrom", "nbd", "rbd", "iscsi", "ssh"})
LOCAL = ("file", "host_device", "host_cdrom")
# Names of descriptors that were passed to QEMU; such a name is no path.
DESCRIPTORS = ("/dev/fdset/", "/dev/fd/", "/proc/self/fd/")
_ENDED = frozenset({"concluded", "null"})


@dataclass(frozen=True)
class Medium:
    """An image in a drive.

    node: the image's name in the graph.  format: "raw", "qcow2", or a filter's
    name.  size_bytes: as the guest sees the image.  file: the name that QEMU has
    opened.  is_there: False if a local file's path now leads to another file, or
    to none.
    """

    node: str
    format: str
    size_bytes: int
    is_read_only: bool
    file: str
    is_there: bool = True


@dataclass(frozen=True)
class Drive:
    """One drive of the guest.

    label: the id of the -drive, or QEMU's own name for it; "" for a -blockdev.
    device: the id of the device that uses the drive, "" if the device has no id.
    medium: None if the drive is empty.
    """

    label: str
    device: str
    is_removable: bool
    medium: Medium | None


def drives(qmp: Qmp, directory: str) -> tuple[Drive, ...]:
    """Return QEMU's drives, each with its image now.  Source: query-block.

    directory: QEMU's working directory.  Raises GuestError, or AccessError if we
    may not see QEMU's open files.
    """
    opened = _open_files(qmp.pid)

    def medium(inserted: Mapping[str, Any] | None) -> Medium | None:
        found = _medium(inserted)
        if found is None or is_open(found.file, directory, qmp.pid, opened):
            return found
        return replace(found, is_there=False)

    def made(blocks: Any) -> tuple[Drive, ...]:
        return tuple(
            Drive(
                str(each.get("device", "")),
                _device_id(str(each.get("qdev", ""))),
                bool(each.get("removable")),
                medium(each.get("inserted")),
            )
            for each in blocks
        )

    return qmp.ask("query-block", made, doing="examine the disks")


def _device_id(qdev: str) -> str:
    """Return the id in "vd0" or "/machine/peripheral/vd0/virtio-backend"."""
    parts = qdev.split("/")
    if len(parts) == 1:
        return qdev
    return parts[3] if parts[2:3] == ["peripheral"] and len(parts) > 3 else ""


def _medium(inserted: Mapping[str, Any] | None) -> Medium | None:
    if not inserted:
        return None
    driver = str(inserted.get("drv", ""))
    return Medium(
        str(inserted.get("node-name", "")),
        "raw" if driver in PROTOCOLS else driver,
        int(inserted.get("image", {}).get("virtual-size", 0)),
        bool(inserted.get("ro")),
        file_of(str(inserted.get("file", ""))),
    )


def file_of(name: str) -> str:
    """Return the innermost file name in a "json:{...}", any other name as it is."""
    if not name.startswith("json:"):
        return name
    try:
        node = loads(name[len("json:") :])
        while isinstance(node.get("file"), dict):
            node = node["file"]
        return str(node.get("filename", name))
    except (ValueError, AttributeError):
        return name


def local_path(name: str, directory: str) -> str | None:
    """Return the absolute path for a file name of QEMU's; None if it names no local file.

    directory: the working directory of the QEMU that was given the name.
    """
    name = file_of(name)
    protocol = protocol_of(name)
    if protocol in LOCAL:
        name = name[len(protocol) + 1 :]
    elif protocol:
        return None
    return os.path.normpath(os.path.join(directory, name))


def raw_disks(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a guest's disks whose images have the bytes that the guest sees.

    These are compared at the destination; a CD, which the guest never writes, is not.
    """
    return [
        disk["key"]
        for disk in config["disks"]
        if not disk["empty"]
        and disk["props"].get("format") == "raw"
        and disk["props"].get("media") != "cdrom"
    ]


def refuse_jobs(qmp: Qmp) -> None:
    """Raise GuestError if a job or another program works on the guest's disks."""
    for error in users(qmp):
        raise error


def users(qmp: Qmp) -> Iterator[GuestError]:
    """Yield an error for each job, and for each other program, that works on the guest's disks.

    A job that has ended, and only waits to be dismissed, no longer works on them.
    """
    for job in qmp.ask("query-jobs", _tables, doing="examine the jobs"):
        if job.get("status") not in _ENDED:
            name = str(job.get("id", ""))
            yield GuestError(
                f"{qmp.who}: the job '{name}' ({job.get('type')}, {job.get('status')}) works on"
                " the guest's disks: the job may make QEMU die in the pause, and does not move"
                " along",
                hint=f"wait until the job ends, or end it (QMP: job-complete or job-cancel,"
                f" id {name})",
            )
    for export in qmp.ask("query-block-exports", _tables, doing="examine the exports"):
        name = str(export.get("id", ""))
        yield GuestError(
            f"{qmp.who}: the {export.get('type')} export '{name}' gives one of the guest's disks"
            " to another program, and does not move along",
            hint=f"end the export first (QMP: block-export-del, id {name})",
        )


def _tables(reply: Any) -> list[dict[str, Any]]:
    """Return the items of a list; each is a table."""
    return [dict(each) for each in reply]


def _open_files(pid: int) -> frozenset[str]:
    """Return the identities of all files that a process has open.

    Raises AccessError if we may not see these files, GuestError if the process has ended.
    """
    found = set()
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError as error:
        kind = AccessError if isinstance(error, PermissionError) else GuestError
        raise kind(f"cannot see the files of process {pid}: {error.strerror}") from None
    for name in names:
        with contextlib.suppress(OSError):  # closed meanwhile
            found.add(identity(os.stat(os.path.join(directory, name))))
    return frozenset(found)


def is_open(file: str, directory: str, pid: int, opened: frozenset[str]) -> bool:
    """Say whether a name leads to a file that QEMU has open; True if the name is no path.

    directory, pid: QEMU's.  opened: the identities of QEMU's open files.
    """
    path = local_path(file, directory)
    if path is None or path.startswith(DESCRIPTORS):
        return True
    if directory == "/" and not file_of(file).startswith("/"):
        return True  # a QEMU with -daemonize has changed to / after it opened the disks
    try:
        # This is the path as QEMU sees it, whatever QEMU's root and mounts are.
        return identity(os.stat(f"/proc/{pid}/root{path}")) in opened
    except (OSError, ValueError):  # ValueError: no file can have such a name
        return False
