"""Sections written to a descriptor: whole writes, checksums, totals, digest.

The writer knows the frame and the totals; what goes into a section comes from
its caller.  It never seeks and never reads.  A section is written in two
calls, the header with what the checksum covers and then the page bytes: one
writev(2) of both is slower, because the kernel then copies page bytes at odd
offsets into its pipe pages.

SIGPIPE is ignored by the programs, so a receiver that is gone is EPIPE here,
a PipeError, and the source guest resumes.
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Iterator

import xxhash

from bhystream.errors import ReaderGoneError, from_oserror
from bhystream.guest import State
from bhystream.stream import format as fmt
from bhystream.stream.format import End, Header, Type

Bytes = bytes | bytearray | memoryview
_EMPTY = b""
# A device's buffers are mostly zero: what of a state is a STATE_ZEROS section.
_ZEROS = bytes(4096)
# A pipe that poll(2) calls writable takes PIPE_BUF bytes without blocking, on
# some systems 512: what that leaves for the text of ABORT.
_ABORT_ROOM_BYTES = select.PIPE_BUF - fmt.SECTION.size - fmt.ABORT_HEAD.size


def write_all(fd: int, data: Bytes, what: str = "write the stream") -> None:
    """Write every byte of data to fd.

    what: is done by that, for the message.  Raises PipeError, ReaderGoneError
    where nobody reads any more.  A signal handler
    may raise between two partial writes; the stream is then cut inside a
    section, which no reader accepts.
    """
    view = memoryview(data)
    try:
        while True:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                _wait_for_room(fd)
            if not view:
                return
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ReaderGoneError(f"cannot {what}: {error.strerror}") from error
    except OSError as error:
        raise from_oserror(error, what) from error


def _wait_for_room(fd: int) -> None:
    """Wait as write(2) does: a process that shares the descriptor may have made it so again."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    poller.poll()


def _parts(state: State) -> Iterator[tuple[int, int, bool]]:
    """Yield the parts [first, end) of a state, in bytes, and whether each is a run of zeros.

    A block of 4096 bytes, counted from the state's beginning, is zeros or is
    not; what is left behind the last one is not.  An empty state has one part.
    """
    data, step = state.data, len(_ZEROS)

    def is_zero_at(at: int) -> bool:
        return not state.is_optional and data.startswith(_ZEROS, at)

    first = 0
    while True:
        is_zero = is_zero_at(first)
        most = len(data) if is_zero else min(len(data), first + fmt.MAX_STATE_PART_BYTES)
        end = min(first + step, most)
        while end < most and is_zero_at(end) == is_zero:
            end = min(end + step, most)
        yield first, end, is_zero
        if end == len(data):
            return
        first = end


class Writer:
    """One stream being written to a descriptor, which stays the caller's.

    Totals are public because the report shows them: offset_bytes written,
    sequence (sections so far), data_pages, zero_pages, rounds, and state_bytes,
    the bytes of the states that are not optional.
    at_border: the last section was written whole.  ended: END was.
    """

    def __init__(self, fd: int, header: Header) -> None:
        """Write the header.  Raises PipeError."""
        self._fd = fd
        self.header = header
        self.offset_bytes = 0
        self.sequence = 0
        self.rounds = 0
        self.data_pages = 0
        self.zero_pages = 0
        self.state_bytes = 0
        self.at_border = True
        self.ended = False
        blank = fmt.pack_header(header, 0)[:64]
        packed = fmt.pack_header(header, xxhash.xxh3_64_intdigest(blank, 0))
        self._digest = xxhash.xxh3_128(packed[64:], seed=header.seed)
        self._write(packed)

    def section(
        self, type_: int, payload: Bytes = _EMPTY, *, flags: int = 0, body: Bytes = _EMPTY
    ) -> None:
        """Write one section.

        payload: what the checksum covers.  body: page bytes, which follow and
        are covered by the hashes in the payload, or, with FLAG_ZSTD, a frame,
        which the checksum covers too.  Raises PipeError.
        """
        length = len(payload) + len(body)
        head = fmt.pack_section(type_, flags, length, self.sequence, 0)
        checked = head[: fmt.CHECKED_HEADER_BYTES]
        state = xxhash.xxh3_64(self.header.stream_id, seed=self.header.seed)
        state.update(checked)
        state.update(payload)
        if type_ == Type.MEMORY and flags & fmt.FLAG_ZSTD:
            state.update(body)
        checksum = state.intdigest().to_bytes(8, "little")
        self.at_border = False
        padding = bytes(fmt.padding_bytes(length))
        self._write(b"".join((checked, checksum, payload, _EMPTY if body else padding)))
        if body:
            self._write(body)
            if padding:
                self._write(padding)
        self.sequence += 1
        if type_ != Type.END:
            self._digest.update(checksum)
        # Last: a signal's exception before it leaves abort() nothing to do.
        self.at_border = True

    def round_end(self, data_pages: int, zero_pages: int, *, last: bool) -> None:
        """End a round of so many stated pages; last: the guest was paused in it."""
        payload = fmt.ROUND_END.pack(self.rounds, 0, data_pages, zero_pages)
        self.section(Type.ROUND_END, payload, flags=fmt.FLAG_LAST if last else 0)
        self.rounds += 1
        self.data_pages += data_pages
        self.zero_pages += zero_pages

    def state(self, state: State) -> None:
        """Write one named state, in as many parts as it needs; long zeros as their count.

        The optional states come last.  Raises PipeError.
        """
        name, view = state.name, memoryview(state.data)
        for part, (first, end, is_zero) in enumerate(_parts(state)):
            flags = fmt.FLAG_LAST if end == len(view) else 0
            if is_zero:
                payload = fmt.pack_state_zeros(name, part, end - first)
                self.section(Type.STATE_ZEROS, payload, flags=flags)
                continue
            type_ = Type.STATE_OPTIONAL if state.is_optional else Type.STATE
            self.section(type_, fmt.pack_state(name, part, view[first:end]), flags=flags)
        if not state.is_optional:
            self.state_bytes += len(view)

    def end(self) -> End:
        """Write the trailer, in one write(2) where the descriptor allows it.

        Returns it.  When this returns, write(2) has taken its last byte: the
        destination may start the guest.
        """
        end = End(
            what=fmt.end_flags(self.header.form, self.header.features),
            rounds=self.rounds,
            sections=self.sequence,
            offset_bytes=self.offset_bytes,
            data_pages=self.data_pages,
            zero_pages=self.zero_pages,
            state_bytes=self.state_bytes,
            digest=self._digest.digest(),
        )
        self.section(Type.END, fmt.END.pack(*end))
        self.ended = True
        return end

    def sync(self) -> None:
        """Make a stream in a file durable; a pipe cannot be.  Raises PipeError."""
        try:
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.fsync(self._fd)
        except OSError as error:
            raise from_oserror(error, "write the stream") from error

    def abort(self, status: int, text: str) -> None:
        """Tell the reader why the stream ends here, if that can be told at once.

        Nothing is written inside a section, after END, nor to a pipe that would
        block: a receiver that does not read must not hold up a source that
        gives up.  Never raises.
        """
        if self.ended or not self.at_border:
            return
        try:
            poller = select.poll()
            poller.register(self._fd, select.POLLOUT)
            if any(event == select.POLLOUT for _, event in poller.poll(0)):
                self.section(Type.ABORT, fmt.pack_abort(status, text, _ABORT_ROOM_BYTES))
        except Exception:  # the stream is lost either way, and the guest is safe
            return

    def _write(self, data: Bytes) -> None:
        write_all(self._fd, data)
        self.offset_bytes += len(data)
