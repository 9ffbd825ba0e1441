"""bhyrecv --forced: what a key's holder may add to the administrator's words, and nothing else."""

from __future__ import annotations

import pytest

from bhystream.commandline import Verb
from bhystream.errors import AccessError, UsageError
from bhystream.recv.options import Options, parse_options

ID = "0123456789abcdef0123456789abcdef"
OURS = ["--forced", "--below", "/vm", "-m", "8G", "-o", "disk0=/vm/web1", "-o", "net0=tap7", "web1"]


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("SSH_ORIGINAL_COMMAND", raising=False)
    return monkeypatch


def parsed(peer: pytest.MonkeyPatch, command: str, argv: list[str] | None = None) -> Options:
    peer.setenv("SSH_ORIGINAL_COMMAND", command)
    found = parse_options(OURS if argv is None else argv)
    assert isinstance(found, Options)
    return found


GIVEN = Options(
    "web1",
    resources={"disk0": "/vm/web1", "net0": "tap7"},
    below=("/vm",),
    most_bytes=8 << 30,
)


def test_without_a_word_of_the_peer_the_administrators_hold(peer: pytest.MonkeyPatch) -> None:
    assert parse_options(OURS) == GIVEN
    for command in ("", "bhyrecv", "bhyrecv web1", "/opt/bhysend/bin/bhyrecv 'web1'"):
        assert parsed(peer, command) == GIVEN


def test_the_peer_may_ask_for_a_dry_run_and_for_words(peer: pytest.MonkeyPatch) -> None:
    whole = GIVEN._replace(dry_run=True, machine=True, verbose=True)
    assert parsed(peer, "bhyrecv -nPv") == whole
    assert parsed(peer, "bhyrecv -v -n -P web1") == whole


def test_the_peer_may_add_a_disk_but_change_none(peer: pytest.MonkeyPatch) -> None:
    found = parsed(peer, "bhyrecv -o disk1=/vm/web1.data web1")
    assert found.resources == {**GIVEN.resources, "disk1": "/vm/web1.data"}
    for words in ("-o disk0=/vm/web2", "-o disk0=/vm/web1"):
        with pytest.raises(AccessError, match="disk0= is not the peer's to give"):
            parsed(peer, f"bhyrecv {words} web1")


def test_without_below_the_peer_names_no_disk(peer: pytest.MonkeyPatch) -> None:
    with pytest.raises(AccessError, match="is not the peer's to give"):
        parsed(peer, "bhyrecv -o disk0=/vm/web1", ["--forced"])


def test_the_peer_names_the_guest_if_the_administrator_does_not(peer: pytest.MonkeyPatch) -> None:
    assert parsed(peer, "bhyrecv web2", ["--forced"]).guest == "web2"
    assert parsed(peer, "bhyrecv", ["--forced"]).guest is None
    with pytest.raises(AccessError, match="it receives the guest web1 and no other"):
        parsed(peer, "bhyrecv web2")


def test_a_question_is_allowed(peer: pytest.MonkeyPatch) -> None:
    peer.setenv("SSH_ORIGINAL_COMMAND", f"bhyrecv -q {ID}")
    assert parse_options(OURS) == Verb("-q", ID)


