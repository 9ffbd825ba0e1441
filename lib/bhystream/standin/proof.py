"""How a guest knows what each of its pages, and each vCPU's FPU, must contain.

The content of a page is a function of the page's number and *generation*; nearly
all of the 4096 bytes change from one generation to the next.  Static pages have
generation 0 for ever.  Each vCPU has its own share of the working set, rewrites
these pages in a fixed order, over and over, and counts its steps in a register:
the generation of each page follows from that count alone.  So the vCPU that owns
a page finds out whether the page was lost, is old, or was torn while it was
copied; and after a register went back in time, the pages look like pages from
the future.

Every eighth generation of a page is zero, so that pages go from data to zero and
back while the guest moves.  Pages of the guest that are in no plan stay untouched.

The content of a vCPU's FPU (x87, XMM and the upper halves of YMM) is a function
of the vCPU's number and step count, and changes at each step: at its next step
the vCPU finds registers that were lost, are of another moment, or are another
vCPU's.

The boot parameters are in the boot page of guest memory, so that a restored
guest needs none of them on its command line.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from bhystream.guest import PAGE_BYTES

ZERO = bytes(PAGE_BYTES)

# Control pages lie below 1 MiB; the pages of the plans begin above.
BOOT_PAGE = 1
CLOCK_PAGE = 2
TIMER_PAGE = 3
UART_PAGE = 4
DEVICE_PAGE = 64
FIRST_PAGE = 256

# The content repeats after 17 bytes, so that no piece of 64, 512 or 2048 bytes fits at
# another place in its page.
_PERIOD = 17
_REPEATS = -(-PAGE_BYTES // _PERIOD)
_PAIR = struct.Struct("<QQ")
_NEARBY = 4096

# Touched pages lie in clusters, as an allocator leaves them, and not each by itself.
_CLUSTER = 16

# Places in a standard XSAVE image: x87 and XMM; the header's XSTATE_BV; upper halves of YMM.
X87_AT, _X87_BYTES = 32, 384
XSTATE_AT, _XSTATE = 512, (7).to_bytes(8, "little")
AVX_AT, _AVX_BYTES = 576, 256
_NEARBY_STEPS = 64

_BOOT = struct.Struct("<8sQQQQQQQ")
_MAGIC = b"STANDIN1"


def content(page: int, generation: int) -> bytes:
    """Return the 4096 bytes of a page in a generation."""
    if (page + generation) & 7 == 7:
        return ZERO
    return page_bytes(page, generation)


def page_bytes(page: int, number: int) -> bytes:
    """Return 4096 bytes, never all zero; for another number nearly all bytes are different."""
    digest: bytes = xxhash.xxh3_128_digest(_PAIR.pack(page, number), 0x5354414E)
    return ((digest + bytes(((number & 0x7F) + 1,))) * _REPEATS)[:PAGE_BYTES]


def describe(page: int, found: bytes, expected_generation: int) -> str:
    """Say what a wrong page contains: zero, a generation nearby, a torn page, or unknown bytes."""
    if found == ZERO:
        return "zero"
    first = max(0, expected_generation - _NEARBY)
    torn = ""
    for generation in range(expected_generation + _NEARBY, first - 1, -1):
        candidate = content(page, generation)
        if candidate == found:
            return f"generation {generation}"
        if not torn and candidate[:64] == found[:64]:
            torn = f"torn, begins as generation {generation}"
    return torn or f"unknown {found[:8].hex()}"


def fpu_registers(vcpu: int, step: int) -> tuple[tuple[int, bytes], ...]:
    """Return the FPU's content after a step: (offset in an XSAVE image, bytes) of each part."""
    digest: bytes = xxhash.xxh3_128_digest(_PAIR.pack(vcpu, step), 0x465055)
    repeats = _X87_BYTES // len(digest), _AVX_BYTES // len(digest)
    return (
        (X87_AT, digest * repeats[0]),
        (XSTATE_AT, _XSTATE),
        (AVX_AT, digest[::-1] * repeats[1]),
    )


