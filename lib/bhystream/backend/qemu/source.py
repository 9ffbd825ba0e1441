"""QemuSource: a running QEMU guest as base.Source.

RAM is never read through QEMU: it is a shared file, mapped here for the life
of the object.  The pause is `stop`; the device state is QEMU's own migration
stream with x-ignore-shared, which leaves the shared RAM out, written into a
pipe and read whole into memory.

    open      connect, identify, refuse what cannot be moved; changes nothing
    pause     capabilities and limits set first, while the guest runs; then stop
    states    getfd, migrate fd:, read to EOF        running -> postmigrate
    resume    cancel if need be, cont, settings back  postmigrate -> running

The destination's QEMU checks little of what it loads, so head() carries the
configuration that config.py made of the argv.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import select
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bhystream.backend.base import PAGE_BYTES, Head, Json, Segment, State
from bhystream.backend.process import identify, is_alive
from bhystream.backend.qemu import facts, host, migration, ram
from bhystream.backend.qemu.config import reduce_argv
from bhystream.backend.qemu.process import read_argv
from bhystream.backend.qemu.qmp import ConnectionLostError, Qmp
from bhystream.errors import GuestError

# A few hundred KiB is usual.  More means that RAM is in it: QEMU 9.1 and later
# leave only named files out, not memfd.  Source: qemu/qemu migration/ram.c,
# migrate_ram_is_ignored(), qemu_ram_is_named_file().
MAX_STATE_BYTES = 64 << 20
STATE_LIMIT_S = 60.0
# Measured with QEMU 7.2 under TCG on two busy cores: stop 2 to 6 ms, state 2 to
# 5, load 2 to 12, cont under 1, and the programs around them.
FIXED_NS = 25_000_000
_PIPE_BYTES = 1 << 20


class QemuSource:
    """A running guest, named by the path of its QMP socket."""

    is_live = True

    def __init__(self, qmp_path: str) -> None:
        """Open the guest.  Raises GuestError, IncompatibleError or AccessError."""
        self._mapping: mmap.mmap | None = None
        self._views: list[memoryview] = []
        self._ram_fd = -1
        fallback = _name_of_path(qmp_path)
        self._qmp = Qmp(os.path.abspath(qmp_path), f"guest {fallback}")
        try:
            self._open(fallback)
        except BaseException:
            self.close()
            raise

    def _open(self, fallback: str) -> None:
        qmp = self._qmp
        self._identity = identify(qmp.pid, "QEMU")
        state = facts.status(qmp)
        if state != "running":
            raise GuestError(
                f"{qmp.who}: cannot send it: it is '{state}', not running", hint=_cure(state)
            )
        found = migration.capabilities(qmp)
        migration.refuse_unusual(qmp, found)
        parameters = qmp.execute("query-migrate-parameters", doing="examine migration")
        self._found: dict[str, Any] = {
            "capabilities": {"x-ignore-shared": found["x-ignore-shared"]},
            "parameters": {"max-bandwidth": int(parameters["max-bandwidth"])},
        }
        backend = facts.memory_backend(qmp)
        self._config = reduce_argv(read_argv(qmp.pid)[1:], facts.gather(qmp), fallback)
        facts.check_plugged(qmp, self._config)
        qmp.who = f"guest {self._config['name']}"
        self._layout = (Segment(backend.ident, None, backend.size_bytes // PAGE_BYTES),)
        self._size_bytes = backend.size_bytes
        self._ram_fd = ram.open_ram(qmp.pid, backend.size_bytes, os.O_RDONLY)
        self._mapping = mmap.mmap(self._ram_fd, backend.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._views = [memoryview(self._mapping)]

    @property
    def name(self) -> str:
        """Return the guest's name: of -name, else of the socket."""
        return str(self._config["name"])

    @property
    def lock_name(self) -> str:
        """Return the pid and start time: the same through every socket."""
        return f"qemu-{self._identity.pid}-{self._identity.start_ticks}"

    def head(self) -> Head:
        """Return what goes into the head sections."""
        devices = tuple(
            f"{d['driver']} {d['props']['id']}" if "id" in d["props"] else d["driver"]
            for d in self._config["devices"]
        )
        return Head(host.describe(self._qmp.version), self._layout, self._config, devices)

    def resources(self) -> Sequence[str]:
        """Return the -o keys that bhyrecv will ask for, in its order."""
        config = self._config
        keys = [disk["key"] for disk in config["disks"] if not disk["empty"]]
        keys += [net["key"] for net in config["nets"]]
        keys += [key for key in ("kernel", "initrd", "bios") if config[key]]
        return [f"{key}=" for key in keys]

    def warnings(self) -> Sequence[str]:
        """Return nothing: what QEMU cannot move is refused."""
        return ()

    def prepare(self, id_: str) -> None:
        """Do nothing: what the pause needs is set in it, in a millisecond."""

    def memory(self) -> Sequence[memoryview]:
        """Return the one mapping of the guest's memory, read-only."""
        return self._views

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the page extents of the RAM file that hold data."""
        return ram.extents(self._ram_fd, self._size_bytes)

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Return None: QEMU's dirty log is its own."""
        return None

    def load_seconds(self) -> float:
        """Return 0: READY says that the guest is loaded."""
        return 0.0

    def fixed_ns(self) -> int:
        """Return what stop, state, load and cont take together."""
        return FIXED_NS

    def pause(self) -> None:
        """Stop the guest.  What can be set up before that is."""
        qmp = self._qmp
        migration.set_parameters(qmp, {"max-bandwidth": migration.UNLIMITED})
        migration.set_capabilities(qmp, {"x-ignore-shared": True})
        # It waits for the disks, and slow storage takes its time.
        qmp.execute("stop", doing="pause", limit_s=60.0)
        state = facts.status(qmp)
        if state != "paused":
            raise GuestError(f"{qmp.who}: cannot pause: it is '{state}'")

    def states(self) -> Sequence[State]:
        """Return the device state, as one blob named "qemu".

        The guest is `postmigrate` afterwards and its disks are inactive;
        resume() undoes both.  On failure nothing is running in QEMU that
        resume() could not cancel.
        """
        return [State("qemu", self._take_state())]

    def _take_state(self) -> bytes:
        qmp = self._qmp
        read_end, write_end = os.pipe()
        try:
            with contextlib.suppress(OSError):
                # All of a usual state fits, so QEMU never waits for us.
                fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            try:
                qmp.send_fd("bhysend", write_end, doing="save state")
            finally:
                # QEMU's copy is the only one, so that its close is our EOF.
                os.close(write_end)
            try:
                qmp.execute("migrate", {"uri": "fd:bhysend"}, doing="save state")
            except GuestError:
                with contextlib.suppress(GuestError):
                    qmp.execute("closefd", {"fdname": "bhysend"}, doing="save state")
                raise
            data = self._drain(read_end)
        finally:
            # Before any cancel: a migration blocked in write(2) gets EPIPE.
            os.close(read_end)
        self._await_completed()
        return data

    def _drain(self, fd: int) -> bytes:
        """Read the pipe to its EOF, within the limits of size and time."""
        chunks: list[bytes] = []
        total = 0
        end = time.monotonic() + STATE_LIMIT_S
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            left_ms = (end - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(min(left_ms, 1000)):
                self._check_draining(left_ms)
                continue
            chunk = os.read(fd, _PIPE_BYTES)
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)
            total += len(chunk)
            if total > MAX_STATE_BYTES:
                raise GuestError(
                    f"{self._qmp.who}: cannot save state: more than"
                    f" {MAX_STATE_BYTES >> 20} MiB; this QEMU put RAM into the state",
                    hint="give it RAM from memory-backend-file, not memfd",
                )

    def _check_draining(self, left_ms: float) -> None:
        """Called when a second passed without a byte.  Raises to give up."""
        if not is_alive(self._identity):
            raise ConnectionLostError(f"{self._qmp.who}: cannot save state: QEMU has ended")
        if left_ms <= 0:
            raise GuestError(f"{self._qmp.who}: cannot save state: not done in {STATE_LIMIT_S:g} s")

    def _await_completed(self) -> None:
        """After EOF: the migration has ended; only "completed" is good.

        QEMU closes the file some way before or after it sets the status.
        """
        end = time.monotonic() + 10.0
        while True:
            now, error = migration.progress(self._qmp)
            if now == "completed":
                return
            if not migration.is_busy(now) or time.monotonic() > end:
                raise GuestError(
                    f"{self._qmp.who}: cannot save state: migration {now}"
                    + (f": {error}" if error else "")
                )
            time.sleep(migration.POLL_S)

    def require_paused(self) -> None:
        """Do nothing: its QEMU serves one client, which we are."""

    def resume(self) -> None:
        """Let the guest run on, and put QEMU's settings back as found."""
        migration.let_run(self._qmp)
        migration.restore(self._qmp, self._found)

    def keep(self) -> str:
        """Do nothing: QEMU holds a paused guest by itself."""
        return ""

    def revive(self) -> Json:
        """Return what open_paused() needs; it holds paths of this host."""
        return revive_json(self._qmp, self.name, self._found)

    def close(self) -> None:
        """Give up connection, descriptor and mapping; the guest stays as it is.

        A view that the engine still holds keeps the mapping alive until it is
        dropped; that is no error here.
        """
        self._qmp.close()
        with contextlib.suppress(BufferError):
            for view in self._views:
                view.release()
            if self._mapping is not None:
                self._mapping.close()
        self._views = []
        self._mapping = None
        if self._ram_fd >= 0:
            os.close(self._ram_fd)
            self._ram_fd = -1


def revive_json(qmp: Qmp, name: str, found: Mapping[str, Any]) -> Json:
    """Return the record by which open_paused() finds a guest again."""
    who = identify(qmp.pid, "QEMU")
    return {
        "hypervisor": "qemu",
        "name": name,
        "qmp": qmp.path,
        "pid": who.pid,
        "start_ticks": who.start_ticks,
        "boot_id": who.boot_id,
        "restore": dict(found),
        "announce": False,
    }


def _name_of_path(path: str) -> str:
    """Return a guest name made of the socket's: "web1" of "/run/web1.qmp"."""
    stem = os.path.basename(path).split(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem)[:64] or "guest"


def _cure(state: str) -> str:
    if state == "paused":
        return "let it run first (QMP: cont)"
    if state == "inmigrate":
        return "it waits for a stream: give its socket to bhyrecv"
    if state == "postmigrate":
        return "it was moved already: bhysend -l, then --resume or --discard"
    return ""
