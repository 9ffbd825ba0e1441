"""bhysend of a guest that does not run: a kept stream of its snapshot files.

send() takes the steps of Outgoing, without those that only a running guest needs:
bhysend pauses nothing, so it records nothing, starts no keeper and resumes no
guest, and one walk sends all of the memory.  The stream has the kept form: anyone
who has the stream may start the guest from it, as from the files themselves.
"""

from __future__ import annotations

import time

from bhystream import commandline
from bhystream.backend.base import Snapshot
from bhystream.errors import EXIT_OK, UsageError, as_error
from bhystream.guest import Head
from bhystream.report import Console, Progress
from bhystream.send.head import new_header, write_head
from bhystream.send.options import SendOptions
from bhystream.send.transfer import Transfer
from bhystream.signals import Signals
from bhystream.stream import format as fmt
from bhystream.stream.format import Form, Type
from bhystream.stream.writer import Writer
from bhystream.units import duration, size

_STDOUT = 1


def send(source: Snapshot, opts: SendOptions, console: Console, signals: Signals) -> int:
    """Write a snapshot to standard output; return the exit status.

    source stays the caller's.  Raises UsageError if opts does not suit a snapshot,
    GuestError if the files changed meanwhile, and any other error that ends the
    stream, which then ends with ABORT, or inside a section; the files stay as they were.
    """
    if opts.answered or opts.command:
        raise UsageError("a snapshot goes as a kept stream: -a and a command are for a live guest")
    if opts.hook is not None:
        raise UsageError("-p runs while a guest is paused: a snapshot has no pause")
    head = source.head()
    for warning in source.warnings():
        console.say(f"guest {source.name}: {warning}")
    commandline.widen_pipe(_STDOUT)
    header = new_header(Form.KEPT, opts.features)
    console.log(f"guest {source.name}: stream {header.stream_id.hex()} begins, of a snapshot")
    start_ns = time.monotonic_ns()
    with signals.interruptible():
        writer = Writer(_STDOUT, header)
    try:
        with signals.interruptible():
            write_head(writer, head)
            progress = Progress(
                console,
                source.name,
                head.layout.npages,
                verbose=opts.verbose,
                machine=opts.machine,
            )
            signals.on_report = progress.report
            _write_guest(source, head, opts, writer, progress)
            writer.sync()
            writer.end()
            writer.sync()
    except Exception as raised:
        signals.forget()
        error = as_error(raised)
        writer.abort(error.status, str(error))
        raise
    signals.forget()
    text = (
        f"guest {source.name}: the snapshot is sent; "
        f"{size(writer.offset_bytes)} in {duration(time.monotonic_ns() - start_ns)}"
    )
    console.say(text)
    console.log(text)
    return EXIT_OK


def _write_guest(
    source: Snapshot, head: Head, opts: SendOptions, writer: Writer, progress: Progress
) -> None:
    """Write the memory, the states, and a TIME of zeros, because no guest was paused."""

    def show(done_pages: int, sent_pages: int) -> None:
        progress.done_pages, progress.sent_pages = done_pages, sent_pages
        progress.sent_bytes = writer.offset_bytes
        progress.work_done, progress.work_total = transfer.work_pages
        progress.tick()

    transfer = Transfer(source, head.layout, writer, level=opts.level, on_batch=show)
    transfer.round(last=True, rate_bytes=opts.limits.rate_bytes)
    if opts.verify:
        transfer.hashes()
    # The states follow the memory: states() raises if the files have changed meanwhile.
    for state in source.states():
        writer.state(state)
    writer.section(Type.TIME, fmt.TIME.pack(0, 0))
