"""The answered forms without faults: three stages, and bhysend running the command.

Any program that passes bytes may stand between, even one that keeps some bytes back; bhysend
notices a program that keeps all bytes back while the guest still runs.  After a move the guest is
at one place, nothing is recorded, and every process of the pipeline has ended by itself.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import signal
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.waiting import until

from .kinds import ANY, matrix
from .pipeline import BHYRECV, BHYSEND, Ended, Pipeline, Words, report, run
from .relay import SLOW
from .sshd import Sshd, free_port, listens
from .tap import Tap
from .travel import Host, Site, Traveller, limited

FORMS = ("three-stages", "command")
BOTH = [(form,) for form in FORMS]
THIRD = (*BHYSEND, "-A")
# The output of a noisy login shell: it leaves no room for HELLO in a page.
NOISE_BYTES = 4080
OPENSSL = ("openssl", "enc", "-aes-256-ctr", "-pbkdf2", "-pass", "pass:bhysend")

# The programs that stand between: those at the source, and those at the destination.
TRANSPORTS: dict[str, tuple[list[Words], list[Words]]] = {
    "pipe": ([], []),
    "mbuffer": ([["mbuffer", "-q"]], []),
    "zstd": ([["zstd", "-q"]], [["zstd", "-q", "-d"]]),
    "pv": ([["pv", "-q"]], []),
    "slow": ([SLOW], []),
    "openssl": ([[*OPENSSL]], [[*OPENSSL, "-d"]]),
    "all": ([["zstd", "-q"], ["mbuffer", "-q"]], [["mbuffer", "-q"], ["zstd", "-q", "-d"]]),
}

# For these transports one form is enough, because the other form's bytes go the same way.
USUAL = {
    "pipe": "three-stages",
    "mbuffer": "three-stages",
    "zstd": "command",
    "pv": "command",
    "slow": "three-stages",
    "openssl": "three-stages",
    "all": "command",
}
HOARDERS = {"sponge": ["sponge"], "mbuffer": ["mbuffer", "-q", "-P", "80", "-m", "256M"]}


def shell_pipe(*commands: Words) -> str:
    """Return a pipeline for a shell; its status is 0 if all commands end with status 0."""
    words = " | ".join(shlex.join([str(word) for word in command]) for command in commands)
    return f"set -o pipefail; {words}"


def in_form(form: str, send: Sequence[str], *way: Words) -> list[Words]:
    """Return the commands of a form.  send: its last word is the guest.  way: ends with bhyrecv."""
    *first, guest = send
    if form == "three-stages":
        return [[*first, "-a", guest], *way, THIRD]
    command = way[0] if len(way) == 1 else ["bash", "-c", shell_pipe(*way)]
    return [[*send, *command]]


def handed_over(host: Host, guest: Traveller, to: Site, ended: Sequence[Ended]) -> None:
    """Assert that a move succeeded in every respect, and note the guest's new place."""
    assert [one.status for one in ended] == [0] * len(ended), report(*ended)
    said = ended[0].stderr
    assert re.search(
        r"^bhysend: guest proof: it runs on \S+, and is gone here; \d+ rounds, .* "
        r"paused [\d.]+ m?s \(state .*, last pages .*, answers .*\), predicted [\d.]+ m?s \(.*\)$",
        said,
        re.MULTILINE,
    ), report(*ended)
    assert "it ended with status" not in said
    guest.hand_over(host, to)
    guest.prove()


def impatient(kind: str, send: Sequence[str]) -> list[str]:
    """Return the command, in which bhysend tries more bytes after a shorter wait for answers.

    Only with the stand-in: with QEMU bhysend waits as long as ever.
    """
    return [*send] if kind == "qemu" else limited(send, "send.flush._PATIENCE_S=0.15")


# Transports.


ONE_WAY = list(USUAL.items())
EACH_WAY = [(transport, form) for transport in TRANSPORTS for form in FORMS]


@pytest.mark.parametrize(
    "kind, transport, form",
    matrix(EACH_WAY, ONE_WAY[:-1], g5=ONE_WAY, also=ONE_WAY[:3]),
)
def test_it_is_handed_over_through(
    kind: str, transport: str, form: str, host: Host, proof: Traveller
) -> None:
    to = proof.next()
    here, there = TRANSPORTS[transport]
    send = impatient(kind, proof.send())
    ended = run(*in_form(form, send, *here, *there, proof.receive(to)), env=host.env)
    handed_over(host, proof, to, ended)