@pytest.mark.parametrize(
    "command",
    [
        # other programs
        "sh", "/bin/sh -c id", "rm -rf /", "bhyrecv; id", "bhyrecv;id", "'bhyrecv' && id",
        "bhyrecv | sh", "bhyrecv `id`", "bhyrecv $(id)", "bhyrecv web1; id", "env bhyrecv",
        "BHYRECV_QEMU=/tmp/x bhyrecv", "env BHYRECV_QEMU=/tmp/x bhyrecv web1", "xbhyrecv",
        "bhyrecv/x", "bhyrecv > /etc/passwd", "scp -t /", "/usr/lib/sftp-server",
        # options that are the administrator's
        "bhyrecv -f", "bhyrecv -u", "bhyrecv --again", "bhyrecv -S /etc", "bhyrecv -x lpc.com1",
        "bhyrecv -m 999T", "bhyrecv --below /", "bhyrecv --forced", "bhyrecv -l",
        "bhyrecv --discard web1", "bhyrecv --resume web1", "bhyrecv -nf",
        "bhyrecv -- -f", "bhyrecv web1 -f", "bhyrecv -q", f"bhyrecv -q {ID} {ID}",
        f"bhyrecv -n -q {ID}", f"bhyrecv -q {ID[:-1]}", f"bhyrecv -q ../{ID}",
        f"bhyrecv -q '{ID} '", f"bhyrecv -qn {ID}",
        # resources
        "bhyrecv -o disk1", "bhyrecv -o disk1=", "bhyrecv -o disk1=vm", "bhyrecv -o disk1=../x",
        "bhyrecv -o disk1=nbd:localhost:1", "bhyrecv -o disk1=file:/vm/x",
        "bhyrecv -o disk1=json:{}", "bhyrecv -o 'disk1=/vm/x,readonly=on'",
        "bhyrecv -o disk01=/vm/x", "bhyrecv -o disk1000=/vm/x", "bhyrecv -o net1=user",
        "bhyrecv -o net0=tap8", "bhyrecv -o serial0=/etc/passwd", "bhyrecv -o qmp=/tmp/q",
        "bhyrecv -o template=/tmp/t", "bhyrecv -o bios=/tmp/b", "bhyrecv -o kernel=/tmp/k",
        "bhyrecv -o mem=/tmp", "bhyrecv -o bootrom=/tmp/b", "bhyrecv -o com1=/tmp/c",
        "bhyrecv -o vnc=0.0.0.0:1", "bhyrecv -o pci.0.3.0.path=/vm/x",
        "bhyrecv -o disk1=/vm/a -o disk1=/vm/b", "bhyrecv -odisk0=/vm/x",
        # names
        "bhyrecv ../web1", "bhyrecv /etc/x", "bhyrecv ..", "bhyrecv .hidden", "bhyrecv ''",
        "bhyrecv -web1", "bhyrecv 'web1 '", "bhyrecv 'we\nb1'", "bhyrecv\nid", "bhyrecv web1 web1",
        "bhyrecv qemu:/run/x.qmp", "bhyrecv \x1b[2J", f"bhyrecv {'w' * 65}",
        "bhyrecv " + "-v " * 4000, "bhyrecv 'web1", "bhyrecv w\u00ebb1",
    ],
)  # fmt: skip
def test_everything_else_is_refused(peer: pytest.MonkeyPatch, command: str) -> None:
    peer.setenv("SSH_ORIGINAL_COMMAND", command)
    # The guest is not named, so that each case fails for its own reason.
    with pytest.raises(AccessError) as caught:
        parse_options([word for word in OURS if word != "web1"])
    assert str(caught.value).startswith("the forced command of this key does not allow that: ")
    assert caught.value.status == 77


def test_without_forced_the_peers_words_are_nothing(peer: pytest.MonkeyPatch) -> None:
    assert parsed(peer, "rm -rf /", ["web1"]) == Options("web1")


@pytest.mark.parametrize("verb", ["-l", "--discard", "--resume", "-q"])
def test_forced_goes_with_no_verb(peer: pytest.MonkeyPatch, verb: str) -> None:
    with pytest.raises(UsageError, match="goes with no other option"):
        parse_options(["--forced", verb, "web1"])


@pytest.mark.parametrize("size", ["", "8X", "-8G", "0", "8g", "8 G", "0x8", "1e9", "8G8", "8Gbit"])
def test_a_size_has_one_form(size: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_options(["-m", size])


def test_a_size_is_a_number_with_a_unit() -> None:
    sizes = {"1": 1, "512M": 512 << 20, "1.5G": 3 << 29, "2T": 2 << 40, "4K": 4096}
    for text, count in sizes.items():
        found = parse_options(["-m", text])
        assert isinstance(found, Options) and found.most_bytes == count


def test_a_directory_of_below_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    found = parse_options(["--below", "lib", "--below=/vm/", "--below", "/a/../b"])
    assert isinstance(found, Options) and found.below == ("/usr/lib", "/vm", "/b")
