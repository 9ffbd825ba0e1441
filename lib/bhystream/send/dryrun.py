"""bhysend -n: what a move would be like, without touching the guest.

survey.py measures the guest, which runs on; from the guest's size and its rate of change the
policy forecasts the rounds on a link of a given rate.

Into a pipe bhysend writes a stream with a head and no memory, for a `bhyrecv -n` at
the other end, which gives the destination's verdict.

The last line says what the pause will be made of, and how each part is known.  With -P
all of this is a table, which has also the reasons against a guest that is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bhystream.errors import EXIT_OK, BhyError, InternalError
from bhystream.guest import PAGE_BYTES, Fixed, Head
from bhystream.report import Console, printable
from bhystream.send.head import new_header, write_head
from bhystream.send.options import SendOptions
from bhystream.send.precopy import Limits, forecast
from bhystream.send.prediction import (
    ASSUMED,
    EARLIER,
    MEASURED,
    UNKNOWN,
    Foretold,
    Prediction,
)
from bhystream.send.survey import Survey, survey
from bhystream.signals import Signals
from bhystream.stream.format import Feature, Form
from bhystream.stream.writer import Writer, write_all
from bhystream.units import counted, duration, size

if TYPE_CHECKING:
    from bhystream.backend.base import Described

_STDOUT = 1
_LINKS = (("1 Gbit/s", 10**9 / 8), ("10 Gbit/s", 10**10 / 8), ("25 Gbit/s", 25 * 10**9 / 8))
# What people read of Foretold: the name of each part, and notes, by the basis or for any.
_PARTS: dict[str, tuple[str, dict[str, str]]] = {
    "state": ("state", {}),
    "scan": ("last scan", {"": "grows with the memory"}),
    "answers": ("answers", {UNKNOWN: "no destination was asked"}),
    "hook": ("-p", {UNKNOWN: "it has not run yet", "": "beside the last pages"}),
}
_BASES = {MEASURED: "", EARLIER: "as in earlier moves", ASSUMED: "assumed", UNKNOWN: ""}
# How a message names the guest, which a row does not.
_GUEST = re.compile(r"\Aguest \S+: ")

Rows = Sequence[Sequence[object]]


def run(
    source: Described, opts: SendOptions, base: Path, console: Console, signals: Signals
) -> int:
    """Survey a guest, report, and write the stream of a dry run into a pipe; return 0.

    With -P the report goes to standard output.  The report forecasts the move at the
    rate of -B, or else at each rate of _LINKS.  Raises what ask() and survey() raise.
    """
    head = source.head()
    is_read = opts.form == Form.ANSWERED or not (opts.machine or os.isatty(_STDOUT))
    asked = ask(source, head, opts, base, console, signals) if is_read else Asked()
    with signals.interruptible():
        found = survey(source, head)
        pause = _pause(source, head, found, asked, opts, base)
        # Its reader may never read it.
        _report(source, head, found, pause, opts, console)
    return EXIT_OK


def refuse(error: BhyError) -> None:
    """Write the reasons against a guest for programs.  Raises nothing: the error matters more."""
    rows = [("refusal", _GUEST.sub("", one.what), one.cure) for one in error.reasons()]
    with contextlib.suppress(BhyError):
        _write(rows)


class Asked(NamedTuple):
    """The destination that was asked: its host, and the time there and back."""

    host: str = ""
    trip_ns: int = 0


def ask(
    source: Described, head: Head, opts: SendOptions, base: Path, console: Console, signals: Signals
) -> Asked:
    """Write the stream of a dry run; in the answered forms, wait for the verdict.

    The route is opened and closed here, and no signal raises meanwhile: it would leave the
    command behind.  A signal that only ends the wait for the command raises later.
    Raises InputOutputError, and in the answered forms what Route() and
    Conversation.await_accept() raise: IncompatibleError for a refusal.
    """
    header = new_header(opts.form, Feature.NO_MEMORY)
    if opts.form != Form.ANSWERED:
        with signals.interruptible():
            writer = Writer(_STDOUT, header)
            write_head(writer, head)
            writer.end()
        return Asked()
    from bhystream.send.conversation import Conversation, Route

    names = (source.name, opts.guest)
    route = Route(console, signals, base, names, header.stream_id.hex(), opts.command, opts.umask)
    status = InternalError.status
    try:
        with signals.interruptible():
            writer = Writer(route.stream_fd, header)
            write_head(writer, head)
            writer.end()
            talk = Conversation(route, writer, console, signals)
            talk.await_accept()
        console.say(f"guest {source.name}: {route.host} can take it")
        status = EXIT_OK
        return Asked(talk.host, talk.trip_ns)
    except BhyError as raised:
        error = route.explain(raised)
        status = error.status
        raise error from raised
    finally:
        route.close(status)


def _pause(
    source: Described, head: Head, found: Survey, asked: Asked, opts: SendOptions, base: Path
) -> list[Foretold]:
    """Return the parts of the pause, but for the last pages; [] if there is no pause."""
    fixed = source.fixed()
    if fixed is None:
        return []

    def usual() -> Fixed:
        return fixed

    kind = str(head.host["hypervisor"])
    # As in a move: outgoing.py drops the plan if there is a -p command.
    is_early = fixed.is_early and opts.hook is None
    made = Prediction(
        usual,
        base,
        kind,
        asked.host,
        opts.hook,
        head.layout.size_bytes,
        is_early=is_early,
        is_verified=opts.verify,
    )
    return made.foretell(found.scan_cpu_ns, asked.trip_ns)


def _report(
    source: Described,
    head: Head,
    found: Survey,
    pause: Sequence[Foretold],
    opts: SendOptions,
    console: Console,
) -> None:
    """Print the report for people, or with -P write the one for programs."""
    limits = opts.limits
    links = [("-B", float(limits.rate_bytes))] if limits.rate_bytes else list(_LINKS)
    told = [_Link(name, rate, _forecast(found, rate, limits)) for name, rate in links]
    if opts.machine:
        warnings = [("warning", one.what, one.cure) for one in source.warnings()]
        rows = [("link", one.name, int(one.rate), *(one.told or (-1, -1))) for one in told]
        parts = [("pause", *part) for part in pause]
        _write([*_fields(head, found), *rows, *parts, *warnings])
    else:
        lines = _lines(source, found, told, limits)
        lines += _last_line(pause, told[0])
        for line in lines:
            console.say(f"guest {source.name}: {line}")


class _Link(NamedTuple):
    """A link, and the forecast of the move on it: (rounds, ns of the last pages), or None."""

    name: str
    rate: float
    told: tuple[int, int] | None


def _forecast(found: Survey, rate: float, limits: Limits) -> tuple[int, int] | None:
    return forecast(found.data_pages, found.dirty_bytes, found.scan_ns, rate, limits)


def _write(rows: Rows) -> None:
    """Write the table for programs.  Raises InputOutputError."""
    lines = ["\t".join(printable(str(value)) for value in row) + "\n" for row in rows]
    write_all(_STDOUT, "".join(lines).encode("utf-8", "replace"), "write the report")


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


def _lines(source: Described, found: Survey, links: Sequence[_Link], limits: Limits) -> list[str]:
    """Return the report for people, without the last line."""
    lines = [
        f"{size(found.npages * PAGE_BYTES)} of memory, "
        f"{size(found.touched_pages * PAGE_BYTES)} touched, "
        f"{size(found.data_pages * PAGE_BYTES)} to send",
        f"changes {size(found.dirty_bytes)}/s, in {counted(found.changed_extents, 'place')}; "
        f"a scan takes {duration(found.scan_ns)}",
    ]
    for link, rate, told in links:
        if told:
            rounds, copy_ns = told
            text = f"{counted(rounds, 'round')}, and {duration(copy_ns)} for the last pages"
        else:
            text = (
                f"it changes too fast for -d {duration(limits.downtime_ns)}; "
                "it would run on here, or -f pauses it"
            )
        lines.append(f"at {link} ({size(rate)}/s): {text}")
    lines += source.warnings()
    if resources := source.resources():
        wanted = " ".join(f"-o {word}" for word in resources)
        lines.append(f"the destination needs: {wanted}")
    lines.append("it can be moved from here; nothing was changed")
    return lines


def _last_line(pause: Sequence[Foretold], link: _Link) -> list[str]:
    """Return the line that says what the pause will be made of, none if there is no pause."""
    if not pause:
        return []
    pages = f"last pages {duration(link.told[1])}" if link.told else "too many last pages"
    state, scan, *others = [_told(part) for part in pause]
    found = [state, scan, f"{pages} at {link.name}", *others]
    return [f"the pause: {', '.join(found)}"]


def _told(part: Foretold) -> str:
    """Return a part for people: its name, its time, and what there is to know about it."""
    name, notes = _PARTS[part.part]
    time = "unknown" if part.basis == UNKNOWN else duration(part.time_ns)
    found = ", ".join(filter(None, [_BASES[part.basis], notes.get(part.basis, notes.get("", ""))]))
    return f"{name} {time} ({found})" if found else f"{name} {time}"