@pytest.mark.parametrize("kind, form", matrix(BOTH, BOTH, also=BOTH[1:]))
def test_it_is_handed_over_through_ssh(form: str, host: Host, proof: Traveller, sshd: Sshd) -> None:
    to = proof.next()
    remote = sshd.command(proof.receive(to), BHYSEND_STATE_DIR=str(host.state))
    handed_over(host, proof, to, run(*in_form(form, proof.send(), remote), env=host.env))


@pytest.mark.parametrize("kind, form", matrix(BOTH, [("command",)], also=[("three-stages",)]))
def test_it_is_handed_over_through_a_socket(form: str, host: Host, proof: Traveller) -> None:
    to, port = proof.next(), free_port()
    back = host.directory / "back"
    os.mkfifo(back)
    receive = shlex.join(proof.receive(to))
    listener = f"set -o pipefail; nc -N -l 127.0.0.1 {port} < {back} | {receive} > {back}"
    with Pipeline(["bash", "-c", listener], env=host.env) as there:
        until(lambda: listens(port), "nc")
        way = ["nc", "-N", "127.0.0.1", str(port)]
        ended = run(*in_form(form, proof.send(), way), env=host.env)
        ended += there.wait()
    handed_over(host, proof, to, ended)


WARM = [("zstd", "three-stages"), ("zstd", "command"), ("pv", "command"), ("slow", "command")]


@pytest.mark.parametrize("kind, transport, form", matrix(WARM, WARM[2:]))
def test_warm(kind: str, transport: str, form: str, host: Host, small: Traveller) -> None:
    """Without a live round bhysend predicts no pause, but has tried the pipeline all the same.

    All memory is sent in the last round, by reference: see transfer.py.
    """
    to = small.next()
    here, there = TRANSPORTS[transport]
    send = impatient(kind, small.send("-r", "0"))
    commands = in_form(form, send, *here, *there, small.receive(to))
    ended = run(*commands, env=host.env)
    assert [one.status for one in ended] == [0] * len(ended), report(*ended)
    small.hand_over(host, to)
    small.prove()


# Programs that keep all bytes back.


@ANY
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hoarder", list(HOARDERS))
def test_what_waits_for_the_end_is_found_out(
    kind: str, form: str, hoarder: str, host: Host, small: Traveller
) -> None:
    to = small.next()
    patience = [] if kind == "qemu" else ["send.flush._PATIENCE_S=0.15"]
    send = limited(small.send("-v"), "send.conversation._HELLO_STALL_S=2", *patience)
    ended = run(*in_form(form, send, HOARDERS[hoarder], small.receive(to)), env=host.env)
    said = ended[0].stderr
    assert ended[0].status == 64, report(*ended)
    assert "the pipeline holds bytes back until EOF" in said
    assert "(sponge, mbuffer -P)" in said
    assert "the plain form, without -a, needs no answers" in said
    assert "round 0" not in said
    assert "it runs here" in said
    if form == "three-stages":
        assert ended[-2].status in (65, 69), report(*ended)
        assert ended[-1].status != 0
    # bhysend does not wait for a command that takes its time to end.
    until(lambda: not to.processes(), "the end of the command")
    to.assert_nothing_left()
    small.run_on(host)


# Both directions full.


@ANY
@pytest.mark.parametrize("form", FORMS)
def test_both_directions_may_be_full(form: str, host: Host, small: Traveller) -> None:
    """For a while no process reads the way back, which takes one page only.

    bhyrecv cannot even write HELLO, and reads no more; a full pipe then stops bhysend.
    """
    to = small.next()
    stop = host.directory / "pid"
    noise = f"yes noise | head -c {NOISE_BYTES}; exec "
    receive = ["sh", "-c", noise + shlex.join(small.receive(to))]
    slow = ["sh", "-c", f"echo $$ > {stop}.new; mv {stop}.new {stop}; kill -STOP $$; exec cat"]
    page = f"import fcntl; fcntl.fcntl(1, {fcntl.F_SETPIPE_SZ}, 4096); "
    small_pipe = [
        sys.executable,
        "-c",
        page + "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])",
    ]
    commands = in_form(form, small.send(), ["cat"], [*small_pipe, *receive], slow)
    with Pipeline(*commands, env=host.env) as pipeline:
        until(stop.exists, "the filter on the way back")
        pid = int(stop.read_text())
        until(lambda: unread_bytes(pid) == NOISE_BYTES, "a full way back")
        until(
            lambda: any(unread_bytes(each) >= 65536 for each in receivers(to)), "a full way there"
        )
        os.kill(pid, signal.SIGCONT)
        ended = pipeline.wait()
    assert ended[-1].stderr.count("bhysend: noise\n") == NOISE_BYTES // len("noise\n")
    handed_over(host, small, to, ended)


