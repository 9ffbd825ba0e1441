"""A guest outlives the PID namespace or systemd unit that bhyrecv ran in, or is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from backend.qemu_rig import peer, state_of
from bhystream.backend.lineage import has_systemd, unit_of
from support.waiting import until

from .pair import Pair, paired
from .pipeline import BHYRECV, BHYSEND, Pipeline, report, run

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="unshare(1) of a PID namespace needs root"),
]

# The propagation stays unchanged, because in a chroot the root is not a mount, and cannot be made
# private; the mount of /proc is private in any case.
UNSHARE = (
    "unshare", "--pid", "--fork", "--kill-child", "--propagation", "unchanged", "--mount-proc",
)  # fmt: skip


RECEIVE = (*BHYRECV, "there")


@pytest.fixture
def pair() -> Iterator[Pair]:
    with paired() as made:
        yield made


def test_a_namespace_that_ends_with_bhyrecv_is_refused(pair: Pair) -> None:
    pair.assert_refused(pair.send(*UNSHARE, *RECEIVE), "bhyrecv is process 1 of its container")
    forced = (*BHYRECV, "-f", "there")
    pair.assert_refused(pair.send(*UNSHARE, *forced), "bhyrecv is process 1 of its container")


@pytest.mark.parametrize("command", [("sh", "-c", '"$@"; :', "sh"), ("timeout", "600")])
def test_a_namespace_whose_process_1_waits_for_bhyrecv_is_refused(
    pair: Pair, command: Sequence[str]
) -> None:
    pair.assert_refused(pair.send(*UNSHARE, *command, *RECEIVE), "pid: process 1 of the container")


def test_a_namespace_without_its_own_proc_is_refused(pair: Pair) -> None:
    """In such a /proc bhyrecv would see other processes in place of its QEMU."""
    words = (*UNSHARE[:-1], "sh", "-c", '"$@"; :', "sh", *RECEIVE)
    pair.assert_refused(pair.send(*words), "pid: /proc is not of bhyrecv's PID namespace")


def test_a_guest_goes_on_in_a_container_that_stays(pair: Pair, tmp_path: Path) -> None:
    """As by docker exec: the namespace outlives the command that entered it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    hold = f"echo up; read line < {gate}"
    with Pipeline([*UNSHARE, "sh", "-c", hold], env=pair.env) as container:
        init = _child_of(container)
        enter = ("nsenter", "-t", str(init), "-p", "-m", "-r")
        pair.assert_moved(pair.send(*enter, *RECEIVE))
        container[0].kill()
        assert container.wait()[0].status == -9


def _child_of(pipeline: Pipeline) -> int:
    """Wait until the namespace has a process 1; return the pid of that process here."""
    children = Path(f"/proc/{pipeline[0].pid}/task/{pipeline[0].pid}/children")
    until(lambda: b"up\n" in pipeline[0].output, "process 1")
    return int(children.read_text().split()[0])


needs_systemd = pytest.mark.skipif(not has_systemd(), reason="this host's init is not systemd")


def assert_outlives(pair: Pair, unit: str) -> None:
    """End the unit that bhyrecv ran in; assert that the guest is in another unit, and runs."""
    run(["systemctl", "stop", unit], env=pair.env)
    assert state_of(pair.there) == "running"
    left = unit_of(peer(pair.there))
    assert left is not None
    assert left.name.startswith("bhyrecv-there-") and left.name.endswith(".scope")


@needs_systemd
def test_a_guest_outlives_the_scope_that_bhyrecv_ran_in(pair: Pair) -> None:
    """The test ends the scope, as systemd ends a session's scope at logout."""
    name = f"bhyrecv-test-{os.getpid()}"
    # The scope lasts because another process besides bhyrecv is in it.
    words = ["systemd-run", "--scope", "--quiet", "--collect", f"--unit={name}"]
    script = 'sleep 600 </dev/null >/dev/null 2>&1 & exec "$@"'
    pair.assert_moved(pair.send(*words, "sh", "-c", script, "sh", *RECEIVE))
    assert_outlives(pair, f"{name}.scope")


@needs_systemd
def test_a_guest_outlives_the_service_that_was_bhyrecv(pair: Pair, tmp_path: Path) -> None:
    """When bhyrecv ends, its whole service ends, as in `systemd-run --pipe bhyrecv`."""
    stream = tmp_path / "stream"
    with stream.open("wb") as file:
        [held] = run([*BHYSEND, f"qemu:{pair.here}"], env=pair.env, stdout=file)
    assert held.status == 80, report(held)
    name = f"bhyrecv-test-{os.getpid()}"
    words = ["systemd-run", "--quiet", "--collect", f"--unit={name}"]
    words += [f"--property=StandardInput=file:{stream}"]
    words += [f"--setenv=BHYSEND_STATE_DIR={pair.env['BHYSEND_STATE_DIR']}"]
    [started] = run([*words, *RECEIVE], env=pair.env)
    assert started.status == 0, report(started)
    ended = ["systemctl", "show", "--property=ActiveState", "--value", f"{name}.service"]
    until(lambda: run(ended, env=pair.env)[0].output != b"active\n", "the end of bhyrecv")
    assert_outlives(pair, f"{name}.service")
