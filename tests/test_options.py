"""What both command lines share, and what each makes of its options."""

from __future__ import annotations

import fcntl
import os

import pytest

from bhystream import build, hold, options, recv, send
from bhystream.errors import UsageError
from bhystream.format import Form
from bhystream.precopy import Limits


def parse(*argv: str) -> tuple[list[tuple[str, str]], list[str]]:
    return options.parse(argv, "B:fv", ["discard", "again"], "usage: x")


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0s", 0),
        ("1ns", 1),
        ("3us", 3_000),
        ("300ms", 300_000_000),
        ("1.5s", 1_500_000_000),
        ("1.001s", 1_001_000_000),
        ("0.1ms", 100_000),
        ("10m", 600 * 10**9),
        ("2h", 7200 * 10**9),
        ("999999999999999h", 999_999_999_999_999 * 3600 * 10**9),
    ],
)
def test_times(text: str, ns: int) -> None:
    # A float holds 53 bits: what has more is exact to 1e-15.
    assert options.time_ns(text, "-d") == pytest.approx(ns, rel=1e-15, abs=0)


BAD_NUMBERS = [
    "",
    "s",
    "-1s",
    "+1s",
    "1e3s",
    "1..2s",
    ".5s",
    "5.s",
    "1 s",
    " 1s",
    "1s\n",
    "\u0661s",
]


@pytest.mark.parametrize(
    "text",
    [
        *BAD_NUMBERS,
        "\u0661s",
        "1",
        "300",
        "1S",
        "1Ms",
        "1d",
        "1sm",
        "nans",
        "infs",
        "9" * 400 + "s",
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a time with its unit") as caught:
        options.time_ns(text, "-d")
    assert str(caught.value).startswith(f"-d {text}: ")


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1", 1),
        ("100", 100),
        ("1K", 1024),
        ("100M", 100 << 20),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("8kbit", 1000),
        ("100Mbit", 12_500_000),
        ("10Gbit", 1_250_000_000),
        ("2.5Gbit", 312_500_000),
        ("0.5K", 512),
    ],
)
def test_rates(text: str, rate: int) -> None:
    assert options.rate_bytes(text, "-B") == rate


@pytest.mark.parametrize(
    "text",
    ["0", "0M", "0.5", "1kbits", "1Kbit", "1mbit", "1MB", "1MiB", "1k", "1bit", "K"]
    + [text.replace("s", "M") for text in BAD_NUMBERS]
    + ["9" * 400 + "T"],
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a rate, such as 100M or 10Gbit"):
        options.rate_bytes(text, "-B")


def test_numbers_within_their_range() -> None:
    assert options.number("0", "-r", 0, 10) == 0
    assert options.number("10", "-r", 0, 10) == 10
    assert options.number("007", "-r", 0, 10) == 7


@pytest.mark.parametrize("text", ["", "-1", "11", "1.0", "0x1", "1\n", " 1", "\u0661", "9" * 5000])
def test_what_is_no_such_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a number from 0 to 10"):
        options.number(text, "-r", 0, 10)


def test_options_and_operands() -> None:
    assert parse("-f", "-B", "1M", "--again", "web1") == (
        [("-f", ""), ("-B", "1M"), ("--again", "")],
        ["web1"],
    )
    assert parse("-fvB1M", "web1") == ([("-f", ""), ("-v", ""), ("-B", "1M")], ["web1"])
    assert parse() == ([], [])


def test_the_first_operand_ends_the_options() -> None:
    with pytest.raises(UsageError, match="option -v stands after the guest"):
        parse("web1", "-v")
    with pytest.raises(UsageError, match="option --discard stands after the guest"):
        parse("-f", "web1", "--discard")
    assert parse("--", "-odd") == ([], ["-odd"])


def test_unknown_options_are_refused_with_the_usage() -> None:
    for argv in (("-x",), ("--unknown",), ("-B",), ("--again=yes",)):
        with pytest.raises(UsageError) as caught:
            parse(*argv)
        assert caught.value.hint == "usage: x"


@pytest.mark.parametrize("word", ["--discar", "--d", "--a", "--agai"])
def test_abbreviated_long_options_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=f"option {word}: write it in full"):
        parse(word, "web1")


