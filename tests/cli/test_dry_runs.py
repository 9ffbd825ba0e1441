"""bhysend -n: what a guest needs to become movable, and what its pause will be made of."""

from __future__ import annotations

import re

import pytest

from . import kinds
from .kinds import ANY, G5, QEMU
from .pipeline import BHYSEND, Ended, report, run
from .travel import Host, Traveller

_TIME = r"[0-9.]+ m?s"


def last_line(ended: Ended) -> str:
    """Return what the last line of a dry run says of the pause."""
    assert ended.status == 0, report(ended)
    *_, line = [line for line in ended.stderr.splitlines() if line.startswith("bhysend: ")]
    before, found, parts = line.partition("guest proof: the pause: ")
    assert before == "bhysend: " and found, report(ended)
    return parts


def rows_of(ended: Ended) -> list[list[str]]:
    return [line.split("\t") for line in ended.output.decode().splitlines()]


@pytest.mark.parametrize("kind", [QEMU, G5])
def test_the_last_line_says_what_the_pause_will_be_made_of(host: Host, small: Traveller) -> None:
    sent, _ = run(small.send("-n"), ["cat"], env=host.env)
    assert re.fullmatch(
        rf"state {_TIME} \(assumed\), last scan {_TIME} \(grows with the memory\), last pages"
        rf" {_TIME} at 1 Gbit/s, answers unknown \(no destination was asked\)",
        last_line(sent),
    )
    to = small.next()
    dry = [*small.send("-n", "-p", "true"), *small.receive(to, "-n")]
    [sent] = run(dry, env=host.env)
    parts = last_line(sent)
    assert re.search(rf"answers {_TIME} \(assumed\), -p unknown \(it has not run yet\)$", parts)
    # A move teaches the next dry run.
    [moved] = run([*small.send("-p", "true"), *small.receive(to)], env=host.env)
    assert moved.status == 0, report(moved)
    small.hand_over(host, to)
    to = small.next()
    [sent] = run([*small.send("-n", "-p", "true"), *small.receive(to, "-n")], env=host.env)
    parts = last_line(sent)
    assert re.match(rf"state {_TIME} \(as in earlier moves\), ", parts)
    assert re.search(rf"answers {_TIME} \(as in earlier moves\), -p {_TIME} \(as in", parts)
    small.run_on(host, sweeps=1)


@ANY
def test_programs_get_the_same(host: Host, small: Traveller) -> None:
    [sent] = run(
        [*small.send("-n", "-P", "-p", "true"), *small.receive(small.next(), "-n")], env=host.env
    )
    assert sent.status == 0, report(sent)
    rows = rows_of(sent)
    pause = {row[1]: row[2:] for row in rows if row[0] == "pause"}
    assert list(pause) == ["state", "scan", "answers", "hook"]
    assert {part: basis for part, (_, basis) in pause.items()} == {
        "state": "assumed",
        "scan": "measured",
        "answers": "assumed",
        "hook": "unknown",
    }
    assert pause["hook"][0] == "-1" and all(int(pause[part][0]) > 0 for part in list(pause)[:3])
    warnings = [row[1:] for row in rows if row[0] == "warning"]
    assert [
        "clock: the guest's clock falls behind by the length of the pause",
        "let it run NTP, or see bhyrecv --advance-clock",
    ] in (warnings)
    assert not any(row[0] == "refusal" for row in rows)
    small.run_on(host, sweeps=1)


@ANY
def test_a_destination_that_refuses_makes_a_row(host: Host, small: Traveller) -> None:
    command = small.receive_bare(small.next(), "-n")
    [sent] = run([*small.send("-n", "-P"), *command], env=host.env)
    assert sent.status == 76, report(sent)
    [[word, what, cure]] = rows_of(sent)
    assert (word, cure) == ("refusal", "")
    assert small.missing[0] in what
    small.run_on(host, sweeps=1)


@pytest.mark.standin
@pytest.mark.parametrize(
    "options", [("-n",), ("-n", "-P"), (), ("-P",)], ids=["people", "programs", "move", "progress"]
)
def test_a_guest_that_cannot_go_is_told_every_edit_at_once(
    options: tuple[str, ...], host: Host
) -> None:
    guest = kinds.own("g5")
    try:
        config = guest.at.config
        text = config.read_text()
        lines = [line for line in text.splitlines() if not line.startswith("uuid=")]
        lines += ["pci.0.9.0.device=nvme", "pci.0.9.0.path=/none", "bogus=1"]
        config.write_text("\n".join([*lines, ""]))
        sent, passed = run(guest.send(*options), ["cat"], env=host.env)
        assert sent.status == 76, report(sent)
        found = [
            ("configuration: bhyve does not save nvme@pci.0.9.0",
             "start it with pci.0.9.0.device=virtio-blk"),
            ("configuration: uuid is not set: the default changes with the host",
             "set uuid=UUID in the file of -C to the one that the guest shows (kenv"
             " smbios.system.uuid, or /sys/class/dmi/id/product_uuid)"),
            ("configuration: key bogus is not known",
             "delete its line if bhyve_config(5) has no bogus, or start it without bogus"),
        ]  # fmt: skip
        said = sent.stderr.splitlines()
        assert said == [f"bhysend: guest proof: {what}; {cure}" for what, cure in found]
        told = [["refusal", what, cure] for what, cure in found]
        # Without -n a stream goes to standard output, and nothing else.
        assert rows_of(passed) == (told if options == ("-n", "-P") else [])
        config.write_text(text)
        guest.run_on(host, sweeps=1)
        guest.move(host, sweeps=1)
    finally:
        guest.close()


@pytest.mark.guest
def test_a_guest_of_qemu_that_cannot_go_is_told_to_programs(host: Host) -> None:
    [sent] = run([*BHYSEND, "-n", "-P", "qemu:/nowhere/x.qmp"], env=host.env)
    assert sent.status == 69, report(sent)
    [[word, what, cure]] = rows_of(sent)
    assert (word, cure) == ("refusal", "")
    assert what == "cannot connect to /nowhere/x.qmp: No such file or directory"


def test_a_wrong_command_line_is_no_refusal(host: Host) -> None:
    [sent] = run([*BHYSEND, "-n", "-P", "a b"], env=host.env)
    assert (sent.status, sent.output) == (64, b"")
