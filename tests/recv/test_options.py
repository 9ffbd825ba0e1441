"""What bhyrecv makes of its command line."""

from __future__ import annotations

import pytest

from bhystream.errors import UsageError
from bhystream.recv.options import Options, parse_options


def test_bhyrecv_with_every_option() -> None:
    argv = ["-fnPuv", "--again", "-o", "disk0=/a=b", "-o", "net0=", "web1"]
    assert parse_options(argv) == Options(
        "web1",
        force=True,
        dry_run=True,
        machine=True,
        unstarted=True,
        verbose=True,
        again=True,
        resources={"disk0": "/a=b", "net0": ""},
    )
    assert parse_options([]) == Options()
    argv = ["-x", "pci.0.30.0", "-o", "disk0=/a", "-xlpc.com2", "web1"]
    assert parse_options(argv) == Options(
        "web1", resources={"disk0": "/a"}, dropped=("pci.0.30.0", "lpc.com2")
    )
    argv = ["-fnPv", "-S", "dir", "web1"]
    assert parse_options(argv) == Options(
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
        parse_options(argv.split())
    assert str(caught.value).startswith(why)