def test_a_pipe_is_widened_and_anything_else_left_alone() -> None:
    ours, theirs = os.pipe()
    try:
        before = fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ)
        options.widen_pipe(theirs)
        after = fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ)
        assert after == 1 << 20 or after == before  # a host may allow no more
    finally:
        os.close(ours)
        os.close(theirs)
    options.widen_pipe(ours)  # closed
    with open(os.devnull) as other:
        options.widen_pipe(other.fileno())


# bhysend(8)


def sender(*argv: str) -> options.SendOptions:
    parsed = send.parse_options(argv)
    assert isinstance(parsed, options.SendOptions)
    return parsed


def test_bhysend_defaults() -> None:
    assert sender("qemu:/a") == options.SendOptions("qemu:/a", Limits(300_000_000, 30, 600 * 10**9))


def test_bhysend_with_every_option() -> None:
    opts = sender(
        *[
            "-fnPv",
            "-B",
            "1M",
            "-d",
            "2s",
            "-p",
            "true",
            "-r",
            "3",
            "-T",
            "1h",
            "-z",
            "19",
            "qemu:/a",
        ]
    )
    assert opts == options.SendOptions(
        guest="qemu:/a",
        limits=Limits(2 * 10**9, 3, 3600 * 10**9, finish=True, rate_bytes=1 << 20),
        dry_run=True,
        machine=True,
        verbose=True,
        hook="true",
        level=19,
    )
    assert sender("-k", "qemu:/a").keep
    assert sender("-r", "0", "qemu:/a").limits.rounds == 0
    assert sender("-p", "", "qemu:/a").hook == ""
    assert sender("-C", "/vm/web1.conf", "web1").config == "/vm/web1.conf"
    assert sender("-kC/a", "web1").config == "/a"
    assert sender("web1").config is None


