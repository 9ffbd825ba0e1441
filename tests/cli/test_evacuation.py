"""The script of bhysend(8) that empties a host, run as it stands in the page.

Some tests run it over real programs and three guests of two stand-ins, whose vm-bhyve is the
stand-in's supervisor; others over a bhysend that only ends with a status.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from backend.bhyve_rig import Two, require_sink, sink_prefix, two_hosts
from standin.rig import Console, Spec, assert_unbroken
from support.man_pages import examples
from support.waiting import until

from .pipeline import BHYRECV, BHYSEND, Ended, Pipeline, report, run
from .travel import fifo, script

[SCRIPT] = [one for one in examples("bhysend.8") if "evacuate host guest" in one]
SHELLS = [["sh"], ["dash"], ["bash", "--posix"], ["busybox", "sh"], ["mksh"], ["ksh"]]
HERE = [shell for shell in SHELLS if shutil.which(shell[0])]


def test_the_script_is_short() -> None:
    assert len(SCRIPT.splitlines()) <= 13


# A bhysend that only ends with a status.

# STATUS has words "web1=0" and "-n:web1=76"; a guest without a word has status 0.
FAKE = r"""
name=$1; case $1 in -n) name=-n:$2 ;; esac
# The trap comes first: whoever sees the note may interrupt.
if [ "$name" = "$GATED" ]; then trap : INT; fi
echo "$*" >> "$NOTES"
if [ "$name" = "$GATED" ]; then read -r _ < "$GATE"; fi
for each in $STATUS; do
    case $each in "$name="*) exit "${each#*=}" ;; esac
