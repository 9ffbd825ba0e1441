"""Move live guests through plain pipes: the package behind bhysend(8) and bhyrecv(8).

The package is named for the format that it speaks, bhystream(5).  Dependencies
point one way, and tests/test_directions.py holds them to it:

    errors units guest ...   what everything speaks with; it knows nothing above
    memory                   pages: the loops
    stream                   bhystream(5), read and written
    backend/                 bhyve and QEMU, behind the protocols of base.py
    hypervisors              the one place that knows which backends there are
    handover                 what both sides know of the protocol
    send, recv               the two programs, which do not know each other
"""

__version__ = "0.1.0"