@pytest.mark.parametrize(
    ("argv", "form", "command"),
    [
        ("a", Form.PLAIN, ()),
        ("-k a", Form.KEPT, ()),
        ("-a a", Form.ANSWERED, ()),
        ("-an a", Form.ANSWERED, ()),
        ("a ssh hv2 bhyrecv", Form.ANSWERED, ("ssh", "hv2", "bhyrecv")),
        ("-n a b", Form.ANSWERED, ("b",)),
        ("a b -k -- --resume", Form.ANSWERED, ("b", "-k", "--", "--resume")),
    ],
)
def test_the_form_of_the_stream_and_the_command(
    argv: str, form: Form, command: tuple[str, ...]
) -> None:
    """What stands behind the guest is the command's own, options too."""
    opts = sender(*argv.split())
    assert (opts.form, opts.command) == (form, command)
    assert opts.answered == argv.startswith("-a")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ("", "name a guest"),
        ("-v", "name a guest"),
        ("-a", "name a guest"),
        ("-a a b", "-a and a command exclude each other"),
        ("-k -a a", "-k and -a exclude each other"),
        ("-ak a", "-k and -a exclude each other"),
        ("-k a b", "-k and a command exclude each other"),
        ("-k -n a", "-k and -n exclude each other"),
        ("-nk a", "-k and -n exclude each other"),
        ("-C", "option -C requires argument"),
        ("-C a", "name a guest"),
        ("-C a -l", "-l goes with no other option"),
        ("-C a --resume b", "--resume goes with no other option"),
        ("-S a b", "option -S not recognized"),
        ("-r 1001 a", "-r 1001: not a number from 0 to 1000"),
        ("-r -1 a", "-r -1: not a number"),
        ("-z 0 a", "-z 0: not a number from 1 to 19"),
        ("-z 20 a", "-z 20: not a number from 1 to 19"),
        ("-d 300 a", "-d 300: not a time"),
        ("-T 1 a", "-T 1: not a time"),
        ("-B fast a", "-B fast: not a rate"),
        ("-x a", "option -x not recognized"),
        ("--resume", "--resume: name one guest"),
        ("--discard", "--discard: name one guest"),
        ("--discard a b", "--discard: name one guest"),
        ("-l a b", "-l: name one guest"),
        ("--discard -v a", "--discard goes with no other option"),
        ("-v --discard a", "--discard goes with no other option"),
        ("--discard --resume a", "--discard goes with no other option"),
        ("--again a", "option --again not recognized"),
        ("-q a", "option -q not recognized"),
        ("-A a b", "-A: name one guest"),
        ("-A -v", "-A goes with no other option"),
        ("-aA a", "-A goes with no other option"),
        ("-l --in-doubt", "-l goes with no other option"),
        ("--in-doubt a", "--in-doubt goes with --resume only"),
        ("--discard --in-doubt a", "--discard goes with no other option"),
        ("--resume --in-doubt -v a", "--resume goes with no other option"),
        ("--resume --in-doubt", "--resume: name one guest"),
        ("--resume --resume a", "--resume goes with no other option"),
        ("--in-d --resume a", "option --in-d: write it in full"),
    ],
)
def test_bhysend_refuses(argv: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        send.parse_options(argv.split())
    assert str(caught.value).startswith(why)


@pytest.mark.parametrize("parse_options", [send.parse_options, recv.parse_options])
def test_verbs(parse_options: object) -> None:
    assert callable(parse_options)
    assert parse_options(["-l"]) == hold.Verb("-l", None)
    assert parse_options(["-l", "a"]) == hold.Verb("-l", "a")
    assert parse_options(["--discard", "a"]) == hold.Verb("--discard", "a")
    assert parse_options(["--resume", "a"]) == hold.Verb("--resume", "a")


def test_verbs_of_one_program_only() -> None:
    assert send.parse_options(["-A"]) == hold.Verb("-A", None)
    assert send.parse_options(["-A", "a"]) == hold.Verb("-A", "a")
    assert recv.parse_options(["-q", "a"]) == hold.Verb("-q", "a")
    for argv in (["--resume", "--in-doubt", "a"], ["--in-doubt", "--resume", "a"]):
        assert send.parse_options(argv) == hold.Verb("--resume", "a", in_doubt=True)


# bhyrecv(8)


def test_bhyrecv_with_every_option() -> None:
    argv = ["-fnPuv", "--again", "-o", "disk0=/a=b", "-o", "net0=", "web1"]
    assert recv.parse_options(argv) == build.Options(
        "web1",
        force=True,
        dry_run=True,
        machine=True,
        unstarted=True,
        verbose=True,
        again=True,
        resources={"disk0": "/a=b", "net0": ""},
    )
    assert recv.parse_options([]) == build.Options()
    argv = ["-x", "pci.0.30.0", "-o", "disk0=/a", "-xlpc.com2", "web1"]
    assert recv.parse_options(argv) == build.Options(
        "web1", resources={"disk0": "/a"}, dropped=["pci.0.30.0", "lpc.com2"]
    )
    argv = ["-fnPv", "-S", "dir", "web1"]
    assert recv.parse_options(argv) == build.Options(
        "web1", force=True, dry_run=True, machine=True, verbose=True, directory="dir"
    )


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ("a b", "name at most one guest"),
        ("-o disk0 a", "-o disk0: not a key=value, or given twice"),
        ("-o disk0=a -o disk0=b a", "-o disk0: not a key=value, or given twice"),
        ("-k a", "option -k not recognized"),
        ("-C a b", "option -C not recognized"),
        ("-S", "option -S requires argument"),
        ("-x", "option -x requires argument"),
        ("-S d -u", "-S makes files and starts nothing: not with -u"),
        ("-uS d", "-S makes files and starts nothing: not with -u"),
        ("-o disk0=/a -S d", "-S makes files and starts nothing: not with -o"),
        ("-S d -x pci.0.3.0", "-S makes files and starts nothing: not with -x"),
        ("--again -S d", "-S makes files and starts nothing: not with --again"),
        ("-S d -l", "-l goes with no other option"),
        ("-x a --discard b", "--discard goes with no other option"),
        ("--resume", "--resume: name one guest"),
        ("-u --resume a", "--resume goes with no other option"),
        ("-a", "option -a not recognized"),
        ("-A", "option -A not recognized"),
        ("-q", "-q: name one guest"),
        ("-q a b", "-q: name one guest"),
        ("-qv a", "-q goes with no other option"),
        ("--resume --in-doubt a", "option --in-doubt not recognized"),
    ],
)
def test_bhyrecv_refuses(argv: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        recv.parse_options(argv.split())
    assert str(caught.value).startswith(why)
