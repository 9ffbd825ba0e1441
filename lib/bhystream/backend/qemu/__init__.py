"""The QEMU backend: a guest named by its QMP socket.

The pieces, in the order in which a move meets them:

    qmp.py        one QMP connection: whose it is, time limits, errors
    wire.py       its protocol: lines of JSON, ids, descriptors
    process.py    who listens at the socket: pid, start time, argv
    ram.py        the file behind guest memory: found, and walked
    facts.py      what only QMP knows: the pinned machine, the accelerator
    graph.py      the image in each drive now, and the jobs that work on disks
    plugged.py    whether the devices are still those of argv
    allow.py      every word that may travel, and every word that stays
    options.py    QEMU's own option syntax, taken apart
    config.py     argv of a running QEMU -> the CONFIG section, or a refusal
    devices.py    the parts of the argv that name a resource of the host
    cures.py      the words that cannot travel, and what to start QEMU with in their place
    validate.py   the check of a CONFIG section, hostile until it has passed
    contents.py   QemuContents: contents.Contents of the stream
    compare.py    two configurations, and how they differ
    image.py      what an image file leads QEMU to
    resources.py  the operator's -o key=value
    command.py    configuration + resources -> argv of the destination
    migration.py  the hand-over: capabilities, cancel, continue
    scope.py      the systemd scope in which QEMU outlives bhyrecv
    launch.py     one QEMU that we started: its log, its end
    empty.py      a QEMU of ours that waits for a guest, and its files
    load.py       the state into QEMU
    supervisors.py  the programs that would start a moved guest again
    verdict.py    the reasons against a guest on this host
    source.py     QemuSource: base.Source
    opened.py     an open guest: identity, configuration, memory
    sink.py       QemuSink: base.Sink
    wanted.py     what the operator wants here, and the reasons against it
    paused.py     open_paused(): base.Paused
    host.py       the host's part of the HOST section

The backend is for Linux only: SO_PEERCRED, /proc and pidfds identify a guest.
"""

from __future__ import annotations

from bhystream.backend.qemu.paused import open_paused
from bhystream.backend.qemu.sink import QemuSink
from bhystream.backend.qemu.source import QemuSource

__all__ = ["QemuSink", "QemuSource", "open_paused"]
