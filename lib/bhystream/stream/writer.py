"""Sections written to a descriptor: whole writes, checksums, totals, digest.

The writer knows the frame and the totals; its caller gives the contents of a
section.  The writer never seeks and never reads.  A section is written in two
calls, the header with what the checksum covers and then the page bytes: one
writev(2) of both is slower, because the kernel then copies page bytes at odd
offsets into its pipe pages.

The programs ignore SIGPIPE.  If the receiver has exited, write(2) fails with
EPIPE, the writer raises ReaderGoneError, and bhysend resumes the guest.
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable, Iterator
from typing import Protocol

import xxhash

from bhystream.errors import InputOutputError, ReaderGoneError, from_oserror
from bhystream.guest import State
from bhystream.stream import format as fmt
from bhystream.stream.format import End, Header, Type

Bytes = bytes | bytearray | memoryview


class Pages(Protocol):
    """Page bytes that write themselves."""

    def __len__(self) -> int:
        """Return the number of bytes."""

    def write(self, fd: int, start_bytes: int) -> int:
        """Write from this byte on; return how many bytes were taken.  Raises OSError."""


Body = Bytes | Pages
_LOOK_S = 0.5
_EMPTY = b""
# A device's buffers are mostly zero: the blocks of a state like this one go into
# STATE_ZEROS sections.
_ZEROS = bytes(4096)
# The room for the text of ABORT: a pipe that poll(2) calls writable takes
# PIPE_BUF bytes without blocking, which are 512 on some systems.
_ABORT_ROOM_BYTES = select.PIPE_BUF - fmt.SECTION.size - fmt.ABORT_HEAD.size


def write_all(fd: int, data: Bytes, what: str = "write the stream") -> None:
    """Write every byte of data to fd.

    what: is done by the write, for the message, in the infinitive without "to".
    Raises ReaderGoneError if nobody reads any more, else InputOutputError.  A
    signal handler may raise between two partial writes; the stream then ends
    inside a section, and no reader accepts it.
    """
    view = memoryview(data)
    _write_parts(fd, len(view), lambda at: os.write(fd, view[at:]), what)


def _write_parts(fd: int, nbytes: int, write: Callable[[int], int], what: str) -> None:
    """Call write(at) until nbytes are written.  Raises as write_all()."""
    at = 0
    try:
        while True:
            try:
                at += write(at)
            except BlockingIOError:
                _wait_for_room(fd)
            if at >= nbytes:
                return
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ReaderGoneError(f"cannot {what}: {error.strerror}") from error
    except OSError as error:
        raise from_oserror(error, what) from error


def _wait_for_room(fd: int) -> None:
    """Wait as write(2) would: another process may have made the shared fd non-blocking again."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    poller.poll()


