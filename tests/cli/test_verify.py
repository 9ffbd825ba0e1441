"""bhysend --verify: the destination compares all of its memory before anything has run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import kinds
from .kinds import G4, G5, QEMU
from .pipeline import BHYRECV, BHYSEND, Ended, Pipeline, report, run
from .standin import standin
from .test_answered import THIRD
from .travel import Host, Site, Stable, Traveller, program_at

FAULTY = str(Path(__file__).with_name("faulty.py"))
VERIFY = ("-r", "1", "-f", "--verify")
COMPARED = "its memory is compared with the source's"
FOUND = re.compile(
    r"section \d+ \(HASHES\) at offset 0x[0-9a-f]+: page (\d+), which is page (\d+) of segment"
    r" (\S+), is not what the source has; (\d+) of (\d+) pages differ"
)
EACH = pytest.mark.parametrize("kind", [G5, G4, QEMU])
BOTH = pytest.mark.parametrize("kind", [G5, QEMU])


@pytest.fixture
def guest(kind: str, stable: Stable) -> Traveller:
    return kinds.small(kind, stable)


def with_fault(command: Sequence[str], *fault: str) -> list[str]:
    """Return the command of one of our programs, with a fault; see faulty.py."""
    at = program_at(command) + 1
    return [*command[:at], FAULTY, *fault, "--", *command[at:]]


def pages_of(ended: Ended) -> list[int]:
    """Return the pages that a program with a fault has made wrong."""
    return [int(page) for page in re.findall(r"faulty: page (\d+)", ended.stderr)]


def assert_found(guest: Traveller, received: Ended, wrong: Sequence[int]) -> None:
    """Assert that the first of the wrong pages is named, and that they are counted."""
    found = FOUND.search(received.stderr)
    assert found, report(received)
    first, within, _, count, npages = found.groups()
    assert (int(first), int(within)) == (min(wrong), min(wrong)), report(received)
    assert (int(count), int(npages)) == (len(wrong), guest.npages), report(received)


def assert_stays(guest: Traveller, host: Host, to: Site) -> None:
    """Assert that nothing is left at the destination, and that the guest runs on at the source."""
    to.assert_nothing_left()
    assert host.rows() == [] and host.rows(BHYRECV) == []
    guest.run_on(host, sweeps=1)


@EACH
def test_a_guest_whose_memory_is_the_same_arrives(guest: Traveller, host: Host) -> None:
    to = guest.next()
    sent = host.run(*guest.send("--verify"), *guest.receive(to))
    assert sent.status == 0 and COMPARED in sent.stderr, report(sent)
    guest.hand_over(host, to)
    guest.prove(1)


@BOTH
def test_without_the_option_nothing_is_compared(guest: Traveller, host: Host) -> None:
    to = guest.next()
    sent = host.run(*guest.send(), *guest.receive(to))
    assert sent.status == 0 and COMPARED not in sent.stderr, report(sent)
    guest.hand_over(host, to)


@EACH
def test_a_page_that_the_last_scan_has_missed_is_found(guest: Traveller, host: Host) -> None:
    to = guest.next()
    sent = host.run(*with_fault(guest.send(*VERIFY), "missed"), *guest.receive(to))
    assert sent.status == 69, report(sent)
    wrong = pages_of(sent)
    assert len(wrong) == 1
    assert_found(guest, sent, wrong)
    assert_stays(guest, host, to)


@EACH
@pytest.mark.parametrize("option", ["-r1", "-r0"])
def test_memory_that_changes_at_the_destination_is_found(
    guest: Traveller, host: Host, option: str
) -> None:
    """Pages of the guest, a page that it may never have touched, and the last one of all."""
    to, wrong = guest.next(), [300, 301, guest.npages - 2, guest.npages - 1]
    receive = with_fault(guest.receive(to), "flipped", *map(str, reversed(wrong)))
    sent = host.run(*guest.send(option, "-f", "--verify"), *receive)
    assert sent.status == 69, report(sent)
    assert sorted(pages_of(sent)) == wrong
    assert_found(guest, sent, wrong)
    assert_stays(guest, host, to)


@BOTH
def test_the_third_stage_returns_that_nothing_was_started(guest: Traveller, host: Host) -> None:
    to = guest.next()
    receive = with_fault(guest.receive(to), "flipped", "300")
    commands = (guest.send("-a", *VERIFY), receive, THIRD)
    with Pipeline(*commands, env=host.env) as pipeline:
        ended = pipeline.wait()
    assert [one.status for one in ended] == [69, 65, 69], report(*ended)
    assert_found(guest, ended[1], [300])
    assert FOUND.search(ended[0].stderr), report(*ended)
    assert_stays(guest, host, to)


@BOTH
def test_the_plain_form_starts_nothing_and_the_guest_is_held(guest: Traveller, host: Host) -> None:
    to = guest.next()
    receive = with_fault(guest.receive(to), "flipped", "300")
    sent, received = run(guest.send(*VERIFY), receive, env=host.env)
    assert received.status == 65, report(sent, received)
    assert_found(guest, received, [300])
    assert "nothing was started here" in received.stderr
    # If bhyrecv has ended before END was written, bhysend has resumed the guest itself.
    assert sent.status in (80, 74), report(sent)
    if sent.status == 80:
        host.act(BHYSEND, "--resume", guest.name)
    assert_stays(guest, host, to)


@BOTH
@pytest.mark.parametrize("option", ["-u", ""])
def test_a_kept_stream_is_compared_when_it_is_read(
    guest: Traveller, host: Host, tmp_path: Path, option: str
) -> None:
    path, to = tmp_path / "g.bhys", guest.next()
    with path.open("wb") as file:
        [kept] = run(guest.send("-k", *VERIFY, "-z", "1"), env=host.env, stdout=file)
    assert kept.status == 0, report(kept)
    guest.run_on(host, sweeps=1)
    options = [option] if option else []
    with path.open("rb") as file:
        command = with_fault(guest.receive(to, *options), "flipped", "0", "300")
        [refused] = run(command, env=host.env, stdin=file)
    assert refused.status == 65, report(refused)
    assert_found(guest, refused, [0, 300])
    assert_stays(guest, host, to)
    if option:
        with path.open("rb") as file:
            [loaded] = run(guest.receive(to, "-u"), env=host.env, stdin=file)
        assert loaded.status == 0 and COMPARED in loaded.stderr, report(loaded)
        host.act(BHYRECV, "--discard", guest.name)


@pytest.mark.parametrize("kind", [G5])
def test_snapshot_files_are_compared_both_ways(
    guest: Traveller, host: Host, tmp_path: Path
) -> None:
    """-S makes files of a stream, and bhysend a stream of the files."""
    path = tmp_path / "g.bhys"
    with path.open("wb") as file:
        [kept] = run(guest.send("-k", *VERIFY), env=host.env, stdout=file)
    assert kept.status == 0, report(kept)
    (tmp_path / "bad").mkdir()
    (tmp_path / "good").mkdir()
    environment = standin(guest).at.environment
    command = [*environment, *BHYRECV, "-S", str(tmp_path / "bad")]
    with path.open("rb") as file:
        [refused] = run(with_fault(command, "flipped", "300"), env=host.env, stdin=file)
    assert refused.status == 65, report(refused)
    assert_found(guest, refused, [300])
    assert list((tmp_path / "bad").iterdir()) == []
    command[-1] = str(tmp_path / "good")
    with path.open("rb") as file:
        [made] = run(command, env=host.env, stdin=file)
    assert made.status == 0 and COMPARED in made.stderr, report(made)
    [meta] = (tmp_path / "good").glob("*.meta")
    (tmp_path / "again").mkdir()
    snapshot = [*environment, *BHYSEND, "--verify", str(meta.with_suffix(""))]
    sent, received = run(
        snapshot, [*environment, *BHYRECV, "-S", str(tmp_path / "again")], env=host.env
    )
    assert (sent.status, received.status) == (0, 0), report(sent, received)
    assert COMPARED in received.stderr
