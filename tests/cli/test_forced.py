"""The key of bhyrecv(8)'s example, which may only send a guest: a real sshd, and what it refuses.

The lines of authorized_keys and of the script are those of the man page, with this host's paths.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .kinds import ANY
from .pipeline import BHYRECV, ROOT, Ended, report, run
from .sshd import Sshd
from .test_forms import kept, ran_on, stream_id
from .travel import Host, Site, Traveller

pytestmark = ANY
LEFT_OUT = "-o disk0="


def example() -> tuple[str, str]:
    """Return the options of the key, and the script, that the page shows."""
    page = (ROOT / "man/bhyrecv.8").read_text()
    text = page.split(".Ss A key that may only send guests here\n")[1].split("\n.Ss ")[0]
    key, script = re.findall(r"^\.Bd -literal\n(.*?)^\.Ed$", text, re.M | re.S)
    options, _, rest = key.partition(" ssh-ed25519 ")
    assert rest and script.startswith("#!/bin/sh\nexec bhyrecv --forced ")
    return options, script.replace("\\e\n", "")


@dataclass
class Key:
    """The key at a server, and the place that its script receives the guest at."""

    sshd: Sshd
    host: Host
    guest: Traveller
    to: Site

    def force(self, change: Callable[[list[str]], list[str]] = lambda words: words) -> None:
        """Write the page's script, with the paths of this host.  change: of the script's words."""
        options, script = example()
        words = shlex.split(script.partition("exec bhyrecv ")[2])
        ours = dict(word.split("=", 1) for word in self.guest.resources(self.to)[1::2])
        assert {word.partition("=")[0] for word in words if "=" in word} == set(ours)
        words = [
            f"{name}={ours[name]}" if (name := word.partition("=")[0]) in ours else word
            for word in words
        ]
        words[words.index("--below") + 1] = str(Path(ours["disk0"]).parent)
        words[-1] = self.guest.name
        environment = {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "BHYSEND_STATE_DIR": str(self.host.state),
        }
        settings = [f"{name}={value}" for name, value in environment.items()]
        place = self.guest.receive_bare(self.to)
        at = place.index(BHYRECV[0])
        command = ["env", *settings, *place[1:at], *BHYRECV, *change(words)]
        path = self.host.directory / "recv"
        path.write_text(f"#!/bin/sh\nexec {shlex.join(command)}\n")
        path.chmod(0o755)
        self.sshd.allow(options.replace("/usr/local/sbin/recv-web1", str(path)))

    def send(self, typed: str, *options: str) -> Ended:
        """Move the guest with this command typed after ssh."""
        command = [*self.guest.send(*options), *self.sshd.typed(typed)]
        [ended] = run(command, env=self.host.env)
        return ended

    def refuses(self, typed: str, why: str, *options: str) -> None:
        """Assert that the guest is refused for this reason, and that it runs on."""
        ended = self.send(typed, *options)
        assert ended.status in (69, 76), report(ended)
        assert why in ended.stderr, report(ended)
        self.to.assert_nothing_left()
        ran_on(self.host, self.guest)

    def ask(self, typed: str) -> Ended:
        """Run a command with the key."""
        [ended] = run(self.sshd.typed(typed), env=self.host.env)
        return ended


@pytest.fixture
def key(host: Host, small: Traveller, sshd: Sshd) -> Iterator[Key]:
    made = Key(sshd, host, small, small.next())
    made.force()
    try:
        yield made
    finally:
        sshd.allow()


def without(*gone: str) -> Callable[[list[str]], list[str]]:
    """Return the change that leaves out the options which begin so, and what they take."""

    def change(words: list[str]) -> list[str]:
        text = shlex.join(words)
        for begin in gone:
            text = re.sub(rf"(^| ){re.escape(begin)}\S*( |$)", " ", text)
        return shlex.split(text)

    return change


def test_the_guest_of_the_key_moves_and_can_be_asked_for(key: Key) -> None:
    dry = key.send("bhyrecv -nv", "-n")
    assert dry.status == 0 and "this host can take the guest" in dry.stderr, report(dry)
    sent = key.send(f"bhyrecv -v {key.guest.name}")
    assert sent.status == 0, report(sent)
    key.guest.hand_over(key.host, key.to)
    [record] = [path.stem for path in (key.host.state / "destination").glob("*.json")]
    asked = key.ask(f"bhyrecv -q {record}")
    assert asked.status == 0 and b"RUNNING" in asked.output, report(asked)


def test_the_words_of_the_peer_run_no_program(key: Key) -> None:
    mark = key.host.directory / "mark"
    for typed in (
        f"touch {mark}",
        f"bhyrecv; touch {mark}",
        f"bhyrecv $(touch {mark})",
        f"bhyrecv `touch {mark}`",
        f"bhyrecv | touch {mark}",
        f"bhyrecv {key.guest.name}\ntouch {mark}",
        f"BHYRECV_QEMU={mark} bhyrecv",
        f"bhyrecv > {mark}",
        "sh",
        "/usr/lib/openssh/sftp-server",
    ):
        ended = key.ask(typed)
        assert ended.status == 77, report(ended)
        assert "the forced command of this key does not allow that" in ended.stderr
        assert ended.output == b""
        assert not mark.exists(), typed
    key.refuses(f"bhyrecv; touch {mark}", "does not allow that")
    assert not mark.exists()


def test_what_is_not_the_peers_to_say_is_refused(key: Key) -> None:
    refused = "the forced command of this key does not allow that"
    for typed in (
        "bhyrecv -f",
        "bhyrecv --again",
        "bhyrecv -S /tmp",
        "bhyrecv -x pci.0.4.0",
        "bhyrecv -m 1T",
        "bhyrecv --below /",
        "bhyrecv -o disk0=/etc/shadow",
        "bhyrecv -o net0=tap9",
        "bhyrecv -o bootrom=/etc/shadow",
        "bhyrecv -o com1=/dev/mem",
        "bhyrecv web2",
        "bhyrecv ../../etc/x",
        "bhyrecv -web",
        "bhyrecv 'web\n1'",
        "bhyrecv ..",
        "bhyrecv qemu:/tmp/x.qmp",
    ):
        ended = key.ask(typed)
        assert ended.status == 77 and refused in ended.stderr, report(ended)
    key.refuses("bhyrecv -f -o disk0=/etc/shadow", refused)


def test_the_key_cannot_end_or_start_a_guest_that_is_here(key: Key) -> None:
    for verb in ("-l", f"--discard {key.guest.name}", f"--resume {key.guest.name}"):
        ended = key.ask(f"bhyrecv {verb}")
        assert (ended.status, ended.output) == (77, b""), report(ended)
    ran_on(key.host, key.guest)


def disk(key: Key) -> Path:
    """Return the path of the guest's disk at the destination."""
    [word] = [word for word in key.guest.resources(key.to) if word.startswith("disk0=")]
    return Path(word.partition("=")[2])


