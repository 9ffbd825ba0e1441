"""The power fails between any two changes of the disk: no state runs twice, and none is lost.

power_cut.py says what a cut can leave.  Then the host is booted again: no process, no VM, no socket
and nothing in memory is left, and the programs go on with what they find on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from . import kinds
from .pipeline import BHYRECV, BHYSEND, Ended, report, run
from .power_cut import Cut, after_a_boot, cuts, recorded
from .qemu import QemuPlace, QemuTraveller
from .standin import standin_place
from .travel import Site, Traveller, short_directory

# For each cut a test runs one program or two.
pytestmark = pytest.mark.timeout(1200)


class Failing:
    """A host whose power fails, and the guest that arrives there.

    disk: the directory that is recorded; the first program makes the state directory in it.
    """

    def __init__(self, directory: Path, guest: Traveller) -> None:
        self.directory = directory
        self.guest = guest
        self.at, self.to = guest.place, guest.next()
        self.disk = directory / "disk"
        self.disk.mkdir(mode=0o700)
        self.env = {**os.environ, "BHYSEND_STATE_DIR": str(self.disk / "new/state")}
        self.stream = directory / "stream"

    def close(self) -> None:
        self.boot()
        self.boot_source()
        self.guest.close()

    def keep(self) -> None:
        """Write a checkpoint of the guest; the guest runs on where it is."""
        env = {**self.env, "BHYSEND_STATE_DIR": str(self.directory / "here")}
        with self.stream.open("wb") as file:
            [ended] = run(self.guest.send("-k"), env=env, stdout=file)
        assert ended.status == 0, report(ended)

    def record(self, name: str, *options: str) -> Iterator[Cut]:
        """Run bhyrecv until it ends with success; return every cut that is possible meanwhile."""
        log = self.directory / name
        ended = self._run(recorded(self._command(*options), self.disk, log), options)
        assert ended.status == 0, report(ended)
        return cuts(log)

    def go_on(self, cut: Cut, *options: str) -> Ended:
        """Boot the destination again after a cut, and run bhyrecv."""
        self.boot()
        cut.put_back()
        return self.again(*options)

    def again(self, *options: str) -> Ended:
        return self._run(after_a_boot(self._command(*options)), options)

    def _command(self, *options: str) -> list[str]:
        if options[:1] in (("--resume",), ("--discard",)):
            return [*standin_place(self.to).environment, *BHYRECV, *options]
        return self.guest.receive(self.to, *options)

    def _run(self, command: Sequence[str], options: Sequence[str]) -> Ended:
        with self.stream.open("rb") as file:
            [ended] = run(command, env=self.env, stdin=file)
        return ended

    def loaded(self) -> list[str]:
        """Return the phases of the destination's records."""
        paths = (self.disk / "new/state/destination").glob("*.json")
        return [json.loads(path.read_bytes())["phase"] for path in paths]

    def boot(self) -> None:
        """Lose everything of the destination that a power cut takes: all but the disk."""
        lose(self.to)

    def boot_source(self) -> None:
        """Lose everything of the source that a power cut takes: all but the disk."""
        lose(self.at)
        for line in Path("/proc/mounts").read_text().splitlines():
            if line.split()[1].startswith(f"{self.directory}/"):
                subprocess.run(["umount", "-l", line.split()[1]], check=True)


def lose(place: Site) -> None:
    """Remove a host's processes, VMs, sockets and files in memory."""
    with place.reaped():
        pass
    if isinstance(place, QemuPlace):
        place.qmp.unlink(missing_ok=True)
        return
    host = standin_place(place)
    for name in ("vmm", "run"):
        for path in (host.rig.directory / name).iterdir():
            path.unlink()
    for path in host.staging.iterdir():
        shutil.rmtree(path)


@pytest.fixture(params=[kinds.G5])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def failing(kind: str) -> Iterator[Failing]:
    directory = short_directory()
    guest = QemuTraveller(kinds.SMALL) if kind == "qemu" else kinds.own(kind)
    made = Failing(directory, guest)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def said(cut: Cut, *ended: Ended) -> str:
    return (
        f"{cut.what}, with {cut.kind}, {sorted(cut.marks)}, {sorted(cut.files)}: {report(*ended)}"
    )


@pytest.mark.parametrize("kind", [kinds.G5, kinds.QEMU])
def test_a_stream_that_may_have_run_is_not_started_again(kind: str, failing: Failing) -> None:
    failing.keep()
    seen = set()
    for cut in failing.record("start"):
        if kind == "qemu" and not any(".json" in name for name in cut.files):
            continue  # QEMU is slow, and only repeats what the stand-in shows
        ended = failing.go_on(cut)
        has_run = "RUN" in cut.marks
        seen.add((has_run, ended.status))
        if ended.status != 0:
            assert ended.status == 76 and "was started on this host before" in ended.stderr, said(
                cut, ended
            )
        assert failing.to.runs() is (ended.status == 0), said(cut, ended)
    # After a cut between the record and the start, bhyrecv says that the guest may have run,
    # although it did not.
    assert seen | {(False, 0)} == {(False, 0), (False, 76), (True, 76)}


