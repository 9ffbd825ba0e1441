"""The QEMU backend: a guest named by its QMP socket.

The pieces, in the order in which a move meets them:

    qmp.py        one QMP connection: time limits, descriptors, errors
    process.py    who listens at the socket: pid, start time, argv
    ram.py        the file behind guest memory: found, and walked
    facts.py      what only QMP knows: the pinned machine, the accelerator
    graph.py      what is in each drive now, and the jobs that work on it
    plugged.py    whether the devices are still those of argv
    allow.py      every word that may travel, and every word that stays
    options.py    QEMU's own option syntax, taken apart
    config.py     argv of a running QEMU -> the CONFIG section, or a refusal
    devices.py    the parts of it that name a resource of the host
    validate.py   a CONFIG section from a stream is hostile until it passes
    contents.py   QemuContents: stream's Contents
    compare.py    two configurations, and how they differ
    resources.py  the operator's -o key=value
    command.py    configuration + resources -> argv of the destination
    migration.py  the hand-over: capabilities, cancel, continue
    scope.py      where it is started, so that it outlives us
    launch.py     one QEMU started by us: its log, its end
    empty.py      a QEMU of ours that waits, and all that was made for it
    load.py       the state into QEMU
    supervisors.py  what would start a guest again that has moved
    verdict.py    the reasons against a guest on this host
    source.py     QemuSource: base.Source
    opened.py     which guest it is, what it is made of, its memory
    sink.py       QemuSink: base.Sink
    wanted.py     what is wanted of the guest here, and whether it can be had
    paused.py     open_paused(): base.Paused
    host.py       the host's half of the HOST section

Linux only: SO_PEERCRED, /proc and pidfd carry the identity of a guest.
"""

from __future__ import annotations

from bhystream.backend.qemu.paused import open_paused
from bhystream.backend.qemu.sink import QemuSink
from bhystream.backend.qemu.source import QemuSource

__all__ = ["QemuSink", "QemuSource", "open_paused"]
