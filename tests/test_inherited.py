"""What a program inherits from an odd parent, and sets itself; the tests run real processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bhystream.commandline import refuse_closed
from bhystream.errors import UsageError
from bhystream.send.command import Command
from bhystream.send.hook import Hook

# A process that begins as all our programs do, and writes down what it then finds.
_LOOK = """
import json, os, resource, signal, sys
from bhystream import inherited
with inherited.taken() as found:
    state = {
        "ignored": sorted(
            n.name for n in signal.valid_signals()
            if isinstance(n, signal.Signals) and signal.getsignal(n) == signal.SIG_IGN
        ),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "alarm": signal.getitimer(signal.ITIMER_REAL)[0],
        "limits": {
            name: resource.getrlimit(getattr(resource, "RLIMIT_" + name))
            for name in ("CPU", "FSIZE", "AS", "DATA", "MEMLOCK", "NOFILE")
        },
        "umask": (found.umask, os.umask(0)),
        "blocking": [os.get_blocking(fd) for fd in (0, 1, 2)],
        "open": [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)],
        "argv": [os.fsencode(word).hex() for word in sys.argv[1:]],
        "encoding": sys.getfilesystemencoding(),
    }
with open(sys.argv[1], "w") as file:
    json.dump(state, file)
"""
_PARENT = """
import os, resource, signal, sys
{before}
os.execv(sys.executable, [sys.executable, "-P", "-c", {look!r}, {out!r}, *{more!r}])
"""


def look(
    tmp_path: Path,
    before: str,
    *more: bytes,
    environment: dict[str, str] | None = None,
    **streams: Any,
) -> dict[str, Any]:
    """Return what a program finds if `before` ran in the same process before exec(2)."""
    out = tmp_path / "found"
    code = _PARENT.format(before=before, look=_LOOK, out=str(out), more=list(more))
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-P", "-c", code],
        env={**os.environ, **(environment or {})},
        timeout=60,
        check=False,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **streams},
    )
    assert done.returncode == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", ["SIGCHLD", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGBUS", "SIGABRT"])
def test_a_signal_that_was_ignored_is_not(name: str, tmp_path: Path) -> None:
    found = look(tmp_path, f"signal.signal(signal.{name}, signal.SIG_IGN)")
    assert name not in found["ignored"]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGTSTP"])
def test_what_is_ignored_on_purpose_stays_ignored(name: str, tmp_path: Path) -> None:
    found = look(tmp_path, f"signal.signal(signal.{name}, signal.SIG_IGN)")
    assert name in found["ignored"]


def test_no_signal_stays_blocked(tmp_path: Path) -> None:
    everything = "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"
    assert look(tmp_path, everything)["blocked"] == []


def test_an_alarm_does_not_go_on(tmp_path: Path) -> None:
    assert look(tmp_path, "signal.alarm(1000)")["alarm"] == 0


@pytest.mark.parametrize("name", ["CPU", "FSIZE", "AS", "DATA", "MEMLOCK"])
def test_a_limit_is_raised_as_far_as_anybody_may(name: str, tmp_path: Path) -> None:
    low, high = 1 << 33, 1 << 34
    if name == "MEMLOCK":
        low, high = 4096, 8192
    found = look(tmp_path, f"resource.setrlimit(resource.RLIMIT_{name}, ({low}, {high}))")
    assert found["limits"][name] == [high, high]


def test_there_are_enough_descriptors_but_not_all(tmp_path: Path) -> None:
    found = look(tmp_path, "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 6000))")
    assert found["limits"]["NOFILE"] == [4096, 6000]
    found = look(tmp_path, "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 64))")
    assert found["limits"]["NOFILE"] == [64, 64]
    found = look(tmp_path, "resource.setrlimit(resource.RLIMIT_NOFILE, (5000, 6000))")
    assert found["limits"]["NOFILE"] == [5000, 6000]


@pytest.mark.parametrize("umask", [0, 0o22, 0o777])
def test_our_files_are_ours_and_the_operators_are_his(umask: int, tmp_path: Path) -> None:
    found = look(tmp_path, f"os.umask({umask})", bytes(str(umask), "ascii"))
    assert found["umask"] == [umask, 0o077]


def test_a_stream_waits_and_is_given_back_as_it_was(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        os.set_blocking(read_end, False)
        found = look(tmp_path, "", stdin=read_end, stdout=write_end)
        assert found["blocking"] == [True, True, True]
        assert not os.get_blocking(read_end)
        assert os.get_blocking(write_end)
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_no_file_of_ours_gets_the_number_of_a_closed_stream(fd: int, tmp_path: Path) -> None:
    assert look(tmp_path, f"os.close({fd})")["open"][fd] == "/dev/null"


def test_a_stream_of_the_other_direction_is_none() -> None:
    read_end, write_end = os.pipe()
    try:
        for fd, wrong in ((read_end, os.O_RDONLY), (write_end, os.O_WRONLY)):
            with pytest.raises(UsageError, match="is closed, or open for the other direction"):
                refuse_closed(fd, "standard output", wrong)
        refuse_closed(write_end, "standard output", os.O_RDONLY)
        refuse_closed(read_end, "standard input", os.O_WRONLY)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_the_operators_commands_get_the_operators_umask(tmp_path: Path) -> None:
    hook = Hook(f"umask > {tmp_path}/hook", "web1", "00" * 16, 0o027)
    hook.begin()
    hook.wait()
    assert (tmp_path / "hook").read_text().strip() == "0027"
    assert Command(["sh", "-c", f"umask > {tmp_path}/command"], 0o013).end(60) == 0
    assert (tmp_path / "command").read_text().strip() == "0013"


def deadly(limit: str, soft: int, hard: int) -> str:
    code = (
        f"import resource; resource.setrlimit(resource.{limit}, ({soft}, {hard}));"
        "from bhystream import inherited; inherited.take(); print(inherited.deadly_limit())"
    )
    words = [sys.executable, "-P", "-c", code]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("limit", "says"),
    [("RLIMIT_CPU", "CPU time, .*-H -t unl"), ("RLIMIT_FSIZE", "file size, .*-H -f unl")],
)
def test_a_limit_that_would_end_a_guest_is_named(limit: str, says: str) -> None:
    assert re.search(says, deadly(limit, 1 << 40, 1 << 40))
    assert deadly(limit, 1 << 40, -1) == "\n"


# A word in UTF-8, one that is not UTF-8, one that a multibyte locale reads in another way, and a
# plain one.
_WORDS = ("dàtä".encode(), b"d\xe0t\xe4", b"\x81\x5c\xfd", b"plain")
_LOCALES = (
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LC_ALL": "C.UTF-8"},
    {"LC_ALL": "de_DE.ISO-8859-1"},
    {"LC_ALL": "de_DE.ISO-8859-15"},
    {"LC_ALL": "ja_JP.EUC-JP"},
    {"LC_ALL": "zh_CN.GB18030"},
)


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make the locales that a host may have; return LOCPATH."""
    directory = tmp_path_factory.mktemp("locales")
    for each in _LOCALES[3:]:
        name = each["LC_ALL"]
        place, _, charset = name.partition(".")
        subprocess.run(
            ["localedef", "-c", "-i", place, "-f", charset, str(directory / name)],
            check=False,  # localedef ends with status 1 if it only warns
            capture_output=True,
        )
        assert (directory / name).is_dir(), name
    return str(directory)


@pytest.mark.parametrize("locale", _LOCALES, ids=lambda each: ",".join(each.values()))
def test_words_are_bytes_in_every_locale(
    locale: dict[str, str], locales: str, tmp_path: Path
) -> None:
    code = "import os; os.execv({0!r}, [{0!r}, '-P', '-c', {1!r}, {2!r}, *{3!r}])".format(
        sys.executable, _LOOK, str(tmp_path / "found"), list(_WORDS)
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        env={**os.environ, "LOCPATH": locales, **locale},
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    found = json.loads((tmp_path / "found").read_text())
    assert found["encoding"] == "utf-8"
    assert found["argv"][1:] == [word.hex() for word in _WORDS]


def test_descriptors_are_inherited_where_they_were_closed() -> None:
    """A command that a program starts must not open a file of its own at that number either."""
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import os; os.close(2); from bhystream import inherited; inherited.take();"
            "print(os.get_inheritable(2))",
        ],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "True\n"
    assert fcntl.fcntl(2, fcntl.F_GETFD) >= 0
