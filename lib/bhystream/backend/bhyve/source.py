"""BhyveSource: a running bhyve guest as base.Source.

    open      the VM, its memory mapped; its configuration; who listens at its
              checkpoint socket
    prepare   the directory, with the null device as memory file; the rehearsal:
              a checkpoint, which bhyve ends by itself; then the FIFO
    pause     the same checkpoint, which stands in its last write (fifo.py), so
              that the guest stands held (held.py); FILE.kern is its state, with
              the rehearsal's FILE.meta, and the FPU beside it

bhyve has no pause that can be taken back, but its checkpoint is one, as long as
it lasts: vCPUs and devices are paused before the state is saved and resumed
behind it, and what it writes last tells nothing that another checkpoint of the
same guest does not tell: names, order and sizes.  So that can be known before.
The rehearsal shows too that every device can be saved, and how long it takes.

The memory is not written by bhyve but read from our mapping.

Run on FreeBSD 15.1, emulated AMD: rehearsal, hold, release and discard.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from bhystream.backend.base import Prepared
from bhystream.backend.bhyve import backing, fifo, fpustate, identity, snapshot, verdict, vmbhyve
from bhystream.backend.bhyve.checkpoint import Checkpoint, Outcome
from bhystream.backend.bhyve.config import GuestConfig, devices, parse, split
from bhystream.backend.bhyve.held import BhyveHeld, HeldRecord
from bhystream.backend.bhyve.host import VMM_DIR, Host
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.bhyve.rehearsal import UNSAVED, MemoryFileError, Rehearsal, changes, rehearse
from bhystream.backend.bhyve.snapshot import FILE
from bhystream.backend.bhyve.snapshotdir import SnapshotDir, clamped
from bhystream.backend.process import Identity, is_alive, is_same
from bhystream.errors import (
    AccessError,
    BhyError,
    FormatError,
    GoneError,
    GuestError,
    IncompatibleError,
    from_oserror,
)
from bhystream.guest import SLOW_BYTES_PER_SECOND, Head

_HOLD_S = 30.0
_SYNC_S = 10.0
# Where nothing has been measured: to stop and to save; and to load, elsewhere.
_SAVE_NS = 150_000_000
_LOAD_NS = 100_000_000
_WRITE_BYTES_PER_SECOND = 1 << 30  # of a memory file in memory
_STATE_BYTES = 64 << 20  # room for FILE.kern and FILE.meta, before their sizes are known


class BhyveSource:
    """A running guest, named by its name."""

    def __init__(
        self, host: Host, name: str, base: Path, config_path: str | None, *, force: bool
    ) -> None:
        """Open the guest.

        base: the state directory.  config_path: of -C, or None for what
        vm-bhyve knows.  force: overrule soft reasons.  Raises GuestError,
        IncompatibleError, AccessError.
        """
        self._host = host
        self._name = name
        self._who = f"guest {name}"
        self._base = base
        self._memory: Memory | None = None
        self._process: Identity | None = None
        self._directory: SnapshotDir | None = None
        self._record: HeldRecord | None = None
        self._rehearsal: Rehearsal | None = None
        self._sink_warning = ""
        self._was_asked = False
        self._manager = vmbhyve.find(host.datastores(), name, socket.gethostname())
        try:
            self._open(config_path, force)
        except BaseException:
            self.close()
            raise

    def _open(self, config_path: str | None, force: bool) -> None:
        host, name = self._host, self._name
        if not host.exists(name):
            raise GuestError(f"guest {name}: no VM of that name is here")
        if self._manager:
            self._manager.locks.require_free()
        given = self._given(config_path)
        self._process = self._listener()
        self._config = given or self._recorded(self._process)
        if reasons := backing.missing(host, self._config):
            raise IncompatibleError(f"guest {name}: {reasons[0]}", "\n".join(reasons[1:]))
        self._memory = Memory(host, name)
        self._compare()
        self._require_started()
        hard, soft = verdict.source_reasons(host, self._process.pid, manager=self._manager)
        if reasons := hard + ([] if force else soft):
            raise IncompatibleError(f"guest {name}: {reasons[0]}", "\n".join(reasons[1:]))

    def _listener(self) -> Identity:
        """Return the process that serves the guest's checkpoint socket, and has said so."""
        connection = self._connect()
        try:
            if connection.is_settled(_SYNC_S):
                return connection.identity
        finally:
            connection.close()
        raise GoneError(f"{self._who}: its bhyve has just ended")

    def _given(self, path: str | None) -> GuestConfig | None:
        """Return the configuration of -C, None where vm-bhyve has to tell it."""
        if path is not None:
            return read_config(path, self._name)
        if self._manager is None:
            raise IncompatibleError(
                f"guest {self._name}: its configuration is not known, and bhyve does not tell it",
                "give it as a bhyve_config(5) file: -C file",
            )
        return None

    def _recorded(self, process: Identity) -> GuestConfig:
        """Return the configuration that vm-bhyve, or bhyrecv, has started this process with."""
        assert self._manager is not None
        return self._manager.running(process)

    def _compare(self) -> None:
        """Compare the configuration with what the kernel knows of the guest."""
        keys = self._config.section["keys"]
        wanted = [
            int(keys["memory.size"]),
            *(int(keys[k]) for k in ("sockets", "cores", "threads")),
        ]
        found = [self._mapped.size_bytes, *self._mapped.topology]
        for key, a, b in zip(
            ("memory.size", "sockets", "cores", "threads"), wanted, found, strict=True
        ):
            if a != b:
                raise IncompatibleError(
                    f"guest {self._name}: {key}: the configuration says {a},"
                    f" the running guest has {b}",
                    "it was started with another configuration: give it with -C",
                )

    def _require_started(self) -> None:
        """Refuse a guest with vCPUs that were never started.

        bhyve ends every checkpoint with letting all vCPUs run, and one that
        the guest has not started runs from wherever its registers say.  Run on
        FreeBSD 15.1, emulated AMD: from address 0.
        """
        try:
            waiting = sorted(self._mapped.waiting_vcpus())
        except GuestError:
            self._require_alive()
            raise
        if waiting:
            which = ", ".join(map(str, waiting))
            raise IncompatibleError(
                f"{self._who}: vcpus: {which} of {self._config.section['keys']['cpus']} were never"
                " started, or are stopped: a checkpoint would let them run",
                "wait until its operating system runs, or give it no more vCPUs than that uses",
            )

    @property
    def name(self) -> str:
        """Return the guest's name."""
        return self._name

    @property
    def lock_name(self) -> str:
        """Return the hypervisor and the name: there is one guest of a name on a host."""
        return f"{self._host.kind}-{self._name}"

    def head(self) -> Head:
        """Return what goes into the head sections."""
        section = backing.described(self._host, self._config)
        return Head(identity.describe(self._host), self._mapped.layout, section, devices(section))

    @property
    def _mapped(self) -> Memory:
        assert self._memory is not None
        return self._memory

    def resources(self) -> Sequence[str]:
        """Return the -o keys that bhyrecv will ask for."""
        return [f"{word}=" for word in self._config.section["resources"]]

    def warnings(self) -> Sequence[str]:
        """Return what no tool can mend, and why the memory file cannot be left out."""
        is_wired = self._mapped.is_wired
        found = verdict.warnings(self._config.section, self._host, is_wired=is_wired)
        found += fpustate.reasons(self._host, self._name, self._ncpus)
        if why := self._sink_warning or clamped(self._host, self._mapped.size_bytes):
            found.append(
                f"memory file: bhyve writes the memory into {self._base / 'held'} while the guest"
                f" stands, in a rehearsal and in the pause: {why}"
            )
        return found

    @property
    def _ncpus(self) -> int:
        return int(self._config.section["keys"]["cpus"])

    def memory(self) -> Sequence[memoryview]:
        """Return the guest's memory."""
        return self._mapped.views

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the extents that may be other than zero."""
        return self._mapped.touched()

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Yield what the kernel saw written since the last call, where it keeps such a log.

        None in the hold: some devices go on, and the log is of vCPUs.
        """
        return None if self._was_asked else self._mapped.changed()

    def require_described(self) -> None:
        """Do nothing: bhyve's devices and disks stay what they were at its start."""

    def fixed_ns(self) -> int:
        """Return what the rehearsal took, and what to load it may take elsewhere."""
        if self._rehearsal:
            return self._rehearsal.took_ns + _LOAD_NS
        written = self._mapped.size_bytes if clamped(self._host, self._mapped.size_bytes) else 0
        return _SAVE_NS + _LOAD_NS + written * 10**9 // _WRITE_BYTES_PER_SECOND

    # While it runs.

    def prepare(self, id_: str) -> Prepared:
        """Make the directory, rehearse, make the FIFO."""
        assert self._process is not None
        self._require_started()
        host, size = self._host, self._mapped.size_bytes
        self._directory = directory = SnapshotDir(self._base / "held" / id_)
        directory.sweep(host, self._base / "lock" / self.lock_name, self._base / "source")
        directory.make()
        self._sink_warning = clamped(host, size) or directory.make_sink(host)
        self._rehearsal = self._rehearse(directory)
        try:
            full_bytes = fifo.make(directory.files.meta)
        except OSError as error:
            raise from_oserror(error, f"make {directory.files.meta}") from None
        self._record = HeldRecord(
            kind=host.kind,
            vmm_dir=host.environment().get(VMM_DIR, ""),
            name=self._name,
            process=self._process,
            directory=str(directory.path),
            node=host.node_id(self._name),
            full_bytes=full_bytes,
            manager=str(self._manager.directory) if self._manager else "",
        )
        return Prepared(self._record.to_json(), self._rehearsal.text)

    def _rehearse(self, directory: SnapshotDir) -> Rehearsal:
        """Rehearse; once more with a memory file where bhyve may not write to the device."""
        self._require_room(_STATE_BYTES)
        try:
            return self._rehearse_once(directory)
        except MemoryFileError as error:
            if not directory.has_sink():
                raise
            self._sink_warning = f"it cannot write it to the null device ({error})"
            directory.drop_sink(self._host)
            self._require_room(_STATE_BYTES)
            return self._rehearse_once(directory)

    def _rehearse_once(self, directory: SnapshotDir) -> Rehearsal:
        checkpoint = self._connect_again()
        try:
            return rehearse(
                checkpoint, directory, self._who, self._mapped.size_bytes, self._limit_s()
            )
        finally:
            checkpoint.close()

    def _require_room(self, state_bytes: int) -> None:
        """Refuse while the guest runs what would end in a full disk."""
        assert self._directory is not None
        path = self._directory.path
        needed = state_bytes + (0 if self._directory.has_sink() else self._mapped.size_bytes)
        try:
            found = os.statvfs(path)
        except OSError as error:
            raise from_oserror(error, f"look at {path}") from None
        free = found.f_bavail * found.f_frsize
        if reasons := verdict.room_reasons(needed, free, "state directory", str(path)):
            raise GuestError(f"guest {self._name}: {reasons[0]}", self._sink_warning)

    def _limit_s(self) -> float:
        assert self._directory is not None
        written = 0 if self._directory.has_sink() else self._mapped.size_bytes
        return _HOLD_S + written / SLOW_BYTES_PER_SECOND

    def _connect(self) -> Checkpoint:
        return Checkpoint(self._host.run_dir, self._name, self._who)

    def _connect_again(self) -> Checkpoint:
        """Connect to the same process: another guest's memory is not what we have mapped."""
        assert self._process is not None
        try:
            made = self._connect()
        except BhyError:
            self._require_alive()
            raise
        if is_same(made.identity, self._process):
            return made
        made.close()
        raise GoneError(f"guest {self._name}: another guest has its name now")

    def _require_alive(self) -> None:
        if self._process and not is_alive(self._process):
            raise GoneError(f"guest {self._name}: its bhyve has ended meanwhile")

    # The pause.

    def pause(self) -> BhyveHeld:
        """Hold the guest in a checkpoint, and take its state.

        Where that fails, the guest is let go; a request that was not served
        is taken back.
        """
        assert self._record is not None and self._rehearsal is not None
        # From here on the directory is the paused guest's to remove, asked or not.
        self._was_asked = True
        self._require_started()
        self._require_room(self._rehearsal.meta.kern_bytes)
        checkpoint = self._connect_again()
        held = BhyveHeld(self._host, self._record)
        try:
            self._hold(checkpoint, held)
            return self._with_state(held)
        except BaseException:
            with contextlib.suppress(BhyError):
                held.resume()
            raise
        finally:
            checkpoint.close()

    def _hold(self, checkpoint: Checkpoint, held: BhyveHeld) -> None:
        """Ask for the checkpoint; return when the guest stands in it, all of it saved."""
        assert self._directory is not None and self._rehearsal is not None
        files, full_bytes = self._directory.files, held.record.full_bytes
        try:
            fd = fifo.arm(files.meta, full_bytes)
        except OSError as error:
            raise from_oserror(error, f"fill {files.meta}") from None
        try:
            directory = self._directory.open()
            try:
                checkpoint.request(directory, FILE, fd)
            finally:
                os.close(directory)
            outcome = checkpoint.await_outcome(
                self._limit_s(), lambda: fifo.pending_in(fd) == full_bytes
            )
        finally:
            os.close(fd)  # bhyve has it now, or nobody: see fifo.has_reader()
        if outcome == Outcome.EXITED:
            raise GoneError(f"guest {self._name}: its bhyve has ended in the pause")
        if outcome != Outcome.HELD:
            raise self._unsaved("")
        kern_bytes = files.kern.stat().st_size
        if not held.stands() or kern_bytes != self._rehearsal.meta.kern_bytes:
            raise self._failed(checkpoint, held)

    def _failed(self, checkpoint: Checkpoint, held: BhyveHeld) -> GuestError:
        """Let go of a checkpoint that is not what was rehearsed; return how it differs.

        Raises RefusedError with G5's own words.
        """
        assert self._rehearsal is not None
        text = held.release()
        if checkpoint.await_outcome(_HOLD_S) == Outcome.EXITED:
            return GoneError(f"guest {self._name}: its bhyve has ended in the pause")
        return self._unsaved(changes(self._rehearsal.meta, text))

    def _unsaved(self, why: str) -> GuestError:
        if why:
            return GuestError(
                f"guest {self._name}: its state is not what it was at the rehearsal: {why}",
                "send it again when its devices stay as they are",
            )
        return GuestError(
            f"guest {self._name}: its bhyve saved it at the rehearsal, and now did not; it logs"
            " the reason itself",
            f"{UNSAVED}, or a full disk",
        )

    def _with_state(self, held: BhyveHeld) -> BhyveHeld:
        """Return the guest that stands held, with its state read and its FPU stored."""
        assert self._rehearsal is not None and self._directory is not None
        path = self._directory.files.kern
        try:
            states = snapshot.cut(self._rehearsal.text, path.read_bytes())
        except OSError as error:
            raise from_oserror(error, f"read {path}") from None
        except FormatError as error:
            raise GuestError(f"guest {self._name}: {path}: {error}") from None
        saved, reasons = fpustate.save(self._host, self._name, self._ncpus, self._directory)
        return BhyveHeld(self._host, held.record, [*states, *saved], reasons)

    def close(self) -> None:
        """Give up the mappings; what prepare() made too, if the guest was never asked."""
        if self._directory and not self._was_asked:
            self._directory.remove(self._host)
        if self._memory is not None:
            self._memory.close()


def read_config(path: str, name: str) -> GuestConfig:
    """Read a bhyve_config(5) file (-C).  name: the guest's; wins over the file's.

    Raises GuestError, AccessError; IncompatibleError for what cannot travel.
    """
    try:
        text = Path(path).read_text("utf-8", "surrogateescape")
    except PermissionError as error:
        raise AccessError(f"cannot read {path}: {error.strerror}") from None
    except OSError as error:
        raise GuestError(f"cannot read {path}: {error.strerror}") from None
    return split(parse(text), name)
