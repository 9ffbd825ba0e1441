"""The process of one `bhyve -r`, and what of the host is ours while it restores a guest.

Shared by restore.py, which starts it, and heldrestore.py, which lets it go.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.bhyve.host import Host, Vm
from bhystream.backend.bhyve.memory import system_memory
from bhystream.backend.launch import Child
from bhystream.errors import GuestError, from_oserror
from bhystream.memory.mapping import unmap

_STOP_S = 10.0
_POLL_S = 0.002


class TooLateError(GuestError):
    """bhyve had read all the memory before the file was cut: it is not held."""


@dataclass(frozen=True)
class Bhyve:
    """A child of ours.

    who: as messages call the guest.  on_wait: called often while it is waited
    for.  Where it has ended, `was_too_fast` of a method says why: it had read all
    the memory before it was held.
    """

    who: str
    child: Child
    on_wait: Callable[[], None]

    def until(
        self,
        is_done: Callable[[], bool],
        what: str,
        limit_s: float,
        was_too_fast: Callable[[], bool],
    ) -> None:
        """Wait for a condition.  Raises GuestError where it has ended, or the time is over."""
        end = time.monotonic() + limit_s
        while not is_done():
            if self.child.has_ended():
                raise self.ended(was_too_fast)
            if time.monotonic() > end:
                raise GuestError(f"{self.who}: bhyve -r: {what} after {limit_s:.0f} s")
            self.on_wait()
            time.sleep(_POLL_S)

    def stop(self, was_too_fast: Callable[[], bool]) -> None:
        """Stop it.  Raises GuestError where it has ended, or hangs."""
        if not self.child.stop(_STOP_S):
            if self.child.has_ended():
                raise self.ended(was_too_fast)
            raise GuestError(f"{self.who}: bhyve -r cannot be stopped")

    def ended(self, was_too_fast: Callable[[], bool]) -> GuestError:
        """Return why it has ended."""
        if was_too_fast():
            return self.too_late()
        return GuestError(f"{self.who}: bhyve -r: {self.child.last_words()}")

    def too_late(self) -> TooLateError:
        """Return why it is not held, where it was faster than we."""
        return TooLateError(
            f"{self.who}: bhyve -r had read the memory before it could be held",
            "try again; a host with less to do, or a guest with more memory, gives more time",
        )

    def found_no_kern(self) -> bool:
        """Say whether it ended by SIGBUS, which is where FILE.kern is empty."""
        return self.child.status == -signal.SIGBUS


@dataclass(frozen=True)
class Mapped:
    """An open VM, to be changed, and its memory, writable: a view for each segment."""

    vm: Vm
    views: list[memoryview]
    _opened: contextlib.ExitStack

    def close(self) -> None:
        """Give up the VM and its memory.  Twice is no error.

        A view that a target still holds keeps its mapping until it is dropped.
        """
        self.views.clear()
        self._opened.close()


def map_memory(host: Host, name: str, who: str) -> Mapped:
    """Open a VM and map its memory.  Raises BhyError; then nothing is open."""
    with contextlib.ExitStack() as opened:
        vm = host.open_vm(name, is_writable=True)
        opened.callback(vm.close)
        views = []
        for one in system_memory(vm.maps(), who):
            mapping = vm.map(one.gpa, one.length_bytes, is_writable=True)
            opened.callback(unmap, (), [mapping])
            views.append(memoryview(mapping))
            opened.callback(views[-1].release)
        return Mapped(vm, views, opened.pop_all())


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raise PipeError or AccessError for an OSError: files there are written."""
    try:
        yield
    except OSError as error:
        raise from_oserror(error, f"write {directory}") from None
