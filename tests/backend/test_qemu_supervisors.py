"""Whether a guest would be started again after its QEMU has ended, judged by QEMU's ancestors."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from bhystream import hypervisors
from bhystream.backend.lineage import Above, Unit, has_systemd
from bhystream.backend.qemu import supervisors
from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import IncompatibleError, Reason
from bhystream.hypervisors import Sending
from support.waiting import until

from .qemu_rig import DEADLINE_S, Rig, listens, monitor, peer

QEMU = 1000
# The pid of a script that runs bhysend and waits for it.
OURS = 77


def judged(*commands: str, fed: Collection[int] = (), top: int = 1) -> str:
    """Return the reason.  commands: QEMU's ancestors, its parent first, pids 900 and down.

    fed: indexes of the commands with is_fed.  top: the last ancestor's pid, 0 for
    the counted one.
    """
    pids = [900 - at for at in range(len(commands))]
    if commands and top:
        pids[-1] = top
    chain = [
        Above(pid, command, at in fed)
        for at, (pid, command) in enumerate(zip(pids, commands, strict=True))
    ]
    found = supervisors.judge(
        QEMU, chain, {OURS}, lambda waiting: Reason(f"unit {sorted(waiting)}")
    )
    return found or ""


@pytest.mark.parametrize(
    ("command", "fed"),
    [
        ("sh keep-running.sh", ()),
        ("/bin/sh /usr/local/bin/loop web1", ()),
        ("bash -c while :; do qemu-system-x86_64; done", ()),
        ("-bash", (0,)),  # (while :; do qemu-system-x86_64 ...; done) &
        ("bash -s", (0,)),  # ssh host bash -s < loop.sh
        ("runsv web1", ()),
        ("s6-supervise web1", ()),
        ("supervise web1", ()),
        ("/usr/bin/python3 /usr/bin/supervisord -n", ()),
        ("supervise-daemon web1 --start qemu-system-x86_64", ()),
        ("/usr/bin/containerd-shim-runc-v2 -id 0123", ()),
        ("conmon --api-version 1", ()),
        ("", ()),  # another user's command line, which cannot be seen
    ],
)
def test_what_may_start_it_again_is_named(command: str, fed: Collection[int]) -> None:
    shown = ascii(command or "process 900")[:60]
    assert judged(command, "-bash", "sshd: root@pts/0", "init", fed=fed) == (
        f"supervisor: the guest's QEMU was started by {shown}, which may start QEMU again when"
        " QEMU is killed: a second copy of the guest; end that program first, or use -f if it"
        " never does"
    )
    # A program that only waits for QEMU does not hide its parent.
    assert judged("sudo qemu-system-x86_64", command, "init", fed=[at + 1 for at in fed])


@pytest.mark.parametrize(
    "above",
    [
        ("-bash", "sshd: root@pts/0", "sshd: root [priv]", "init"),
        ("bash --login", "tmux: server", "sh loop.sh", "init"),
        ("sudo -u qemu qemu-system-x86_64", "sudo -u qemu qemu-system-x86_64", "-zsh", "init"),
        ("timeout 1d qemu-system-x86_64", "-sh", "sh loop.sh", "init"),
        ("sshd: root@notty", "sh loop.sh", "init"),
        # Nothing waits for QEMU: process 1 has only adopted it.
        ("/process_api --init",),
        ("tini -- sleep infinity",),
        ("bash",),
    ],
)
def test_what_does_not_start_it_again_is_harmless(above: Sequence[str]) -> None:
    assert "a second copy" not in judged(*above)


def test_what_came_from_outside_the_namespace_is_not_blamed() -> None:
    """With docker exec, for example, we cannot see QEMU's parent."""
    assert judged() == ""
    assert judged("sudo qemu-system-x86_64", top=0) == ""


@pytest.mark.parametrize("command", ["sh /run.sh", "tini -- qemu-system-x86_64 -m 1G", "dinit"])
def test_process_1_may_be_there_for_qemu(command: str) -> None:
    assert "a second copy" in judged(command)


def test_a_qemu_that_is_process_1_is_its_containers() -> None:
    found = supervisors.judge(1, [], set(), lambda waiting: None)
    assert found is not None
    assert found.startswith("supervisor: the guest's QEMU is process 1 of its container")


def test_systemd_is_asked_for_the_unit() -> None:
    assert judged("/lib/systemd/systemd --user", "/sbin/init") == "unit [1000]"
    assert judged("/lib/systemd/systemd --system") == "unit [1000]"
    assert judged("sudo qemu-system-x86_64", "/sbin/init") == "unit [900, 1000]"


def test_a_script_that_runs_bhysend_too_knows_of_the_move() -> None:
    chain = [Above(OURS, "sh move.sh"), Above(1, "init")]

    def unit(waiting: Collection[int]) -> Reason:
        return Reason("unit")

    assert supervisors.judge(QEMU, chain, {OURS}, unit) is None
    # A copy of the script is another process.
    assert supervisors.judge(QEMU, [Above(78, "sh move.sh")], {OURS}, unit)
    # A supervisor that is above both still counts as a supervisor.
    for command in ("supervisord", "python3 /usr/bin/supervisord -n", "runsv web1"):
        assert supervisors.judge(QEMU, [Above(OURS, command)], {OURS}, unit)