def test_a_guest_that_was_left_loaded_is_there(failing: Failing) -> None:
    failing.keep()
    seen = set()
    for cut in failing.record("load", "-u"):
        ended = failing.go_on(cut, "--resume", failing.guest.name)
        seen.add(("DONE" in cut.marks, ended.status))
        if ended.status != 0:
            # The source does not know yet that the guest is here, and sends the guest again.
            again = failing.again("-u")
            assert again.status == 0, said(cut, ended, again)
            assert failing.loaded() == ["loaded"], said(cut, ended, again)
        else:
            assert failing.to.runs(), said(cut, ended)
    assert seen == {(False, 0), (False, 69), (True, 0)}


def test_a_guest_left_loaded_runs_once_and_is_not_lost(failing: Failing) -> None:
    failing.keep()
    for _ in failing.record("load", "-u"):
        pass
    seen = set()
    name = failing.guest.name
    for cut in failing.record("resume", "--resume", name):
        ended = failing.go_on(cut, "--resume", name)
        has_run = "RUN" in cut.marks
        seen.add((has_run, ended.status))
        assert failing.to.runs() is (ended.status == 0), said(cut, ended)
        if ended.status == 0:
            assert not has_run, said(cut, ended)
            continue
        assert ended.status == 69, said(cut, ended)
        if not has_run:
            # The operator knows that the guest has not run, and follows the hint.
            assert "it may have run" in ended.stderr, said(cut, ended)
            path = ended.stderr.partition("rm ")[2].split()[0]
            os.unlink(path)
            ended = failing.again("--resume", name)
            assert ended.status == 0, said(cut, ended)
    assert seen == {(False, 0), (False, 69), (True, 69)}


def test_what_is_left_of_one_that_may_have_run_is_removed_for_good(failing: Failing) -> None:
    failing.keep()
    for _ in failing.record("load", "-u"):
        pass
    name = failing.guest.name
    ran = next(one for one in failing.record("resume", "--resume", name) if "RUN" in one.marks)
    failing.boot()
    ran.put_back()
    [id_] = [path.stem for path in failing.disk.glob("new/state/destination/*.json")]
    for cut in failing.record("discard", "--discard", id_):
        ended = failing.go_on(cut, "--resume", name)
        assert ended.status == 69 and not failing.to.runs(), said(cut, ended)


def test_what_is_broken_may_have_run(failing: Failing) -> None:
    """Each record of the destination is made empty or cut short, as by a disk that lies."""
    failing.keep()
    for _ in failing.record("load", "-u"):
        pass
    name = failing.guest.name
    cut = next(one for one in failing.record("resume", "--resume", name) if "RUN" in one.marks)
    for role in ("destination/*.json", "loaded/*.started"):
        for size in (0, 1, 40):
            failing.boot()
            cut.put_back()
            [path] = (failing.disk / "new/state").glob(role)
            os.truncate(path, size)
            for options in (("--resume", name), (), ("-u",)):
                ended = failing.again(*options)
                assert ended.status in (69, 76), report(ended)
                assert not failing.to.runs()


def test_who_let_go_of_a_guest_knows_it_after_a_cut(failing: Failing) -> None:
    """Both sides of an answered move: after GO the source never claims the guest for itself."""
    there = failing.directory / "there"
    there.mkdir()
    receive = failing.guest.receive(failing.to)
    receive[1:1] = [f"BHYSEND_STATE_DIR={there}/new/state"]
    send = recorded(failing.guest.send(), failing.disk, failing.directory / "source")
    receive = recorded(receive, there, failing.directory / "destination")
    [ended] = run([*send, *receive], env=failing.env)
    assert ended.status == 0, report(ended)
    failing.boot()
    failing.boot_source()
    for cut in cuts(failing.directory / "source"):
        cut.put_back()
        [ended] = run([*BHYSEND, "-l"], env=failing.env)
        if "GO" in cut.marks and "OVER" not in cut.marks:
            assert ended.output.split(b"\t")[1] in (b"in-doubt", b"moved"), said(cut, ended)
    seen = set()
    env = {**failing.env, "BHYSEND_STATE_DIR": f"{there}/new/state"}
    for cut in cuts(failing.directory / "destination"):
        cut.put_back()
        [id_] = {path.stem for path in there.glob("new/state/destination/*.json")} or {"0" * 32}
        query = [*standin_place(failing.to).environment, *BHYRECV, "-q", id_]
        command = after_a_boot(query)
        [ended] = run(command, env=env)
        word = ended.output.decode().split()[-1] if "FAILED" not in ended.stderr else "FAILED"
        seen.add(("READY" in cut.marks, "RUN" in cut.marks, word))
        assert not failing.to.runs()
    assert {word for _, has_run, word in seen if has_run} == {"RAN"}, seen
    assert {word for is_ready, _, word in seen if is_ready} == {"RAN", "FAILED"}, seen


def test_a_guest_whose_end_is_out_is_held_after_a_cut(failing: Failing) -> None:
    send = recorded(failing.guest.send(), failing.disk, failing.directory / "source")
    with failing.stream.open("wb") as file:
        [ended] = run(send, env=failing.env, stdout=file)
    assert ended.status == 80, report(ended)
    failing.boot_source()
    seen = set()
    for cut in cuts(failing.directory / "source"):
        cut.put_back()
        [ended] = run([*BHYSEND, "-l"], env=failing.env)
        seen.add(("END" in cut.marks, b"\theld\t" in ended.output))
    assert seen == {(False, False), (False, True), (True, True)}
