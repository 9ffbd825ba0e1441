"""The guest's FPU as states of the hold: what fpu.py does, between two marks.

bhyve's snapshot leaves the FPU out.  fpu.py lets each vCPU of the held guest
store its own, in pages and with registers of the guest that it puts back
afterwards.  A guest whose registers were not put back must not be let go, also
not by one who finds it when we were killed in between: so the directory has a
file as long as that lasts.
"""

from __future__ import annotations

from collections.abc import Sequence

from bhystream.backend.base import State
from bhystream.backend.bhyve import fpu
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.lent import NotPutBackError
from bhystream.backend.bhyve.memory import system_memory
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.errors import AccessError, GuestError, from_oserror


def reasons(host: Host, name: str, ncpus: int) -> list[str]:
    """Return why the FPU of a running guest's vCPUs cannot be carried, as far as that is known."""
    vm = host.open_vm(name)
    try:
        return fpu.carriable(vm, ncpus)
    except GuestError as error:
        return [f"fpu: {error}"]
    finally:
        vm.close()


def save(
    host: Host, name: str, ncpus: int, directory: SnapshotDir
) -> tuple[Sequence[State], Sequence[str]]:
    """Store the FPU of a guest that stands held: its states, and what could not be stored and why.

    Raises NotPutBackError: then the guest must not be let go, and
    directory.is_spoiled() says so.
    """
    try:
        directory.spoil()
    except OSError as error:
        return [], [f"fpu: {from_oserror(error, f'write into {directory.path}')}"]
    try:
        saved = _save(host, name, ncpus)
    except NotPutBackError:
        raise
    except (GuestError, AccessError) as error:
        directory.unspoil()
        return [], [f"fpu: {error}"]
    except BaseException:
        directory.unspoil()
        raise
    directory.unspoil()
    return saved.states, saved.reasons


def _save(host: Host, name: str, ncpus: int) -> fpu.Saved:
    vm = host.open_vm(name, is_writable=True)
    try:
        lowmem = system_memory(vm.maps(), f"guest {name}")[0]
        memory = vm.map(lowmem.gpa, lowmem.length_bytes, is_writable=True)
        try:
            return fpu.save(vm, memory, ncpus)
        finally:
            memory.close()
    finally:
        vm.close()