done
exit 0"""


class Fake:
    """The script over a bhysend that only notes its words and ends with a status."""

    def __init__(self, directory: Path, shell: Sequence[str]) -> None:
        self.notes = directory / "notes"
        self.words = [*shell, str(directory / "evacuate"), "hv2"]
        script(directory / "bhysend", FAKE)
        (directory / "evacuate").write_text(SCRIPT)
        path = f"{directory}:{os.environ['PATH']}"
        self.env = {"PATH": path, "NOTES": str(self.notes), "GATED": "", "STATUS": ""}

    def run(self, *guests: str, **statuses: str) -> Ended:
        [ended] = run([*self.words, *guests], env={**self.env, **statuses})
        return ended

    def asked(self) -> list[str]:
        """Return the guests that were asked about, and those that were sent, in order."""
        found = []
        for line in self.notes.read_text().splitlines():
            words = shlex.split(line)
            dry = ["-n"] if words[0] == "-n" else []
            guest = words[len(dry)]
            assert words == [*dry, guest, "ssh", "hv2", "bhyrecv", *dry, guest]
            found.append(f"{'?' if dry else ''}{guest}")
        return found


@pytest.fixture(params=HERE, ids=lambda shell: shell[0])
def fake(request: pytest.FixtureRequest, tmp_path: Path) -> Fake:
    return Fake(tmp_path, request.param)


def test_every_guest_is_asked_about_before_any_is_moved(fake: Fake) -> None:
    ended = fake.run("a", "b")
    assert (ended.status, ended.stderr) == (0, "")
    assert fake.asked() == ["?a", "?b", "a", "b"]


@pytest.mark.parametrize("status", [64, 65, 69, 70, 74, 75, 76, 77])
def test_a_guest_that_cannot_go_or_does_not_go_stays_and_the_others_go(
    status: int, fake: Fake
) -> None:
    ended = fake.run("a", "b", "c", STATUS=f"-n:a={status} b={status}")
    assert (ended.status, ended.stderr) == (1, "not moved: a b\n")
    assert fake.asked() == ["?a", "?b", "?c", "b", "c"]


def test_no_name_of_a_guest_is_taken_for_another(fake: Fake) -> None:
    ended = fake.run("web", "web1", "eb", STATUS="-n:web1=76")
    assert (ended.status, ended.stderr) == (1, "not moved: web1\n")
    assert fake.asked() == ["?web", "?web1", "?eb", "web", "eb"]


@pytest.mark.parametrize("status", [80, 81, 1, 2, 63, 78, 79, 82, 126, 127, 137, 255])
def test_a_status_that_leaves_anything_open_ends_the_script(status: int, fake: Fake) -> None:
    """128 and more is a bhysend that was killed: its keeper says where the guest is."""
    ended = fake.run("a", "b", "c", STATUS=f"a=75 b={status}")
    assert ended.status == status
    assert fake.asked() == ["?a", "?b", "?c", "a", "b"]


def test_nothing_to_do_is_done(fake: Fake) -> None:
    assert fake.run().status == 0


@pytest.mark.parametrize(
    ("gated", "statuses", "status", "asked"),
    [
        ("-n:a", "-n:a=75", 75, ["?a", "?b", "?c"]),
        ("a", "a=75", 75, ["?a", "?b", "?c", "a"]),
        ("a", "a=0", 75, ["?a", "?b", "?c", "a"]),
        ("a", "a=80", 80, ["?a", "?b", "?c", "a"]),
        ("a", "a=81", 81, ["?a", "?b", "?c", "a"]),
        ("c", "c=0", 0, ["?a", "?b", "?c", "a", "b", "c"]),
        ("c", "b=75 c=0", 1, ["?a", "?b", "?c", "a", "b", "c"]),
        ("c", "c=81", 81, ["?a", "?b", "?c", "a", "b", "c"]),
    ],
)
def test_a_signal_moves_no_further_guest_and_hides_no_status(
    gated: str, statuses: str, status: int, asked: list[str], fake: Fake, tmp_path: Path
) -> None:
    """Ctrl-C reaches bhysend and the shell; bhysend says by its status where the guest is."""
    gate = tmp_path / "gate"
    with fifo(gate) as fd:
        env = {**fake.env, "GATE": str(gate), "GATED": gated, "STATUS": statuses}
        with Pipeline([*fake.words, "a", "b", "c"], env=env) as pipeline:
            wanted = asked.index(gated.replace("-n:", "?"))
            until(lambda: fake.notes.exists() and len(fake.asked()) > wanted, "the guest's turn")
            until(lambda: pipeline[0].catches(signal.SIGINT), "the script's trap")
            os.killpg(pipeline[0].pid, signal.SIGINT)
            os.write(fd, b"\n")
            [ended] = pipeline.wait()
    assert ended.status == status, report(ended)
    assert fake.asked() == asked


# Real programs, and guests of the stand-in.

NAMES = ("g1", "g2", "g3")


def spec_of(number: int) -> Spec:
    """Return a guest that vm-bhyve would start on two hosts alike; the second cannot go."""
    keys = {
        "uuid": f"11111111-2222-3333-4444-55555555555{number}",
        "pci.0.3.0.ser": f"BHYVE-{number}",
        "pci.0.4.0.mac": f"00:a0:98:00:00:0{number}",
    }
    lost = (("0.9.0", "nvme"),) if number == 2 else ()
    return Spec(devices=(*Spec().devices, *lost), keys=keys)


class Emptied:
    """Two hosts: the guests run here, and have run there before; vm-bhyve manages all of them.

    way: a filter on the way back of the move of g1, "" for none.
    """

    def __init__(self, two: Two, directory: Path) -> None:
        self.two = two
        self.way = directory / "way"
        self.way.write_text("exec cat")
        there = {
            "BHYSEND_VMM_DIR": two.there.directory,
            "BHYSEND_STATE_DIR": two.base_there,
            "BHYRECV_STAGING": two.staging_there,
        }
        bin_ = directory / "bin"
        bin_.mkdir()
        script(bin_ / "bhysend", f'exec {shlex.join([*(sink_prefix() or ()), *BHYSEND])} "$@"')
        script(bin_ / "bhyrecv", f'exec {shlex.join(BHYRECV)} "$@"')
        over = shlex.join(f"{key}={value}" for key, value in there.items())
        script(
            bin_ / "ssh",
            f'shift; case $* in "bhyrecv g1") way={self.way} ;; *) way=/dev/stdin ;; esac\n'
            f'[ $way = /dev/stdin ] && exec env {over} sh -c "$*"\n'
            f'env {over} sh -c "$*" | sh $way',
        )
        (bin_ / "evacuate").write_text(SCRIPT)
        (bin_ / "evacuate").chmod(0o700)
        self.env = {**two.here.environment, "PATH": f"{bin_}:{os.environ['PATH']}"}

    def start(self, name: str, stack: ExitStack) -> None:
        """Start a guest as vm-bhyve does, here; and note an earlier start there."""
        spec = spec_of(NAMES.index(name) + 1)
        stack.enter_context(self.two.supervise(spec, name))
        self.two.hide_work(name)
        conf = self.two.here.directory / "vm" / name / f"{name}.conf"
        lines = [f'uuid="{spec.keys["uuid"]}"', 'disk0_type="virtio-blk"', 'disk0_name="d"']
        lines += ['disk1_type="nvme"', 'disk1_name="e"'] if name == "g2" else []
        conf.write_text("\n".join([*lines, ""]))
        there = self.two.there
        config = there.write_config(name, spec, self.two.arrived(name).path)
        self.two.hide_work(name, there)
        directory = there.directory / "vm" / name
        directory.mkdir()
        (directory / f"{name}.conf").write_text(f'uuid="{spec.keys["uuid"]}"\n')
        log = (f"[bhyve options: -AHP -k {config}]", "[bhyve devices: ]", "[bhyve console: ]")
        text = "".join(f"Jan 01 00:00:00:  {line}\n" for line in log)
        (directory / "vm-bhyve.log").write_text(text)

    def run(self, *words: str) -> Ended:
        [ended] = run(list(words), env=self.env)
        return ended

    def evacuate(self, *names: str) -> Ended:
        return self.run("evacuate", "hv2", *names)

    def assert_is_there(self, name: str) -> None:
        self.two.arrived(name).await_sweeps(1)
        assert_unbroken(Console(self.two.console(name)), self.two.arrived(name))
        assert self.two.here.pid(name) is None

    def assert_is_here(self, name: str) -> None:
        console = Console(self.two.console(name))
        console.await_sweeps(1)
        assert_unbroken(console)
        assert self.two.here.pid(name) is not None
        assert not self.two.there.host.exists(name)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Emptied]:
    require_sink()
    with two_hosts() as two, ExitStack() as stack:
        made = Emptied(two, tmp_path)
        for name in NAMES:
            made.start(name, stack)
        yield made


def turns(ended: Ended) -> list[str]:
    """Return the guests that moved, in the order in which bhysend said so."""
    return re.findall(
        r"^bhysend: guest (\S+): it runs on \S+, and is gone here", ended.stderr, re.M
    )


@pytest.mark.standin
def test_two_of_three_guests_go_one_after_the_other(hosts: Emptied) -> None:
    ended = hosts.evacuate(*NAMES)
    assert ended.status == 1, report(ended)
    said = ended.stderr
    assert said.endswith("not moved: g2\n")
    # Who can go, and how long each will stand, is said before the first move.
    first = said.index("it runs on")
    for name in ("g1", "g3"):
        can = said.index(f"bhysend: guest {name}: it can be moved from here")
        stands = said.index(f"bhysend: guest {name}: the pause: state ")
        assert can < stands < first
    edit = 'set disk1_type="virtio-blk" in g2.conf, then vm stop g2 and vm start g2'
    assert f"guest g2: configuration: bhyve does not save nvme@pci.0.9.0; {edit}\n" in said[:first]
    assert turns(ended) == ["g1", "g3"]
    assert len(re.findall(r"; paused \d+ m?s", said)) >= 2
    for name in ("g1", "g3"):
        hosts.assert_is_there(name)
    hosts.assert_is_here("g2")
    assert hosts.two.left() == []


@pytest.mark.standin
def test_a_guest_in_doubt_stops_the_script_and_its_answer_lets_it_go_on(hosts: Emptied) -> None:
    # The line that says that the guest runs does not come back.
    hosts.way.write_text("exec grep --line-buffered -v RUNNING")
    ended = hosts.evacuate("g1", "g3")
    assert ended.status == 81, report(ended)
    assert turns(ended) == []
    hosts.assert_is_here("g3")
    # A second run moves g3, and does not call g1 gone.
    again = hosts.evacuate("g1", "g3")
    assert again.status == 1, report(again)
    assert again.stderr.endswith("not moved: g1\n")
    assert turns(again) == ["g3"]
    hosts.assert_is_there("g3")
    [asked] = set(re.findall(r"^bhysend: +(ssh .*bhyrecv -q .*)$", ended.stderr, re.M))
    settled = hosts.run("sh", "-c", asked)
    assert settled.status == 0, report(settled)
    hosts.assert_is_there("g1")


@pytest.mark.standin
def test_a_guest_whose_copy_is_held_stops_the_script(hosts: Emptied) -> None:
    """The source's vm-bhyve has changed since the move began: it would start g1 again."""
    conf = hosts.two.here.directory / "vm" / "g1" / "g1.conf"
    settings = hosts.two.here.directory / "host.json"
    hosts.way.write_text(
        f"echo 'on_fault=\"restart\"' >> {conf}\n"
        f"echo '{{\"knows_suspending_lock\": false}}' > {settings}\nexec cat"
    )
    ended = hosts.evacuate("g1", "g3")
    assert ended.status == 80, report(ended)
    assert turns(ended) == []
    assert "vm-bhyve would start it again (on_fault)" in ended.stderr
    hosts.assert_is_here("g3")
    hosts.two.here.settings(knows_suspending_lock=True)
    until(lambda: hosts.two.here.pid("g1") is None, "the keeper's end of the copy")
    hosts.assert_is_there("g1")
