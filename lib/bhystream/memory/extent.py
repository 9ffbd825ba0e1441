"""The packed extent, of which the list of a MEMORY section consists.

A list has the same bytes in memory as in the stream; page.pxd declares the same
structure for the loops.
"""

from __future__ import annotations

import struct

# The first page, the number of pages, and their kind.
EXTENT = struct.Struct("<QII")
KIND_DATA = 0
KIND_ZERO = 1