def receivers(to: Site) -> list[int]:
    """Return the bhyrecv processes of a place."""
    return [
        pid
        for pid in to.processes()
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:2] == [BHYRECV[1].encode()]
    ]


def unread_bytes(pid: int) -> int:
    """Return the number of unread bytes in the pipe at a process's standard input."""
    fd = os.open(f"/proc/{pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    finally:
        os.close(fd)


# The third stage.


@ANY
def test_the_third_stage_may_come_last(host: Host, small: Traveller) -> None:
    to, back = small.next(), host.directory / "back"
    os.mkfifo(back)
    receive = ["sh", "-c", f"exec {shlex.join(small.receive(to))} > {back}"]
    send = limited(small.send("-a"), "send.conversation._SAY_SECONDS=1")
    with Pipeline(send, receive, env=host.env) as pipeline:
        until(lambda: "waiting for the destination" in pipeline[0].stderr, "the line that says so")
        assert "is there a `| bhysend -A` at the end?" in pipeline[0].stderr
        with back.open("rb") as answers:
            [third] = run(THIRD, env=host.env, stdin=answers)
        ended = [*pipeline.wait(), third]
    handed_over(host, small, to, ended)


@ANY
def test_without_a_third_stage_the_guest_runs_on(host: Host, small: Traveller) -> None:
    to = small.next()
    send = limited(small.send("-a"), "send.conversation._SAY_SECONDS=1")
    with Pipeline(send, small.receive(to), env=host.env) as pipeline:
        until(lambda: "is there a `| bhysend -A`" in pipeline[0].stderr, "the line that says so")
        pipeline[0].kill(signal.SIGINT)
        sent, received = pipeline.wait()
    assert sent.status == 75, report(sent, received)
    assert "it runs here" in sent.stderr
    assert received.status in (65, 69), report(sent, received)
    to.assert_nothing_left()
    small.run_on(host)


@ANY
def test_a_third_stage_of_another_guest_hands_nothing_on(host: Host, small: Traveller) -> None:
    to = small.next()
    sent, received, third = run(
        small.send("-a"), small.receive(to), [*THIRD, "other"], env=host.env
    )
    # The third stage ends with the first stage's status, which says where the guest is.
    assert (sent.status, third.status) == (69, 69), report(sent, received, third)
    assert "is of guest proof, not other" in third.stderr
    assert received.status in (65, 69), report(sent, received)
    to.assert_nothing_left()
    small.run_on(host)


@ANY
@pytest.mark.parametrize("operand", ["name", "socket"])
def test_a_third_stage_may_name_the_guest(operand: str, host: Host, small: Traveller) -> None:
    to = small.next()
    names = {"name": "proof", "socket": small.place.operand}
    ended = run(small.send("-a"), small.receive(to), [*THIRD, names[operand]], env=host.env)
    handed_over(host, small, to, ended)


def test_a_third_stage_alone_says_what_it_lacks(host: Host) -> None:
    [third] = run(THIRD, env=host.env)
    assert third.status == 69, report(third)
    assert "no answer came, and no guest is in doubt here" in third.stderr


# No process is left.


@pytest.mark.parametrize("outcome", ["handed-over", "refused"])
def test_no_descriptor_keeps_the_way_back_open(outcome: str, host: Host, small: Traveller) -> None:
    """A filter on the way back sees its end and ends by itself; bhysend need not kill it."""
    to, done = small.next(), host.directory / "done"
    options = () if outcome == "handed-over" else ("-u",)
    receive = shlex.join(small.receive(to, *options))
    ended = run([*small.send(), "sh", "-c", f"{receive} | cat; : > {done}"], env=host.env)
    assert done.exists(), report(*ended)
    if outcome == "handed-over":
        handed_over(host, small, to, ended)
    else:
        small.run_on(host)


@ANY
def test_a_command_that_fails_is_named(host: Host, small: Traveller) -> None:
    """bhysend prints the command's status, and never returns it."""
    [sent] = run([*small.send(), "sh", "-c", "exit 255"], env=host.env)
    assert sent.status == 69, report(sent)
    assert "it ended with status 255" in sent.stderr
    assert "it runs here" in sent.stderr
    [sent] = run([*small.send(), "/no/such/program"], env=host.env)
    assert sent.status == 69, report(sent)
    assert "cannot run /no/such/program: No such file" in sent.stderr
    small.run_on(host)


# Refused options.


@pytest.mark.parametrize("kind, form", matrix(BOTH, [("command",)]))
def test_left_paused_is_refused(form: str, host: Host, small: Traveller) -> None:
    """bhyrecv -u has no true answer to give."""
    to = small.next()
    ended = run(*in_form(form, small.send("-v"), small.receive(to, "-u")), env=host.env)
    assert ended[0].status == 76, report(*ended)
    assert "-u: the answered form always starts the guest" in ended[0].stderr
    assert "round 0" not in ended[0].stderr
    assert [one.status for one in ended] in ([76], [76, 76, 76]), report(*ended)
    assert host.files("destination") == []
    to.assert_nothing_left()
    small.run_on(host)


@pytest.mark.parametrize("kind, form", matrix(BOTH, [("three-stages",)]))
def test_what_the_destination_lacks_is_named_at_the_source(
    form: str, host: Host, small: Traveller
) -> None:
    to = small.next()
    ended = run(*in_form(form, small.send("-v"), small.receive_bare(to)), env=host.env)
    assert ended[0].status == 76, report(*ended)
    assert small.missing[0] in ended[0].stderr
    assert "round 0" not in ended[0].stderr
    to.assert_nothing_left()
    small.run_on(host)


@ANY
@pytest.mark.parametrize(
    "options, command",
    [(["-k", "-a"], False), (["-k"], True), (["-a"], True)],
    ids=["-k-a", "-k-command", "-a-command"],
)
def test_forms_exclude_each_other(
    options: list[str], command: bool, host: Host, small: Traveller
) -> None:
    done = host.directory / "done"
    words = ["touch", str(done)] if command else []
    [sent] = run([*small.send(*options), *words], env=host.env)
    assert sent.status == 64, report(sent)
    assert "exclude each other" in sent.stderr
    assert sent.output == b""
    assert not done.exists()
    small.run_on(host, sweeps=1)


# Dry runs.


@pytest.mark.parametrize("kind, form", matrix(BOTH, [("three-stages",)]))
def test_a_dry_run_brings_the_verdict_of_both(form: str, host: Host, small: Traveller) -> None:
    to = small.next()
    ended = run(*in_form(form, small.send("-n"), small.receive(to, "-n")), env=host.env)
    assert [one.status for one in ended] == [0] * len(ended), report(*ended)
    said = "".join(one.stderr for one in ended)
    assert "it can be moved from here; nothing was changed" in said
    assert "this host can take the guest" in said
    to.assert_nothing_left()
    assert host.files("destination") == []
    small.run_on(host, sweeps=1)


@ANY
@pytest.mark.parametrize("form", FORMS)
def test_a_dry_run_brings_the_refusal(form: str, host: Host, small: Traveller) -> None:
    to = small.next()
    command = small.receive_bare(to, "-n")
    ended = run(*in_form(form, small.send("-n"), command), env=host.env)
    assert [one.status for one in ended] == [76] * len(ended), report(*ended)
    assert small.missing[0] in ended[0].stderr
    to.assert_nothing_left()
    small.run_on(host, sweeps=1)


@ANY
@pytest.mark.parametrize("sent, got", [((), ("-n",)), (("-n",), ())], ids=["move", "dry-run"])
@pytest.mark.parametrize("form", FORMS)
def test_a_dry_run_is_one_on_both_sides(
    form: str, sent: tuple[str, ...], got: tuple[str, ...], host: Host, small: Traveller
) -> None:
    to = small.next()
    ended = run(*in_form(form, small.send(*sent), small.receive(to, *got)), env=host.env)
    assert ended[0].status == 76, report(*ended)
    assert "dry run" in ended[0].stderr
    to.assert_nothing_left()
    small.run_on(host, sweeps=1)


@ANY
@pytest.mark.parametrize("form", FORMS)
def test_a_dry_run_that_breaks_behind_accept_is_no_verdict(
    form: str, host: Host, small: Traveller
) -> None:
    """The host has said that it can take the guest; only the stream failed."""
    to, tap = small.next(), Tap("END")
    receive = small.receive(to, "-n")
    with Pipeline(*in_form(form, small.send("-n"), tap.argv, receive), env=host.env) as pipeline:
        tap.reached()
        tap.flip()
        ended = pipeline.wait()
    assert ended[0].status == 69, report(*ended)
    assert "(END) at offset 0x" in ended[0].stderr
    if form == "three-stages":
        assert [one.status for one in ended[2:]] == [65, 69], report(*ended)
    to.assert_nothing_left()
    small.run_on(host, sweeps=1)
