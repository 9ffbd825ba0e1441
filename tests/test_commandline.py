"""What both command lines share: their grammar, their numbers, their pipes, their verbs."""

from __future__ import annotations

import fcntl
import os

import pytest

from bhystream import commandline
from bhystream.errors import UsageError
from bhystream.recv import options as recv
from bhystream.send import options as send


def parse(*argv: str) -> tuple[list[tuple[str, str]], list[str]]:
    return commandline.parse(argv, "B:fv", ["discard", "again"], "usage: x")


def test_numbers_within_their_range() -> None:
    assert commandline.number("0", "-r", 0, 10) == 0
    assert commandline.number("10", "-r", 0, 10) == 10
    assert commandline.number("007", "-r", 0, 10) == 7


@pytest.mark.parametrize("text", ["", "-1", "11", "1.0", "0x1", "1\n", " 1", "\u0661", "9" * 5000])
def test_what_is_no_such_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a number from 0 to 10"):
        commandline.number(text, "-r", 0, 10)


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
        commandline.widen_pipe(theirs)
        after = fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ)
        assert after == 1 << 20 or after == before  # the host may not allow so much
    finally:
        os.close(ours)
        os.close(theirs)
    commandline.widen_pipe(ours)  # a closed descriptor is no error
    with open(os.devnull) as other:
        commandline.widen_pipe(other.fileno())


@pytest.mark.parametrize("parse_options", [send.parse_options, recv.parse_options])
def test_verbs(parse_options: object) -> None:
    assert callable(parse_options)
    assert parse_options(["-l"]) == commandline.Verb("-l", None)
    assert parse_options(["-l", "a"]) == commandline.Verb("-l", "a")
    assert parse_options(["--discard", "a"]) == commandline.Verb("--discard", "a")
    assert parse_options(["--resume", "a"]) == commandline.Verb("--resume", "a")


def test_verbs_of_one_program_only() -> None:
    assert send.parse_options(["-A"]) == commandline.Verb("-A", None)
    assert send.parse_options(["-A", "a"]) == commandline.Verb("-A", "a")
    assert recv.parse_options(["-q", "a"]) == commandline.Verb("-q", "a")
    for argv in (["--resume", "--in-doubt", "a"], ["--in-doubt", "--resume", "a"]):
        assert send.parse_options(argv) == commandline.Verb("--resume", "a", in_doubt=True)
