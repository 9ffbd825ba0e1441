"""The scope in which QEMU is started, judged by the unit and namespace of bhyrecv."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence

import pytest

from bhystream.backend import programs
from bhystream.backend.lineage import Above, Unit
from bhystream.backend.qemu import scope

RUN = "/usr/bin/systemd-run"


@pytest.fixture(autouse=True)
def systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a host with systemd's programs, whose logind ends a user's processes."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(scope, "_user", lambda: "ann")
    monkeypatch.setattr(programs, "ask", lambda *argv: "KillUserProcesses=yes\n")
    monkeypatch.setattr(scope, "show", lambda unit, *names: {"KillMode": "control-group"})


def at(monkeypatch: pytest.MonkeyPatch, unit: Unit | None, user: int, *, lingers: bool) -> None:
    monkeypatch.setattr(scope, "unit_of", lambda pid: unit)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(
        os.path, "exists", lambda path: lingers and path == "/var/lib/systemd/linger/ann"
    )


@pytest.mark.parametrize(
    "unit",
    [Unit("run-u7.service"), Unit("session-3.scope"), Unit("ssh.service"), Unit("init.scope", 0)],
)
def test_root_leaves_every_unit(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, unit, 0, lingers=False)
    name = f"--unit=bhyrecv-web1-{os.getpid()}"
    words = [RUN, "--scope", "--quiet", "--collect", name, "--slice=machine.slice", "--"]
    assert scope.leaving("web1") == words
    assert scope.unit_reason(unit) == ""


def test_a_user_who_lingers_leaves_for_a_scope_of_his_own(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, Unit("session-3.scope"), 1000, lingers=True)
    words = scope.leaving("web1")
    assert words[:3] == ["/usr/bin/env", "XDG_RUNTIME_DIR=/run/user/1000", RUN]
    assert words[-2:] == ["--user", "--"]
    assert scope.unit_reason(Unit("session-3.scope")) == ""


def test_without_a_unit_there_is_nothing_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, None, 0, lingers=False)
    assert scope.leaving("web1") == []


@pytest.mark.parametrize(
    ("unit", "why"),
    [
        (Unit("session-3.scope"), "session-3.scope of systemd's, which is ended at the logout"),
        (Unit("app.scope", 1000), "app.scope of systemd's, which ends when its user has logged"),
        (Unit("x.service", 1000), "x.service of systemd's, which ends when its user has logged"),
        (Unit("x.service"), "x.service of systemd's, which ends with all that it has started"),
        (Unit("job.scope"), ""),
    ],
)
def test_a_user_whom_the_guest_could_not_outlive_is_refused(
    unit: Unit, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, unit, 1000, lingers=False)
    assert scope.leaving("web1") == []
    found = scope.unit_reason(unit)
    assert why in found
    assert bool(found) == bool(why)
    if why:
        assert found.startswith(f"unit: bhyrecv runs in {unit.name} of systemd's, which ")
        assert "loginctl enable-linger ann" in found


@pytest.mark.parametrize(
    ("answer", "stays"),
    [("KillUserProcesses=no\n", True), ("KillUserProcesses=yes\n", False), ("", False)],
)
def test_logind_says_what_a_logout_ends(
    answer: str, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, Unit("session-3.scope"), 1000, lingers=False)
    monkeypatch.setattr(programs, "ask", lambda *argv: answer)
    assert (scope.unit_reason(Unit("session-3.scope")) == "") == stays


@pytest.mark.parametrize(
    ("shown", "stays"),
    [({"KillMode": "process"}, True), ({"KillMode": "mixed"}, False), (None, False)],
)
def test_a_service_says_what_it_ends(
    shown: Mapping[str, str] | None, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, Unit("cron.service"), 1000, lingers=False)
    monkeypatch.setattr(scope, "show", lambda unit, *names: shown)
    assert (scope.unit_reason(Unit("cron.service")) == "") == stays


def test_a_unit_that_cannot_be_left_for_want_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, Unit("run-u7.service"), 0, lingers=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert scope.leaving("web1") == []
    assert "install systemd-run" in scope.unit_reason(Unit("run-u7.service"))


@pytest.mark.parametrize(
    ("commands", "waits"),
    [
        (("sh -c bhyrecv web1; :",), True),
        (("sh receive.sh", "tini -- sh receive.sh"), True),
        (("timeout 1h bhyrecv web1", "docker-init -- timeout 1h bhyrecv web1"), True),
        (("bash",), False),  # a terminal's shell ends when its user leaves
        (("bash", "tini -- bash"), False),
        (("sh receive.sh", "bash", "sh -c bash"), False),
        (("sh receive.sh", "python3 agent.py"), False),
        (("sh receive.sh", "sshd: root@notty", "sh -c sshd"), False),
        (("sh receive.sh", "/sbin/init"), False),
        ((), False),  # as with docker exec
    ],
)
def test_process_1_may_only_wait_for_bhyrecv(commands: Sequence[str], waits: bool) -> None:
    pids = [*range(len(commands), 0, -1)]
    chain = [Above(pid, command) for pid, command in zip(pids, commands, strict=True)]
    found = scope.waiting(chain)
    assert bool(found) == waits
    if waits:
        assert found.startswith(f"pid: process 1 of the container, {commands[-1]!r}, seems to wait")


def test_a_script_that_is_read_is_a_script() -> None:
    assert scope.waiting([Above(1, "sh", is_fed=True)])
