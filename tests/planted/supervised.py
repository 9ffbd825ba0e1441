"""Bugs of a guest's start by vm-bhyve: vm-bhyve boots a guest that runs elsewhere."""

from __future__ import annotations

from planted.bug import Bug, Kind

LOCKS = "backend/bhyve/locks.py"
START = "backend/bhyve/vmstart.py"
END = "backend/bhyve/vmdirectory.py"
TESTS = "backend/test_bhyve_vmstart.py::"

BUGS = (
    Bug(
        Kind.BOOTED,
        "vm-bhyve is asked although PATH does not reach bhyve",
        START,
        '            if not self._host.manager_finds(self._directory / "bhyve"):\n',
        "            if False:\n",
        (f"{TESTS}test_vm_bhyve_that_loses_path_is_not_asked",),
    ),
    Bug(
        Kind.BOOTED,
        "a guest that vm-bhyve boots itself is let run",
        START,
        "                self._host.destroy(self._locks.name)\n",
        "",
        (f"{TESTS}test_a_guest_that_vm_bhyve_boots_instead_is_stopped_at_once",),
        also=("TimeoutError", "AssertionError"),
    ),
    Bug(
        Kind.BOOTED,
        "the programs for vm-bhyve are removed before its supervisor has ended",
        END,
        "    if locks.is_removed_within(_END_S):\n",
        "    if True:\n",
        (f"{TESTS}test_a_bhyve_that_is_killed_while_it_waits_is_not_booted_anew",),
        also=("TimeoutError",),
    ),
    Bug(
        Kind.BOOTED,
        "run.lock names this host while the guest is rebuilt",
        START,
        "        self._locks.wait_here()\n",
        "",
        (f"{TESTS}test_what_a_killed_bhyrecv_leaves_boots_nothing",),
        also=("TimeoutError",),
    ),
    Bug(
        Kind.BOOTED,
        "a guest that has not come back is not locked again",
        END,
        "                locks.gone_to(away)\n",
        "                pass\n",
        (f"{TESTS}test_a_guest_comes_back_to_where_it_moved_from",),
    ),
    Bug(
        Kind.BOOTED,
        "run.lock names the source while the guest is held there",
        "backend/bhyve/source.py",
        '            guest.manager.locks.leaves(is_secured=level.strip() not in ("-1", "0"))\n',
        "            pass\n",
        (
            "backend/test_bhyve_lifecycle.py::"
            "test_a_guest_of_vm_bhyves_that_is_held_is_not_booted_if_this_host_restarts",
        ),
    ),
    Bug(
        Kind.BOOTED,
        "a datastore that both hosts share is taken for the source's own",
        LOCKS,
        '        return self._lines() == [HELD, self.hostname, ""]\n',
        "        return self._lines()[0] == HELD\n",
        ("backend/test_bhyve_vmbhyve.py::test_a_guest_that_is_about_to_leave_is_still_its_hosts",),
        is_quick=True,
    ),
    Bug(
        Kind.BOOTED,
        "another machine than the stream's is taken from vm-bhyve",
        "backend/bhyve/wanted.py",
        "        if reasons := hard if force else hard + soft:\n            raise another",
        "        if reasons := []:\n            raise another",
        (f"{TESTS}test_another_machine_is_refused_before_memory_moves",),
    ),
    Bug(
        Kind.BOOTED,
        "the supervisor of a held guest can remove run.lock at a shutdown",
        LOCKS,
        "            _fix(self._run, is_secured=is_secured)\n",
        "",
        (
            "backend/test_bhyve_locks.py::test_the_supervisor_cannot_remove_the_lock_of_a_guest_that_leaves",
        ),
        is_quick=True,
    ),
)