@pytest.mark.parametrize("login", ["sshd: root@pts/0", "cron", "tmux: server", "/sbin/init"])
def test_what_is_above_a_login_does_not_wait_for_us(login: str) -> None:
    chain = [Above(30, "sh move.sh"), Above(20, login), Above(10, "python3 manager.py")]
    assert supervisors.ours(chain) == {os.getpid(), 30}


SHOWN = {"Restart": "no", "MainPID": f"{QEMU}", "UpheldBy": "", "TriggeredBy": ""}


@pytest.mark.parametrize(
    ("unit", "shown", "why"),
    [
        ("web1.service", {"Restart": "always"}, "Restart=always"),
        ("web1.service", {"Restart": "on-success"}, "Restart=on-success"),
        ("web1.service", {"Restart": "on-failure"}, "Restart=on-failure"),
        ("web1.service", {"Restart": "on-abnormal"}, "Restart=on-abnormal"),
        ("web1.service", {"Restart": "on-abort"}, "Restart=on-abort"),
        ("web1.service", {"Restart": "always", "MainPID": "0"}, "Restart=always"),
        ("web1.service", {"Restart": "always", "MainPID": "900"}, "Restart=always"),
        ("web1.service", {"UpheldBy": "vms.target"}, "systemctl stop vms.target first"),
        ("web1.service", {"TriggeredBy": "web1.timer"}, "systemctl stop web1.timer first"),
        ("web1.service", None, "systemctl does not say"),
        ("web1.service", {"Restart": "no"}, ""),
        ("web1.service", {"Restart": "on-watchdog"}, ""),
        # The unit's main process is another one, as for sshd and cron.
        ("ssh.service", {"Restart": "always", "MainPID": "4"}, ""),
        ("session-3.scope", None, ""),
    ],
)
def test_a_unit_is_judged_by_what_starts_it_again(
    unit: str, shown: Mapping[str, str] | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(asked: Unit, *names: str) -> Mapping[str, str] | None:
        assert (asked.name, set(names)) == (unit, set(SHOWN))
        return None if shown is None else SHOWN | dict(shown)

    monkeypatch.setattr(supervisors, "show", show)
    found = supervisors.unit_reason(Unit(unit), {QEMU, 900}) or Reason("")
    assert why in found
    assert bool(found) == bool(why)
    if why:
        assert found.startswith(f"supervisor: the guest's QEMU is in {unit} of systemd's")
        assert "-f" in found


def answers(socket: str) -> None:
    """Wait until a QEMU answers at a socket."""
    until(lambda: listens(socket), "a socket", DEADLINE_S)
    with monitor(socket):
        pass


LOOP = """\
while :; do
    {qemu}
    sleep 0.05
done
"""


@pytest.mark.guest
@pytest.mark.parametrize("form", ["script", "read", "copy", "waited for"])
def test_a_loop_is_refused_and_force_overrules(form: str, rig: Rig) -> None:
    """With real processes: a script, a script on standard input, a subshell, and timeout(1)."""
    qemu = shlex.join(rig.argv("here"))
    loop = LOOP.format(qemu=f"timeout 600 {qemu}" if form == "waited for" else qemu)
    path = Path(rig.path("loop.sh"))
    path.write_text(loop, encoding="utf-8")
    if form == "read":
        command = ["sh", "-c", f"sh < {path}; :"]
    elif form == "copy":
        command = ["sh", "-c", f"({loop}) & wait"]
    else:
        command = ["sh", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    socket = rig.path("here.qmp")
    try:
        answers(socket)
        with pytest.raises(IncompatibleError) as caught:
            hypervisors.open_source(Sending(f"qemu:{socket}", rig.state_dir))
        assert str(caught.value).startswith(
            "guest here: supervisor: the guest's QEMU was started by '"
        )
        hypervisors.open_source(Sending(f"qemu:{socket}", rig.state_dir, force=True)).close()
        assert peer(socket) != process.pid
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        # timeout(1) leads a process group of its own; any other QEMU is ending already.
        with suppress(OSError):
            os.kill(peer(socket), 9)


@pytest.mark.guest
def test_a_qemu_without_a_parent_is_taken(rig: Rig) -> None:
    """Such is the QEMU that bhyrecv has started and left: nothing waits for it."""
    words = ["sh", "-c", '"$@" & :', "sh", *rig.argv("here")]
    subprocess.run(words, stdin=subprocess.DEVNULL, check=True, start_new_session=True)
    socket = rig.path("here.qmp")
    answers(socket)
    pid = peer(socket)
    try:
        QemuSource(socket).close()
    finally:
        os.kill(pid, 9)


@pytest.mark.guest
@pytest.mark.skipif(
    os.geteuid() != 0 or not has_systemd(), reason="this host's init is not systemd, or not ours"
)
@pytest.mark.parametrize("restart", ["no", "always"])
def test_a_service_that_is_started_again_is_refused(restart: str, rig: Rig) -> None:
    unit = f"bhysend-test-{os.getpid()}.service"
    start = [
        "systemd-run",
        "--quiet",
        "--collect",
        f"--unit={unit}",
        f"--property=Restart={restart}",
    ]
    subprocess.run([*start, *rig.argv("here")], check=True, stdin=subprocess.DEVNULL)
    socket = rig.path("here.qmp")
    try:
        answers(socket)
        if restart == "no":
            QemuSource(socket).close()
            return
        with pytest.raises(IncompatibleError, match=f"in {unit} .* with Restart=always"):
            QemuSource(socket)
        QemuSource(socket, force=True).close()
    finally:
        subprocess.run(["systemctl", "stop", unit], check=True)
