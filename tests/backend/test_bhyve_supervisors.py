"""The reasons that name what would start a killed guest again, judged by bhyve's parent."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.bhyve_samples import CONF, make_guest
from bhystream.backend.bhyve.datastore import find
from bhystream.backend.bhyve.supervisors import reasons
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest

VM_RUN = "/bin/sh /usr/local/sbin/vm _run web1"
LOCKF = "/usr/bin/lockf -s -t0 /tmp/bhyveload.web1.lock /usr/sbin/bhyve -c 2 web1"


def managed(tmp_path: Path, conf: str) -> VmBhyveGuest:
    make_guest(tmp_path, conf=conf)
    found = find([tmp_path], "web1", "hv1.example.org")
    assert found is not None
    return found


@pytest.mark.parametrize(
    "parent",
    [
        "sh /root/loop.sh web1",
        VM_RUN,
        "-bash loop",
        "daemon: /usr/local/bin/run-guest[77] (daemon)",
        "runsv web1",
        "/usr/bin/lockf -k /var/run/x bhyve web1",
        "/usr/local/bin/python3.11 manage.py",
    ],
)
def test_a_parent_that_is_not_known_may_start_it_again(parent: str) -> None:
    assert reasons(parent, None, False) == (
        [],
        [
            f"supervisor: the guest's bhyve was started by {ascii(parent)[:60]}, which may start"
            " bhyve again when bhyve is killed: a second copy of the guest; end that program"
            " first, or use -f if it never does"
        ],
    )


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "-csh",
        "/bin/sh",
        "bash -l",
        "tmux: server",
        "sudo -s",
        "bhyve: web1 (bhyve)",
        "sh /usr/share/examples/bhyve/vmrun.sh -c 2 web1",
        "/bin/sh -x ./vmrun.sh web1",
    ],
)
def test_a_parent_that_heeds_a_kill_is_harmless(parent: str) -> None:
    """A bhyve monitor (-M) and vmrun.sh start a guest again only if it reboots."""
    assert reasons(parent, None, False) == ([], [])


def test_cbsd_is_told_by_its_lock() -> None:
    assert reasons(LOCKF, None, False) == (
        [],
        [
            "supervisor: CBSD starts a second copy of the guest once it has moved, if on_crash is"
            " restart; set on_crash to destroy and restart the guest, or use -f if it is destroy"
        ],
    )


@pytest.mark.parametrize("program", ["/usr/local/sbin/libvirtd --daemon", "virtbhyved"])
def test_libvirt_keeps_the_guest_in_its_books(program: str) -> None:
    assert reasons(program, None, False) == (
        [],
        [
            "supervisor: libvirt does not notice that the guest has moved, and may start a second"
            " copy here; use virsh autostart --disable now, virsh destroy and undefine"
            " afterwards, and -f"
        ],
    )


@pytest.mark.parametrize("line", ["", 'on_fault="shutdown"\n', 'on_restart="restart"\n'])
@pytest.mark.parametrize("knows", [True, False])
def test_a_vm_bhyve_that_ends_on_a_fault_is_harmless(
    tmp_path: Path, line: str, knows: bool
) -> None:
    assert reasons(VM_RUN, managed(tmp_path, CONF + line), knows) == ([], [])


def test_an_old_vm_bhyve_that_restarts_on_a_fault_is_refused(tmp_path: Path) -> None:
    guest = managed(tmp_path, CONF + 'on_fault="restart"\n')
    assert reasons(VM_RUN, guest, False) == (
        [
            "vm-bhyve: on_fault is restart, and this host's vm-bhyve is older than 1.7.0, or not"
            " where the port puts it: vm-bhyve would start the guest again once it has moved;"
            ' update vm-bhyve, or start the guest with on_fault="shutdown" in web1.conf'
        ],
        [],
    )
    assert reasons(VM_RUN, guest, True) == ([], [])