def test_a_disk_of_the_peers_lies_below_the_directory(key: Key) -> None:
    key.force(without(LEFT_OUT))
    good, outside = disk(key), key.host.directory / "outside"
    outside.touch()
    for name, make, why in (
        ("soft", lambda path: path.symlink_to(outside), "it is a link"),
        ("hard", lambda path: os.link(outside, path), "it has another name too"),
        ("fifo", lambda path: os.mkfifo(path), "it is no file and no device"),
    ):
        make(good.parent / name)
        key.refuses(f"bhyrecv -o disk0={good.parent}/{name}", why)
    (good.parent / "up").symlink_to(outside.parent)
    for path, why in (
        (str(outside), "it does not lie below"),
        (f"{good.parent}/../{outside.parent.name}/outside", "it does not lie below"),
        (f"{good.parent}/up/outside", "up is a link, or no directory"),
        ("/dev/mem", "it does not lie below"),
    ):
        key.refuses(f"bhyrecv -o disk0={path}", why)
    good.parent.chmod(0o777)
    key.refuses(f"bhyrecv -o disk0={good}", "others may write to")
    good.parent.chmod(0o700)
    sent = key.send(f"bhyrecv -o disk0={good}")
    assert sent.status == 0, report(sent)
    key.guest.hand_over(key.host, key.to)


def test_a_guest_of_too_much_memory_is_refused_before_it_takes_any(key: Key) -> None:
    def smaller(words: list[str]) -> list[str]:
        return [("63M" if word == "8G" else word) for word in words]

    key.force(smaller)
    key.refuses("bhyrecv", "memory: the guest has 64.0 MiB, -m allows 63.0 MiB")
    key.force(lambda words: ["-f", *smaller(words)])  # -f does not overrule -m
    key.refuses("bhyrecv", "memory: the guest has 64.0 MiB, -m allows 63.0 MiB")
    key.force(lambda words: [("64M" if word == "8G" else word) for word in words])
    sent = key.send("bhyrecv")
    assert sent.status == 0, report(sent)
    key.guest.hand_over(key.host, key.to)


def test_the_key_gets_no_terminal_and_no_port(key: Key) -> None:
    """The word restrict of the page's line."""
    words = key.sshd.typed("bhyrecv -v")
    words[words.index("-T")] = "-tt"
    [ended] = run(words, env=key.host.env)
    assert "PTY allocation request failed" in ended.stderr, report(ended)


def test_a_stream_from_a_file_is_started_once_by_the_key(key: Key) -> None:
    path = kept(key.host, key.guest)
    for status, why in ((0, "it runs here"), (76, "was started on this host before")):
        with path.open("rb") as file:
            [ended] = run(key.sshd.typed("bhyrecv"), env=key.host.env, stdin=file)
        assert ended.status == status, report(ended)
        assert why in ended.stderr
    assert stream_id(path) in ended.stderr
    with key.to.reaped():
        pass
