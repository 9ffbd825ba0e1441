"""Move live guests through plain pipes: the package behind bhysend(8) and bhyrecv(8).

The package is named for the format that it speaks, bhystream(5).  Dependencies
point one way: errors, format, reader and writer, memory and precopy, the
engines, and last the two programs.  Only the programs know a hypervisor.
"""

__version__ = "0.1.0"