def _parts(state: State) -> Iterator[tuple[int, int, bool]]:
    """Yield the parts [first, end) of a state, in bytes, and whether each is a run of zeros.

    A run of zeros consists of whole blocks of 4096 bytes, counted from the
    state's beginning; a shorter rest does not count as zeros, and an optional
    state has no such run.  An empty state has one part.
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
    at_border: the last section was written whole.  ended: END was written whole.
    """

    def __init__(self, fd: int, header: Header) -> None:
        """Write the header.  Raises InputOutputError."""
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
        self,
        type_: int,
        payload: Bytes = _EMPTY,
        *,
        flags: int = 0,
        body: Body = _EMPTY,
    ) -> None:
        """Write one section.

        payload: the bytes that the checksum covers.  body: the page bytes, which
        follow the payload and are covered by the hashes in it; or, with FLAG_ZSTD,
        a frame, which the checksum covers too.  Raises InputOutputError.
        """
        length = len(payload) + len(body)
        head = fmt.pack_section(type_, flags, length, self.sequence, 0)
        checked = head[: fmt.CHECKED_HEADER_BYTES]
        state = xxhash.xxh3_64(self.header.stream_id, seed=self.header.seed)
        state.update(checked)
        state.update(payload)
        if type_ == Type.MEMORY and flags & fmt.FLAG_ZSTD and isinstance(body, Bytes):
            state.update(body)
        checksum = state.intdigest().to_bytes(8, "little")
        self.at_border = False
        padding = bytes(fmt.padding_bytes(length))
        self._write(b"".join((checked, checksum, payload, _EMPTY if body else padding)))
        if body:
            self._write_body(body)
            if padding:
                self._write(padding)
        self.sequence += 1
        if type_ != Type.END:
            self._digest.update(checksum)
        # This comes last: if a signal raises before, abort() must write nothing.
        self.at_border = True

    def round_end(self, data_pages: int, zero_pages: int, *, last: bool) -> None:
        """End a round that stated so many pages.  Raises InputOutputError.

        last: the guest was paused during the round.
        """
        payload = fmt.ROUND_END.pack(self.rounds, 0, data_pages, zero_pages)
        self.section(Type.ROUND_END, payload, flags=fmt.FLAG_LAST if last else 0)
        self.rounds += 1
        self.data_pages += data_pages
        self.zero_pages += zero_pages

    def state(self, state: State) -> None:
        """Write one named state in as many parts as needed; a run of zeros as its length.

        The caller writes the optional states last.  Raises InputOutputError.
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
        """Write END, in one write(2) if the descriptor allows that; return END.

        When this returns, write(2) has taken the last byte of END, and the
        destination may start the guest.  Raises InputOutputError.
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
        """Sync a stream that is a file; leave a pipe alone.  Raises InputOutputError.

        A thread waits for the disk, because no signal ends fsync(2), and a file may have as
        many bytes as the guest has memory.  If a signal handler raises, the thread goes on.
        """
        found: list[OSError] = []

        def sync() -> None:
            try:
                os.fsync(self._fd)
            except OSError as error:
                found.append(error)

        try:
            is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
        except OSError as error:
            raise from_oserror(error, "write the stream") from error
        if not is_file:
            return
        import threading  # a dry run has no use for them

        from bhystream import threads

        thread = threading.Thread(target=sync, daemon=True)
        threads.start(thread)
        while thread.is_alive():
            thread.join(_LOOK_S)  # a signal that comes just before a wait does not end the wait
        if found:
            raise from_oserror(found[0], "write the stream") from found[0]

    def await_room(self, seconds: int) -> None:
        """Wait until write(2) would take a short section at once.

        For the sections that decide: END and GO fit into PIPE_BUF bytes, so they are
        then written without blocking, and whole.  Raises InputOutputError if there is no
        room after so many seconds, ReaderGoneError if nobody reads any more.
        """
        if not self._poll(seconds):
            raise InputOutputError(f"nothing was taken from the stream for {seconds} s")

    def require_reader(self) -> None:
        """Raise ReaderGoneError if nobody reads any more; needs no write to find that out."""
        self._poll(0)

    def abort(self, status: int, text: str) -> None:
        """Write ABORT, which tells the reader why the stream ends here, or write nothing.

        Nothing is written inside a section, after END, or to a pipe that would
        block: a receiver that does not read must not delay a source that gives
        up.  Never raises.
        """
        if self.ended or not self.at_border:
            return
        try:
            if self._poll(0):
                self.section(Type.ABORT, fmt.pack_abort(status, text, _ABORT_ROOM_BYTES))
        except Exception:  # the stream is lost either way, and the guest is safe
            return

    def _poll(self, seconds: int) -> bool:
        """Say whether write(2) would take a byte, within so many seconds.

        Raises ReaderGoneError if nobody reads any more.
        """
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        found = poller.poll(seconds * 1000)
        if found and found[0][1] & select.POLLERR:
            raise ReaderGoneError("cannot write the stream: Broken pipe")
        return bool(found)

    def _write_body(self, body: Body) -> None:
        if isinstance(body, Bytes):
            return self._write(body)
        _write_parts(self._fd, len(body), lambda at: body.write(self._fd, at), "write the stream")
        self.offset_bytes += len(body)
        return None

    def _write(self, data: Bytes) -> None:
        write_all(self._fd, data)
        self.offset_bytes += len(data)
