"""The packed extent: the list of a MEMORY section, as the loops make it and take it.

A section's list lies in memory as it does in the stream; page.pxd has the same
structure for the loops.
"""

from __future__ import annotations

import struct

# The first page, how many, and what they are.
EXTENT = struct.Struct("<QII")
KIND_DATA = 0
KIND_ZERO = 1
