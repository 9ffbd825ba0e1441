"""BhyveSource: a running bhyve guest as base.Source.

    open      the VM, its memory mapped; its configuration; the checkpoint
              socket connected, which also keeps others' requests out
    prepare   the staging directory, with the null device as memory file; room
    pause     bhyve's own suspend: it writes its state, and is gone
    states    FILE.kern cut into pieces by FILE.meta
    resume    `bhyve -r`, see paused.py

bhyve saves a guest only by suspending or checkpointing it, and has no way to
take a suspend back.  So the pause is the suspend, and a rollback is a restore.
The memory is not written by bhyve but read from our mapping, in which the last
changes are too: also those of devices that go on until the process ends.

With -k the guest is checkpointed instead: bhyve writes the memory into a file
while the guest stands, and lets it run; the file is then what is sent.

Unverified on FreeBSD, all of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bhystream.backend.base import PAGE_BYTES, Head, Json, State
from bhystream.backend.bhyve import backing, identity, snapshot, verdict, vmbhyve
from bhystream.backend.bhyve.checkpoint import Checkpoint, RefusedError
from bhystream.backend.bhyve.cold import data_extents
from bhystream.backend.bhyve.config import GuestConfig, devices, parse, split
from bhystream.backend.bhyve.host import VMM_DIR, Host
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.bhyve.paused import BhyvePaused
from bhystream.backend.bhyve.place import FILE, Place, staging_root
from bhystream.backend.bhyve.restore import SLOW_BYTES_PER_SECOND
from bhystream.backend.process import is_alive, is_same
from bhystream.errors import (
    AccessError,
    GoneError,
    GuestError,
    IncompatibleError,
    TakenError,
    from_oserror,
)

_SUSPEND_S = 60.0
# Where nothing has been measured: to stop, to save, to start; and what a
# destination reads a second.  The last two grow with the memory.
_FIXED_NS = 150_000_000
_LOAD_BYTES_PER_SECOND = 1 << 30
_STATE_BYTES = 64 << 20  # room for FILE.kern and FILE.meta


class BhyveSource:
    """A running guest, named by its name."""

    def __init__(
        self, host: Host, name: str, base: Path, config_path: str | None, *, keep: bool, force: bool
    ) -> None:
        """Open the guest.

        base: the state directory.  config_path: of -C, or None for what
        vm-bhyve knows.  keep: the guest is to be checkpointed, not suspended.
        force: overrule soft reasons.  Raises GuestError, IncompatibleError,
        AccessError.
        """
        self._host = host
        self._name = name
        self._base = base
        self._keep = keep
        self.is_live = not keep
        self._memory: Memory | None = None
        self._checkpoint: Checkpoint | None = None
        self._place: Place | None = None
        self._paused: BhyvePaused | None = None
        self._image: mmap.mmap | None = None
        self._image_views: list[memoryview] = []
        self._image_fd = -1
        self._sink_warnings: list[str] = []
        self._said = ""
        self._states: Sequence[State] = ()
        self._was_paused = False
        self._node_left = False
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
        self._config = self._find_config(config_path)
        self._memory = Memory(host, name)
        self._compare()
        self._checkpoint = Checkpoint(host.run_dir, name, f"guest {name}")
        hard, soft = verdict.source_reasons(
            host, self._checkpoint.identity.pid, manager=self._manager
        )
        if reasons := hard + ([] if force else soft):
            raise IncompatibleError(f"guest {name}: {reasons[0]}", "\n".join(reasons[1:]))

    def _find_config(self, path: str | None) -> GuestConfig:
        """Return the guest's configuration.  Without one nothing could start it again."""
        if path is not None:
            return read_config(path, self._name)
        if self._manager:
            return self._manager.config()
        raise IncompatibleError(
            f"guest {self._name}: its configuration is not known, and bhyve does not tell it",
            "give it as a bhyve_config(5) file: -C file",
        )

    def _compare(self) -> None:
        """Compare the configuration with what the kernel knows of the guest."""
        assert self._memory is not None
        keys = self._config.section["keys"]
        wanted = [
            int(keys["memory.size"]),
            *(int(keys[k]) for k in ("sockets", "cores", "threads")),
        ]
        found = [self._memory.size_bytes, *self._memory.topology]
        for key, a, b in zip(
            ("memory.size", "sockets", "cores", "threads"), wanted, found, strict=True
        ):
            if a != b:
                raise IncompatibleError(
                    f"guest {self._name}: {key}: the configuration says {a},"
                    f" the running guest has {b}",
                    "it was started with another configuration: give it with -C",
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
        return [*found, *self._sink_warnings]

    def prepare(self, id_: str) -> None:
        """Make the staging directory, with the sink where it can be had; see that there is room."""
        assert self._checkpoint is not None
        root = staging_root(self._host, "source", self._base, os.environ)
        full = self._config.full
        self._place = place = Place(
            kind=self._host.kind,
            vmm_dir=self._host.environment().get(VMM_DIR, ""),
            name=self._name,
            process=self._checkpoint.identity,
            staging=str(root / f"bhysend-{id_[:16]}"),
            kept=str(self._base / "held" / id_),
            keys=dict(full),
            memory_bytes=self._mapped.size_bytes,
            bridges={tap: self._host.bridge_of(tap) for tap in _taps(full)},
            manager=str(self._manager.directory) if self._manager else "",
            is_copied=self._keep,
            node=self._host.node_id(self._name),
        )
        self._paused = BhyvePaused(place, self._memory)
        place.sweep(self._host, self._base / "lock" / self.lock_name, self._base / "source")
        place.make_staging()
        if not self._keep and (why := place.make_sink(self._host)):
            self._sink_warnings = [
                f"bhyve writes the memory into {place.staging} while the guest stands,"
                f" which makes the pause longer: {why}"
            ]
        self._check_room()
        if self._keep:
            self._map_image()

    def _check_room(self) -> None:
        """Refuse before the pause what would end in a full disk in it; hold the state's room."""
        assert self._place is not None
        place = self._place
        used = sum(end - first for first, end in self._mapped.touched()) * PAGE_BYTES
        staged = _STATE_BYTES - place.held_bytes()
        staged += 0 if place.has_sink() else self._mapped.size_bytes
        try:
            os.makedirs(os.path.dirname(place.kept), 0o700, exist_ok=True)
        except OSError as error:
            raise from_oserror(error, f"make {os.path.dirname(place.kept)}") from None
        here, there = os.path.dirname(place.staging), os.path.dirname(place.kept)
        kept = 0 if self._keep else used + _STATE_BYTES
        wanted = [("staging", here, staged), ("state directory", there, kept)]
        if os.stat(here).st_dev == os.stat(there).st_dev:
            # Both at once: what is kept is written before the staging goes.
            wanted = [("staging and state directory", there, staged + kept)]
        reasons = []
        for key, path, needed in wanted:
            found = os.statvfs(path)
            free = found.f_bavail * found.f_frsize
            reasons += verdict.room_reasons(needed, free, key, path)
        if reasons:
            hints = [*reasons[1:], *self._sink_warnings]
            raise GuestError(f"guest {self._name}: {reasons[0]}", "\n".join(hints))
        place.hold_room(_STATE_BYTES)

    def _map_image(self) -> None:
        """Map the file that a checkpoint will write the memory into (-k)."""
        assert self._place is not None
        path, size = self._place.staged.memory, self._mapped.size_bytes
        try:
            self._image_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.ftruncate(self._image_fd, size)
            self._image = mmap.mmap(self._image_fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise from_oserror(error, f"make {path}") from None
        whole = memoryview(self._image)
        self._image_views = [
            whole[offset : offset + length] for _, offset, length in snapshot.memory_spans(size)
        ]

    def memory(self) -> Sequence[memoryview]:
        """Return the guest's memory; with -k the file that the checkpoint writes."""
        return self._image_views if self._keep and self._image else self._mapped.views

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the extents that may be other than zero."""
        if self._keep and self._image:
            return self._image_extents()
        return self._mapped.touched()

    def _image_extents(self) -> Iterator[tuple[int, int]]:
        for _, offset, length in snapshot.memory_spans(self._mapped.size_bytes):
            base = offset // PAGE_BYTES
            for first, end in data_extents(self._image_fd, offset, length):
                yield base + first, base + end

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Yield what the kernel saw written since the last call, where it keeps such a log."""
        return None if self._was_paused or self._keep else self._mapped.changed()

    def load_seconds(self) -> float:
        """Return what `bhyve -r` may take there to read the memory."""
        return self._mapped.size_bytes / SLOW_BYTES_PER_SECOND

    def fixed_ns(self) -> int:
        """Return what suspend and restore take, by the guest's size."""
        memory_bytes = sum(end - first for first, end in self._mapped.touched()) * PAGE_BYTES
        if self._place and not self._place.has_sink():
            memory_bytes *= 2
        return _FIXED_NS + memory_bytes * 10**9 // _LOAD_BYTES_PER_SECOND

    # The pause.

    def pause(self) -> None:
        """Suspend the guest, or checkpoint it with -k, and see that its state is complete."""
        assert self._place is not None and self._checkpoint is not None
        self._require_alive()
        self._check_room()
        if self._manager and not self._keep:
            self._manager.locks.before_suspend()
        self._was_paused = True
        self._request()
        if not self._keep and is_alive(self._checkpoint.identity):
            # bhyve may not be allowed to open the device; then into a file.
            if not self._place.has_sink():
                raise self._refused()
            self._place.drop_sink(self._host)
            self._place.drop_files()
            self._check_room()
            self._reconnect(self._checkpoint)
            self._request()
            if is_alive(self._checkpoint.identity):
                raise self._refused()
        elif self._keep:
            self._require_alive()
        self._node_left = self._host.exists(self._name)
        _, self._states = snapshot.read_states(self._place.staged, self._mapped.size_bytes)

    def _require_alive(self) -> None:
        assert self._checkpoint is not None
        if not is_alive(self._checkpoint.identity):
            raise GoneError(f"guest {self._name}: its bhyve has ended meanwhile")

    def _reconnect(self, before: Checkpoint) -> None:
        """Connect anew, to the same process: another guest's memory is not what we have mapped."""
        before.close()
        self._checkpoint = Checkpoint(self._host.run_dir, self._name, f"guest {self._name}")
        if not is_same(self._checkpoint.identity, before.identity):
            raise GoneError(f"guest {self._name}: another guest has its name now")

    def _request(self) -> None:
        assert self._place is not None and self._checkpoint is not None
        limit_s = _SUSPEND_S + self._mapped.size_bytes / SLOW_BYTES_PER_SECOND
        directory = os.open(self._place.staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._place.release_room()
        try:
            self._checkpoint.request(directory, FILE, suspend=not self._keep)
        finally:
            os.close(directory)
        self._said = ""
        try:
            self._checkpoint.await_outcome(limit_s)
        except RefusedError as error:
            if self._keep:
                raise
            self._said = str(error)

    def _refused(self) -> GuestError:
        """Return why the guest was not suspended: G5's own words, which G4 does not tell."""
        return GuestError(
            self._said
            or f"guest {self._name}: its bhyve did not suspend it, and logs the reason itself",
            "a device that cannot be saved is the usual reason",
        )

    def states(self) -> Sequence[State]:
        """Return the state that pause() has read."""
        return self._states

    def require_paused(self) -> None:
        """See that no supervisor took the suspend for a reboot, and starts the guest from its disk.

        bhyve's status after a suspend may be that of a reboot.  Source:
        dossier managers.md, 0.
        """
        assert self._paused is not None
        is_new = not self._node_left and self._host.exists(self._name)
        if self._paused.runs() or is_new:
            raise TakenError(
                f"guest {self._name}: it was started anew here after its suspend",
                "what supervises it must end with bhyve's status 0 or 5 after a suspend",
            )

    def resume(self) -> None:
        """Let it run: it does already, or is restored."""
        if self._paused:
            self._drop_checkpoint()
            self._paused.resume()

    def keep(self) -> str:
        """Write the suspended guest to disk, synced; return the directory."""
        if self._paused is None or self._place is None:
            return ""
        self._paused.keep()
        return self._place.kept

    def revive(self) -> Json:
        """Return what open_paused() needs; known after prepare()."""
        if self._place is None:
            raise GuestError(f"guest {self._name}: prepare() was not called")
        return self._place.to_json()

    def _drop_checkpoint(self) -> None:
        """Let go of the socket: bhyve serves one client, and the next one settles."""
        if self._checkpoint is not None:
            self._checkpoint.close()

    def close(self) -> None:
        """Give up socket and mappings; what prepare() made too, if it was not paused."""
        self._drop_checkpoint()
        if self._place and not self._was_paused:
            self._place.remove(self._host)
        with contextlib.suppress(BufferError):
            for view in self._image_views:
                view.release()
            self._image_views = []
            if self._image is not None:
                self._image.close()
                os.close(self._image_fd)
                self._image = None
        if self._memory is not None:
            self._memory.close()


def read_config(path: str, name: str) -> GuestConfig:
    """Read a bhyve_config(5) file (-C).  name: the guest's; wins over the file's.

    Raises GuestError, AccessError; IncompatibleError for what cannot travel.
    """
    try:
        text = Path(path).read_text()
    except PermissionError as error:
        raise AccessError(f"cannot read {path}: {error.strerror}") from None
    except OSError as error:
        raise GuestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise GuestError(f"cannot read {path}: it is no text") from None
    return split(parse(text), name)


def _taps(keys: Mapping[str, str]) -> list[str]:
    """Return the taps of a configuration."""
    return [value for key, value in keys.items() if key.endswith(".backend")]