def describe_fpu(vcpu: int, found: bytes, expected_step: int) -> str:
    """Say what wrong x87 and XMM registers contain: nothing, a step nearby, or unknown bytes."""
    if not any(found):
        return "nothing, as after a reset"
    first = max(0, expected_step - _NEARBY_STEPS)
    for step in range(expected_step + _NEARBY_STEPS, first - 1, -1):
        if fpu_registers(vcpu, step)[0][1] == found:
            return f"step {step}"
    return f"unknown {found[-8:].hex()}"


@dataclass(frozen=True)
class Boot:
    """The parameters of a guest.

    ncpus, npages: vCPUs and memory of the machine.  touched_pages: pages written
    once at boot.  working_pages: touched pages that are rewritten over and over.
    rate: bytes a second that all vCPUs together rewrite, 0 for as many as they
    can.  sweep_rate: bytes a second that all vCPUs together check in sweeps.
    waiting: the number of vCPUs, the last ones, that the guest never starts.
    """

    ncpus: int
    npages: int
    touched_pages: int
    working_pages: int
    rate: int
    sweep_rate: int
    waiting: int = 0

    @property
    def started(self) -> int:
        """The number of vCPUs that the guest starts."""
        return self.ncpus - self.waiting

    def pack(self) -> bytes:
        """Return the boot page."""
        packed = _BOOT.pack(
            _MAGIC,
            self.ncpus,
            self.npages,
            self.touched_pages,
            self.working_pages,
            self.rate,
            self.sweep_rate,
            self.waiting,
        )
        return packed + xxhash.xxh3_64_digest(packed) + bytes(PAGE_BYTES - _BOOT.size - 8)


def unpack_boot(data: bytes) -> Boot | None:
    """Return the parameters of a boot page, None if the page is not as pack() made it."""
    magic, *numbers = _BOOT.unpack_from(data)
    boot = Boot(*numbers)
    return boot if magic == _MAGIC and boot.pack() == data else None


@dataclass(frozen=True)
class Plan:
    """The pages of one vCPU.

    working: page numbers, in the order of rewriting.  static: numbers of pages
    that are never rewritten.
    """

    working: tuple[int, ...]
    static: tuple[int, ...]

    def at(self, step: int) -> tuple[int, int]:
        """Return the page that a step rewrites, and the page's generation before that step."""
        generation, index = divmod(step, len(self.working))
        return self.working[index], generation

    @property
    def npages(self) -> int:
        """The number of pages, static and working."""
        return len(self.static) + len(self.working)

    def held(self, index: int, step: int) -> tuple[int, int]:
        """Return a page and its generation before a step.

        index: counts through the static pages, then the working pages.
        """
        if index < len(self.static):
            return self.static[index], 0
        generation, done = divmod(step, len(self.working))
        index -= len(self.static)
        return self.working[index], generation + (index < done)


def make_plans(boot: Boot) -> list[Plan]:
    """Return the plan of each vCPU that the guest starts.

    Each plan has at least one working page.
    """
    pages = _scatter(boot.npages, boot.touched_pages)
    every = max(1, len(pages) // boot.working_pages)
    working = pages[::every][: boot.working_pages]
    rest = sorted(set(pages) - set(working))
    plans = []
    for vcpu in range(boot.started):
        own = working[vcpu :: boot.started]
        plans.append(Plan(tuple(_shuffled(own)), tuple(rest[vcpu :: boot.started])))
    return plans


def _scatter(npages: int, touched: int) -> list[int]:
    """Spread clusters of pages evenly over all of the memory above the control pages."""
    usable = (npages - FIRST_PAGE) // _CLUSTER
    wanted = -(-touched // _CLUSTER)
    pages: list[int] = []
    for cluster in range(wanted):
        first = FIRST_PAGE + cluster * usable // wanted * _CLUSTER
        pages.extend(range(first, first + _CLUSTER))
    return pages[:touched]


def _shuffled(pages: list[int]) -> list[int]:
    """Return the pages in an order without a pattern, which is the same each time."""
    return sorted(pages, key=lambda page: xxhash.xxh3_64_intdigest(_PAIR.pack(page, 0), 7))
