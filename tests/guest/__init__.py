"""A real Linux guest that proves its own memory and disk, and the code that boots and watches it.

proof.c is the guest's only program; build.py makes its initramfs and fetches
its kernel; machine.py starts QEMU; qmp.py asks QEMU one question at a time;
ram.py finds and patches pages in its RAM file; serial.py reads what the guest
prints.  `PYTHONPATH=tests python -m guest` boots one by hand.
"""

from .build import BuildError, Images, images
from .machine import MACHINE_TYPES, Guest, Spec, make_disk, reaping
from .qmp import QmpError, peer_pid
from .serial import (
    Gap,
    GuestDied,
    Heartbeat,
    Serial,
    SerialLog,
    Stamps,
    assert_unbroken,
    handover_gap,
)

__all__ = [
    "MACHINE_TYPES",
    "BuildError",
    "Gap",
    "Guest",
    "GuestDied",
    "Heartbeat",
    "Images",
    "QmpError",
    "Serial",
    "SerialLog",
    "Spec",
    "Stamps",
    "assert_unbroken",
    "handover_gap",
    "images",
    "make_disk",
    "peer_pid",
    "reaping",
]
