"""Move live guests through plain pipes: the package behind bhysend(8) and bhyrecv(8).

The package is named for its stream format, bhystream(5).  A module imports
only what stands above it in this list, which tests/test_directions.py checks:

    errors units guest ...   the vocabulary of all other modules
    memory                   pages: the loops
    stream                   bhystream(5), read and written
    backend/                 bhyve and QEMU, behind the protocols of base.py
    hypervisors              the one module that knows every backend
    handover                 what both programs know of the protocol
    send, recv               the two programs, which do not import each other
"""

__version__ = "0.1.0"
