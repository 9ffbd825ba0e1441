"""`bhyve -r`, started by us: what runs a guest from snapshot files.

    created?   a guest without a boot ROM needs its VM to exist before
    socket     bhyve makes its checkpoint socket after the whole restore and
               before it lets the vCPUs run: while there is none, they never ran

So a socket node that others left is removed first, and afterwards its mere
existence says that the vCPUs may have run.  Confirmed in source, never run:
bhyverun.c, end of main(): the vCPU threads are made suspended, a socket that
cannot be made ends bhyve, and vm_resume_cpu() comes behind it.  14:
fel1x-developer/freebsd-src@2d614aa2; 15: revytechinc/freebsd-src-nested-vm@02c13c93.
A bhyve without snapshots knows no -r, and ends with its usage.

Between the socket and the vCPUs bhyve enters capability mode and sets the
clock, and could still end; so it is looked at once more a moment later.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from bhystream.backend.bhyve.command import argv, config_file
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.place import Place
from bhystream.backend.bhyve.snapshot import Files
from bhystream.backend.launch import Child
from bhystream.backend.process import EndedError, Identity, identify, peer_pid
from bhystream.errors import GuestError, from_oserror

_LIMIT_S = 60.0
SLOW_BYTES_PER_SECOND = 100 << 20  # of a slow disk: how long a memory file may take
_PROBE_S = 5.0
_POLL_S = 0.002
_MOMENT_S = 0.05  # from the socket to the vCPUs there are a few system calls


def listens(host: Host, name: str) -> bool:
    """Say whether a bhyve answers at a guest's checkpoint socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(host.run_dir / name))
        except (TimeoutError, BlockingIOError):
            return True  # its queue is full: somebody is there
        except OSError:
            return False
    return True


def listener(host: Host, name: str) -> Identity | None:
    """Return the process that listens at a guest's checkpoint socket, None where none does.

    Raises GuestError where its queue is full, so that it cannot be seen.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(host.run_dir / name))
        except (TimeoutError, BlockingIOError):
            raise GuestError(f"guest {name}: the bhyve of that name is busy, or hangs") from None
        except OSError:
            return None
        with contextlib.suppress(EndedError):
            return identify(peer_pid(probe, "bhyve"), "bhyve")
    return None


class Restore:
    """One guest that is started from its snapshot; its process is ours until let_go()."""

    def __init__(self, host: Host, place: Place, files: Files) -> None:
        """Nothing is started yet.  files: the snapshot, complete."""
        self._host = host
        self._name = place.name
        self._who = f"guest {place.name}"
        self._place = place
        self._files = files
        self._limit_s = _LIMIT_S + place.memory_bytes / SLOW_BYTES_PER_SECOND
        self._log_path = place.log_path
        self._socket = host.run_dir / place.name
        self._child: Child | None = None
        self._made = False
        self.may_have_run = False

    def run(self) -> None:
        """Start it, and return when it runs; it is nobody's from then on.

        Raises BhyError: then may_have_run says whether it may have, and if not,
        nothing of it is left.
        """
        try:
            self._start()
            self._await()
        except BaseException:
            self._undo()
            raise
        if self._child:
            self._child.let_go()

    def _start(self) -> None:
        if self._place.is_started():
            raise GuestError(f"{self._who}: bhyve -r was started already")
        if listens(self._host, self._name):
            raise GuestError(f"{self._who}: a bhyve of that name runs here")
        if self._host.exists(self._name):
            raise GuestError(f"{self._who}: a VM of that name is here; destroy it first")
        try:
            self._socket.unlink(missing_ok=True)
        except OSError as error:
            raise from_oserror(error, f"remove {self._socket}") from None
        config = Path(f"{self._files.memory}.conf")
        try:
            config.write_text(config_file(self._place.keys, {}))
            config.chmod(0o600)
        except OSError as error:
            raise from_oserror(error, f"write {config}") from None
        lock = self._place.lock_started()
        try:
            self._made = True
            if "lpc.bootrom" not in self._place.keys:
                self._host.create(self._name)
            words = argv(self._host.program(), self._name, str(config), str(self._files.memory))
            # Our own environment may be that of an operator's --resume.
            self._child = Child(words, self._log_path, self._host.environment(), [lock])
        finally:
            os.close(lock)

    def _await(self) -> None:
        """Wait for the socket.  Raises GuestError."""
        assert self._child is not None
        end = time.monotonic() + self._limit_s
        while not listens(self._host, self._name):
            if self._child.has_ended():
                raise GuestError(f"{self._who}: bhyve -r: {self._child.last_words()}")
            if time.monotonic() > end:
                raise GuestError(f"{self._who}: bhyve -r: not done in {self._limit_s:.0f} s")
            time.sleep(_POLL_S)
        if self._child.ends_within(_MOMENT_S):
            raise GuestError(f"{self._who}: bhyve -r: {self._child.last_words()}")

    def _undo(self) -> None:
        """End what never ran; what may have run is left alone."""
        if self._child and not self._child.has_ended() and not self._socket.exists():
            self._child.kill()
        if self._child and self._socket.exists():
            self.may_have_run = True
            self._child.let_go()
            return
        if self._child:
            self._child.remove_log()
            self._place.forget_started()
        if self._made:
            with contextlib.suppress(GuestError):
                self._host.destroy(self._name)
