"""The command line of bhysend, parsed and refused."""

from __future__ import annotations

import pytest

from bhystream.errors import UsageError
from bhystream.send.options import SendOptions, parse_options
from bhystream.send.precopy import Limits
from bhystream.stream.format import Form


def sender(*argv: str) -> SendOptions:
    parsed = parse_options(argv)
    assert isinstance(parsed, SendOptions)
    return parsed


def test_bhysend_defaults() -> None:
    assert sender("qemu:/a") == SendOptions("qemu:/a", Limits(300_000_000, 30, 600 * 10**9))


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
            "--throttle",
            "75",
            "--verify",
            "-z",
            "19",
            "qemu:/a",
        ]
    )
    assert opts == SendOptions(
        guest="qemu:/a",
        limits=Limits(2 * 10**9, 3, 3600 * 10**9, finish=True, rate_bytes=1 << 20, throttle=75),
        dry_run=True,
        machine=True,
        verbose=True,
        hook="true",
        level=19,
        verify=True,
    )
    assert sender("-k", "qemu:/a").keep
    assert sender("-k", "--verify", "qemu:/a").verify
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
    """All words after the guest belong to the command, options too."""
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
        ("-nPa a", "-n -P reports on standard output, and -a sends a stream there"),
        ("-C", "option -C requires argument"),
        ("-C a", "name a guest"),
        ("-C a -l", "-l goes with no other option"),
        ("-C a --resume b", "--resume goes with no other option"),
        ("-S a b", "option -S not recognized"),
        ("-r 1001 a", "-r 1001: not a number from 0 to 1000"),
        ("-r -1 a", "-r -1: not a number"),
        ("-z 0 a", "-z 0: not a number from 1 to 19"),
        ("-z 20 a", "-z 20: not a number from 1 to 19"),
        ("--throttle 0 a", "--throttle 0: not a number from 1 to 99"),
        ("--throttle 100 a", "--throttle 100: not a number from 1 to 99"),
        ("--ver a", "option --ver: write it in full"),
        ("--verify --resume a", "--resume goes with no other option"),
        ("--thr 50 a", "option --thr: write it in full"),
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
        parse_options(argv.split())
    assert str(caught.value).startswith(why)
