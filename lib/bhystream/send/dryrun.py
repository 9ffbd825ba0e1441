"""bhysend -n: what a move would be like, without touching the guest.

Two scans over the pages that the guest has touched, a second apart, give the
guest's size and its rate of change; from these the policy forecasts the rounds on
a link of a given rate.  The guest runs on, and nothing is paused.  Memory that the
guest has never touched is not read, so that this memory stays unallocated.

Into a pipe bhysend writes a stream with a head and no memory, for a `bhyrecv -n` at
the other end, which gives the destination's verdict.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bhystream.errors import EXIT_OK, BhyError, InternalError
from bhystream.guest import PAGE_BYTES, Head
from bhystream.memory.page import PageHasher, PageHashes, mark_changed, mark_extents
from bhystream.report import Console
from bhystream.send.head import new_header, new_seed, write_head
from bhystream.send.options import SendOptions
from bhystream.send.precopy import Limits, forecast
from bhystream.send.strides import bitmap, strides
from bhystream.signals import Signals
from bhystream.stream.format import Feature, Form
from bhystream.stream.writer import Writer, write_all
from bhystream.units import NS, counted, duration, size

if TYPE_CHECKING:
    from bhystream.backend.base import Described, Readable

_STDOUT = 1
_EXPOSURE_SECONDS = 1.0
_LINKS = (("1 Gbit/s", 10**9 / 8), ("10 Gbit/s", 10**10 / 8), ("25 Gbit/s", 25 * 10**9 / 8))


class Survey(NamedTuple):
    """The result of two scans.

    touched_pages: allocated at the source.  data_pages: other than zero.
    changed_pages: changed between the scans, in changed_extents runs of pages.
    exposure_ns: from the start of one scan to that of the other.  scan_ns: the time
    that the second scan took.
    """

    npages: int
    touched_pages: int
    data_pages: int
    changed_pages: int
    changed_extents: int
    exposure_ns: int
    scan_ns: int

    @property
    def dirty_bytes(self) -> float:
        """Return the bytes that the guest changes per second."""
        return self.changed_pages * PAGE_BYTES * NS / max(self.exposure_ns, 1)


class _Scanner:
    """Repeated scans of one guest, against one hash table.  bits: the pages that changed."""

    def __init__(self, source: Readable, head: Head) -> None:
        self._source = source
        self._layout = head.layout
        self.npages = head.layout.npages
        self._memory = source.memory()
        self._hasher = PageHasher(new_seed())
        self._table = PageHashes(self._hasher, self.npages)
        self.bits = bitmap(self.npages)

    def scan(self) -> tuple[int, int]:
        """Return (touched pages, pages that differ from the last scan, or at first from zero)."""
        touched = bitmap(self.npages)
        npages = mark_extents(self._source.touched(), touched)
        changed = sum(
            mark_changed(
                self._hasher,
                self._memory[segment],
                base,
                first,
                end,
                self._table,
                touched,
                self.bits,
            )
            for segment, base, first, end in strides(self._layout)
        )
        return npages, changed

    def clear(self) -> None:
        """Forget which pages changed."""
        self.bits = bitmap(self.npages)


def places(bits: memoryview) -> int:
    """Count the runs of ones in a bitmap of little-endian words.

    A run begins at each one above a zero.  With all bits in one integer, the count takes
    20 ms for a guest of 64 GiB, whose scan takes seconds.
    """
    ones = int.from_bytes(bits, "little")
    return (ones & ~(ones << 1)).bit_count()


def survey(source: Readable, head: Head) -> Survey:
    """Scan the guest twice, which takes a second and the time of the scans.

    Raises what the methods of Readable raise.
    """
    scanner = _Scanner(source, head)
    first_ns = time.monotonic_ns()
    _, data = scanner.scan()
    scanner.clear()
    time.sleep(_EXPOSURE_SECONDS)
    second_ns = time.monotonic_ns()
    touched, changed = scanner.scan()
    return Survey(
        npages=scanner.npages,
        touched_pages=touched,
        data_pages=data,
        changed_pages=changed,
        changed_extents=places(scanner.bits),
        exposure_ns=second_ns - first_ns,
        scan_ns=time.monotonic_ns() - second_ns,
    )


def run(
    source: Described, opts: SendOptions, base: Path, console: Console, signals: Signals
) -> int:
    """Survey a guest, report, and write the stream of a dry run into a pipe; return 0.

    With -P the report goes to standard output.  The report forecasts the move at the
    rate of -B, or else at each rate of _LINKS.  Raises what ask() and survey() raise.
    """
    head = source.head()
    is_read = opts.form == Form.ANSWERED or not (opts.machine or os.isatty(_STDOUT))
    with signals.interruptible():
        if is_read:
            ask(source, head, opts, base, console, signals)
        found = survey(source, head)
        # Its reader may never read it.
        _report(source, head, found, opts, console)
    return EXIT_OK


def ask(
    source: Described, head: Head, opts: SendOptions, base: Path, console: Console, signals: Signals
) -> None:
    """Write the stream of a dry run; in the answered forms, wait for the verdict.

    The route is opened and closed here.  Raises InputOutputError, and in the answered
    forms what Route() and Conversation.await_accept() raise: IncompatibleError for a refusal.
    """
    header = new_header(opts.form, Feature.NO_MEMORY)
    if opts.form != Form.ANSWERED:
        writer = Writer(_STDOUT, header)
        write_head(writer, head)
        writer.end()
        return
    from bhystream.send.conversation import Conversation, Route

    names = (source.name, opts.guest)
    route = Route(console, signals, base, names, header.stream_id.hex(), opts.command, opts.umask)
    status = InternalError.status
    try:
        writer = Writer(route.stream_fd, header)
        write_head(writer, head)
        writer.end()
        Conversation(route, writer, console, signals).await_accept()
        console.say(f"guest {source.name}: {route.host} can take it")
        status = EXIT_OK
    except BhyError as raised:
        error = route.explain(raised)
        status = error.status
        raise error from raised
    finally:
        route.close(status)


def _report(
    source: Described, head: Head, found: Survey, opts: SendOptions, console: Console
) -> None:
    """Print the report for people, or with -P write the one for programs."""
    limits = opts.limits
    links = [("-B", float(limits.rate_bytes))] if limits.rate_bytes else list(_LINKS)
    if opts.machine:
        rows: list[tuple[object, ...]] = [*_fields(head, found)]
        for name, rate in links:
            told = forecast(found.data_pages, found.dirty_bytes, found.scan_ns, rate, limits)
            rows.append(("link", name, int(rate), *(told or (-1, -1))))
        lines = ["\t".join(str(value) for value in row) + "\n" for row in rows]
        write_all(_STDOUT, "".join(lines).encode(), "write the report")
    else:
        for line in _lines(head, found, links, limits, source):
            console.say(line)


def _fields(head: Head, found: Survey) -> list[tuple[str, object]]:
    return [
        ("name", head.config["name"]),
        ("hypervisor", head.host["hypervisor"]),
        ("pages", found.npages),
        ("touched_pages", found.touched_pages),
        ("data_pages", found.data_pages),
        ("dirty_bytes_per_second", int(found.dirty_bytes)),
        ("scan_ns", found.scan_ns),
    ]


def _lines(
    head: Head,
    found: Survey,
    links: list[tuple[str, float]],
    limits: Limits,
    source: Described,
) -> list[str]:
    """Return the report for people."""
    name = source.name
    lines = [
        f"guest {name}: {size(found.npages * PAGE_BYTES)} of memory, "
        f"{size(found.touched_pages * PAGE_BYTES)} touched, "
        f"{size(found.data_pages * PAGE_BYTES)} to send",
        f"guest {name}: changes {size(found.dirty_bytes)}/s, "
        f"in {counted(found.changed_extents, 'place')}; a scan takes {duration(found.scan_ns)}",
    ]
    for link, rate in links:
        told = forecast(found.data_pages, found.dirty_bytes, found.scan_ns, rate, limits)
        if told:
            rounds, copy_ns = told
            lines.append(
                f"guest {name}: at {link} ({size(rate)}/s): {counted(rounds, 'round')}, pause "
                f"{duration(copy_ns)} and {duration(found.scan_ns)} for the last scan, "
                "and what the state and the destination take"
            )
        else:
            lines.append(
                f"guest {name}: at {link} ({size(rate)}/s): it changes too fast for "
                f"-d {duration(limits.downtime_ns)}; it would run on here, or -f pauses it"
            )
    lines += [f"guest {name}: {warning}" for warning in source.warnings()]
    if resources := source.resources():
        wanted = " ".join(f"-o {word}" for word in resources)
        lines.append(f"guest {name}: the destination needs: {wanted}")
    lines.append(f"guest {name}: it can be moved from here; nothing was changed")
    return lines
