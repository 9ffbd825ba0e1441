"""The programs on hosts with odd names, for users without a home, and in all kinds of locales."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.handover.answers import unpack

from .kinds import ANY
from .pipeline import BHYRECV, BHYSEND, Ended, report, run
from .standin import standin_place
from .test_forms import ran_on
from .travel import Host, Traveller, short_directory

ID = "0" * 32
_NAMED = (
    "import socket, sys; socket.sethostname(sys.argv[1]); "
    "import os; os.execvp(sys.argv[2], sys.argv[2:])"
)
_AS = (
    "import os, sys; os.setgroups([]); os.setgid(12345); os.setuid(12345);"
    "os.chdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
)
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may")


@is_root
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("hv2", "hv2"),
        ("hv2.example.org", "hv2.example.org"),
        ("_hv2", "_hv2"),
        ("-hv2", "_hv2"),
        (".hv2", "_hv2"),
        ("(none)", "_none_"),
        ("my host", "my_host"),
        ("a/b", "a_b"),
        ("h\u00f6st", "h_st"),
        ("a\x1b[2J", "a__2J"),
    ],
)
def test_a_host_of_any_name_answers(name: str, shown: str, host: Host) -> None:
    words = ["unshare", "--uts", sys.executable, "-X", "utf8", "-c", _NAMED, name, *BHYRECV]
    [ended] = run([*words, "-q", ID], env=host.env)
    assert ended.status == 69, report(ended)
    hello = unpack(ended.output.splitlines(keepends=True)[0])
    assert (hello.word, hello.host) == ("HELLO", shown)
    assert ended.stderr.startswith(f"bhyrecv({shown}): ")


@pytest.mark.parametrize("name", [b"a\nb", b"a\x1bb", b"d\xe0t\xe4", b"\xc3\xa0" * 90])
def test_a_state_directory_that_no_answer_can_name_is_refused(name: bytes, host: Host) -> None:
    base = os.fsdecode(os.fsencode(host.directory) + b"/" + name)
    for argv in ((*BHYRECV, "-q", ID),):
        [ended] = run(argv, env={**host.env, "BHYSEND_STATE_DIR": base})
        assert ended.status == 76, report(ended)
        assert ended.output == b""
        assert "the answers cannot name it" in ended.stderr
        assert "BHYSEND_STATE_DIR" in ended.stderr.splitlines()[1]


# Odd users.


@pytest.fixture
def readable() -> Iterator[Path]:
    """Make a copy of the package that any user may read."""
    directory = short_directory()
    directory.chmod(0o755)
    for place in sys.path:
        for name in ("bhystream", "xxhash", "zstandard"):
            found = Path(place) / name
            if found.is_dir() and not (directory / name).exists():
                shutil.copytree(found, directory / name)
    for path in directory.rglob("*"):
        path.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def as_nobody(readable: Path, program: str, cwd: str, **variables: str) -> Ended:
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(readable), **variables}
    python = "/usr/bin/python3"
    words = [sys.executable, "-c", _AS, cwd, python, "-P", "-m", f"bhystream.{program}", "-l"]
    [ended] = run(words, env=env)
    return ended


def _can_be_run() -> bool:
    code = "import sys; print(sys.version_info[:2])"
    python = Path("/usr/bin/python3")
    if not python.exists() or os.geteuid() != 0:
        return False
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == str(sys.version_info[:2])


@pytest.mark.skipif(not _can_be_run(), reason="no Python of this version for all users")
@pytest.mark.parametrize("program", ["send", "recv"])
@pytest.mark.parametrize("home", [None, "", "relative"])
def test_a_user_without_a_home_is_told_what_to_set(
    program: str, home: str | None, readable: Path
) -> None:
    given = {} if home is None else {"HOME": home}
    ended = as_nobody(readable, program, "/", **given)
    assert ended.status == 64, report(ended)
    assert "no home directory is known: set BHYSEND_STATE_DIR or HOME" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = as_nobody(readable, program, "/", **given, XDG_STATE_HOME="relative")
    assert ended.status == 64, report(ended)


@pytest.mark.skipif(not _can_be_run(), reason="no Python of this version for all users")
def test_a_home_that_cannot_be_made_is_named(readable: Path) -> None:
    ended = as_nobody(readable, "send", "/", HOME="/nonexistent")
    assert ended.status == 77, report(ended)
    assert "/nonexistent/.local/state/bhysend: Permission denied" in ended.stderr


_GONE = (
    "import os, sys; os.mkdir(sys.argv[1]); os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]);"
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


@pytest.mark.parametrize(
    "words",
    [
        (*BHYSEND, "-l"),
        (*BHYRECV, "-l"),
        (*BHYRECV, "-S", "relative"),
        (*BHYSEND, "./ckp"),
        (*BHYSEND, "-C", "relative", "./ckp"),
        (*BHYSEND, "-C", "relative", "web1"),
    ],
    ids=lambda words: " ".join(map(str, words[2:])),
)
@pytest.mark.parametrize("base", ["", "relative"])
def test_a_directory_that_is_gone_is_no_fault_of_ours(
    words: tuple[str, ...], base: str, host: Host
) -> None:
    env = {**host.env, "BHYSEND_VMM_DIR": str(host.directory)}
    if base:
        env["BHYSEND_STATE_DIR"] = base
    [ended] = run([sys.executable, "-c", _GONE, host.directory / "gone", *words], env=env)
    assert ended.status in ({0, 64, 65, 69, 74} if not base else {74}), report(ended)
    assert "Traceback" not in ended.stderr
    assert "Errno" not in ended.stderr


# Names and paths as bytes.


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("locales")
    for place, charset in (("de_DE", "ISO-8859-1"), ("ja_JP", "EUC-JP")):
        name = directory / f"{place}.{charset}"
        words = ["localedef", "-c", "-i", place, "-f", charset, str(name)]
        subprocess.run(words, check=False, capture_output=True)
        assert name.is_dir()
    return str(directory)


@ANY
@pytest.mark.parametrize("name", ["dàtä".encode(), b"d\xe0t\xe4"], ids=["utf8", "latin1"])
def test_a_guest_that_is_held_in_one_locale_is_resumed_in_another(
    name: bytes, locales: str, host: Host, small: Traveller
) -> None:
    """The guest's configuration, the paths in it, and the guest's record are bytes."""
    config = standin_place(small.place).config
    here = os.fsencode(host.directory) + b"/" + name
    os.mkdir(here)
    disk = next(
        line.partition("=")[2]
        for line in config.read_text().splitlines()
        if line.startswith("pci.0.3.0.path=")
    )
    os.symlink(disk, here + b"/disk")
    odd = here + b"/conf"
    text = config.read_bytes().replace(disk.encode(), here + b"/disk")
    with open(odd, "wb") as file:
        file.write(text)
    words = small.send()
    at = words.index("-C") + 1
    words[at] = os.fsdecode(odd)

    def in_locale(locale: str, *words: str) -> list[str]:
        return ["env", f"LOCPATH={locales}", f"LC_ALL={locale}", *words]

    for locale in ("ja_JP.EUC-JP", "de_DE.ISO-8859-1", "C.UTF-8", "C"):
        asking = [*words[: at + 1], "-n", *words[at + 1 :]]
        [asked] = run(in_locale(locale, *asking), env=host.env)
        assert asked.status == 0, report(asked)
    sent, _ = run(in_locale("de_DE.ISO-8859-1", *words), ["cat"], env=host.env)
    assert sent.status == 80, report(sent)
    [back] = run(in_locale("C.UTF-8", *BHYSEND, "--resume", small.name), env=host.env)
    assert back.status == 0, report(back)
    ran_on(host, small)
