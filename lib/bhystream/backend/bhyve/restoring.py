"""The process of one `bhyve -r`, and its VM's memory, while bhyve restores a guest.

restore.py, which starts bhyve, and waitingrestore.py, which releases it, share this module.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.adopted import Adopted
from bhystream.backend.bhyve.host import Host, Vm
from bhystream.backend.bhyve.memory import system_memory
from bhystream.backend.launch import Child
from bhystream.errors import GuestError, from_oserror
from bhystream.memory.mapping import unmap

_STOP_S = 10.0
_POLL_S = 0.002


class TooLateError(GuestError):
    """bhyve had read all the memory before the file was cut, and so does not wait."""


@dataclass(frozen=True)
class Bhyve:
    """A bhyve that is our child, or that of vm-bhyve's supervisor.

    who: the guest, as messages name it.  on_wait: called often during waits for
    bhyve.  A method's was_too_fast: returns whether bhyve has read all the memory
    before it could be made to wait; called if bhyve has ended.
    """

    who: str
    child: Child | Adopted
    on_wait: Callable[[], None]

    def until(
        self,
        is_done: Callable[[], bool],
        what: str,
        limit_s: float,
        was_too_fast: Callable[[], bool],
    ) -> None:
        """Wait until a condition holds.

        what: says what has not happened when the time is over.  limit_s: in
        seconds.  Raises GuestError if bhyve has ended (TooLateError if it was
        too fast), or if the time is over.
        """
        end = time.monotonic() + limit_s
        while not is_done():
            if self.child.has_ended():
                raise self.ended(was_too_fast)
            if time.monotonic() > end:
                raise GuestError(f"{self.who}: bhyve -r: {what} after {limit_s:.0f} s")
            self.on_wait()
            time.sleep(_POLL_S)

    def stop(self, was_too_fast: Callable[[], bool]) -> None:
        """Stop bhyve (SIGSTOP).  Raises GuestError if it has ended, or does not stop."""
        if not self.child.stop(_STOP_S):
            if self.child.has_ended():
                raise self.ended(was_too_fast)
            raise GuestError(f"{self.who}: bhyve -r cannot be stopped")

    def ended(self, was_too_fast: Callable[[], bool]) -> GuestError:
        """Return the error that says why bhyve has ended."""
        if was_too_fast():
            return self.too_late()
        return GuestError(f"{self.who}: bhyve -r: {self.child.last_words()}")

    def too_late(self) -> TooLateError:
        """Return the error for a bhyve that was too fast."""
        return TooLateError(
            f"{self.who}: bhyve -r had read the memory before it could be stopped",
            "try again; a host with less to do, or a guest with more memory, gives more time",
        )

    def found_no_kern(self) -> bool:
        """Say whether bhyve ended by SIGBUS, as it does if FILE.kern is empty."""
        return self.child.status == -signal.SIGBUS


@dataclass(frozen=True)
class Mapped:
    """A VM, opened for writing, and its memory: one writable view for each segment."""

    vm: Vm
    views: list[memoryview]
    _opened: contextlib.ExitStack

    def close(self) -> None:
        """Close the VM and release its memory.  May be called twice.

        While a target still has a view, the mapping of that view stays.
        """
        self.views.clear()
        self._opened.close()


def map_memory(host: Host, name: str, who: str) -> Mapped:
    """Open a VM and map its memory.  Raises BhyError if that fails, and leaves nothing open."""
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
    """Turn an OSError of this block, which writes files there, into its BhyError.

    Raises InputOutputError or AccessError.
    """
    try:
        yield
    except OSError as error:
        raise from_oserror(error, f"write {directory}") from None
