"""The FPU of a held guest, as states: what fpu.py does, with the directory's journal.

bhyve's snapshot leaves the FPU out.  fpu.py lets each vCPU of the held guest
store its own FPU, and for that borrows pages and registers of the guest, which
fpu.py puts back afterwards.  A guest whose registers were not put back must not
be let go.  If we are killed in between, the process that finds the guest finds
the journal too, and puts the registers back first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bhystream.backend.bhyve import fpu, lent
from bhystream.backend.bhyve.host import Host, Vm
from bhystream.backend.bhyve.lent import NotPutBackError
from bhystream.backend.bhyve.memory import system_memory
from bhystream.backend.bhyve.physical import Lowmem
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.errors import AccessError, GuestError
from bhystream.guest import State


def save(
    host: Host, name: str, ncpus: int, directory: SnapshotDir
) -> tuple[Sequence[State], Sequence[str]]:
    """Store the FPU of a held guest; return the states, and the reason for each missing state.

    Raises NotPutBackError: then the guest must not be let go, and the
    directory's journal says so.
    """
    try:
        with _opened(host, name) as (vm, memory):
            saved = fpu.save(vm, memory, ncpus, directory.journal)
    except NotPutBackError:
        raise
    except (GuestError, AccessError) as error:
        return [], [f"fpu: {error}"]
    return saved.states, saved.reasons


def put_back(host: Host, name: str, directory: SnapshotDir) -> None:
    """Put back the registers and pages that a process borrowed before it was killed.

    The guest stands held.  Raises GuestError, AccessError: then the guest must
    not be let go.
    """
    with _opened(host, name) as (vm, memory):
        lent.put_back(vm, memory, directory.journal)


@contextmanager
def _opened(host: Host, name: str) -> Iterator[tuple[Vm, Lowmem]]:
    """Open a VM to be changed, and map its lowmem, writable."""
    vm = host.open_vm(name, is_writable=True)
    try:
        lowmem = system_memory(vm.maps(), f"guest {name}")[0]
        memory = vm.map(lowmem.gpa, lowmem.length_bytes, is_writable=True)
        try:
            yield vm, memory
        finally:
            memory.close()
    finally:
        vm.close()
