"""Exit statuses: the classes, the two pages, and the two programs agree."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bhystream
from bhystream import errors
from bhystream.errors import BhyError
from bhystream.guest import HELD, LOADED
from bhystream.handover import state
from bhystream.handover.state import Record, Records
from bhystream.recv import main as recv
from bhystream.send import main as send

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("bhysend", "bhyrecv")

# The word that begins the entry of a status in both pages.
NAMES = {
    errors.UsageError: "Usage",
    errors.StreamError: "Stream",
    errors.FormatError: "Stream",
    errors.TruncatedError: "Stream",
    errors.ChecksumError: "Stream",
    errors.GuestError: "Guest",
    errors.AbortedError: "Guest",
    errors.BhyError: "Fault of the program",
    errors.InternalError: "Fault of the program",
    errors.InputOutputError: "Input or output",
    errors.DowntimeError: "Not now",
    errors.IncompatibleError: "Host",
    errors.AccessError: "Permission denied",
    errors.InDoubtError: "In doubt",
    errors.HeldError: "Held",
}


def exit_status_of(page: str) -> list[dict[str, str]]:
    """Return the lists of a page's EXIT STATUS as tag to text, with .Nm replaced by the names."""
    text = (ROOT / f"man/{page}.8").read_text()
    section = text.split(".Sh EXIT STATUS\n")[1].split("\n.Sh ")[0]
    section = re.sub(r"^\.Nm$", page, section, flags=re.M)
    section = re.sub(r"^\.Xr (\S+) 8", r"\1", section, flags=re.M)
    lists = re.findall(r"^\.Bl .*?\n(.*?)^\.El$", section, flags=re.M | re.S)
    return [dict(re.findall(r"^\.It (\S+)\n(.*?)(?=^\.It |\Z)", one, re.M | re.S)) for one in lists]


def classes() -> set[type[BhyError]]:
    """Return every class of error in the package."""
    for module in pkgutil.walk_packages(bhystream.__path__, "bhystream."):
        if not module.name.endswith((".demo", "__main__")):
            importlib.import_module(module.name)
    found = {BhyError}
    pending = [BhyError]
    while pending:
        more = pending.pop().__subclasses__()
        found.update(more)
        pending += more
    return found


def test_both_pages_say_the_same() -> None:
    assert exit_status_of("bhysend") == exit_status_of("bhyrecv")


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_list_the_statuses_of_the_classes_and_no_other(page: str) -> None:
    where, kinds = exit_status_of(page)
    assert set(where) == {"0", "64\\(en77", "80", "81"}
    assert (errors.EXIT_OK, errors.EXIT_HELD, errors.EXIT_IN_DOUBT) == (0, 80, 81)
    statuses = {cls.status for cls in classes()} | {errors.EXIT_HELD}
    assert {int(tag) for tag in kinds} == statuses
    assert list(kinds) == sorted(kinds)


@pytest.mark.parametrize("page", PAGES)
def test_each_class_has_the_status_of_its_entry(page: str) -> None:
    kinds = exit_status_of(page)[1]
    for cls in classes():
        name = NAMES.get(cls) or next(NAMES[base] for base in cls.__mro__ if base in NAMES)
        if cls.__name__ == "Interrupted":
            name = "Not now"
        assert kinds[str(cls.status)].startswith(name), cls
    assert kinds[str(errors.EXIT_HELD)].startswith("Held")


def test_every_other_error_says_that_the_guest_runs_as_before() -> None:
    for cls in classes() - {errors.HeldError, errors.InDoubtError}:
        assert 64 <= cls.status <= 77, cls


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_except_a_guest_that_has_ended(page: str) -> None:
    where, kinds = exit_status_of(page)
    status = str(errors.GuestEndedError.status)
    assert f"with {status} it may have ended meanwhile" in where["64\\(en77"]
    assert "has ended" in kinds[status]


@pytest.mark.parametrize(("number", "cls"), [(1, errors.AccessError), (13, errors.AccessError)])
def test_permission_has_its_own_status(number: int, cls: type[BhyError]) -> None:
    error = errors.from_oserror(OSError(number, os.strerror(number)), "open /x")
    assert type(error) is cls
    assert str(error) == f"cannot open /x: {os.strerror(number)}"


def test_other_system_errors_are_input_or_output() -> None:
    assert type(errors.from_oserror(OSError(28, "No space"), "write")) is errors.InputOutputError
    assert (
        type(errors.from_oserror(BrokenPipeError(32, "gone"), "write")) is errors.InputOutputError
    )


@pytest.mark.parametrize("main", [send.main, recv.main])
def test_what_is_not_expected_is_70_with_a_traceback(
    main: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(state, "directory", fail)
    assert main(["-l"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.rstrip().endswith("unexpected ZeroDivisionError: oops")


# Real processes.


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT / "lib"),
        "BHYSEND_STATE_DIR": str(tmp_path / "state"),
    }


def run(
    environment: dict[str, str], command: str, *args: str, **streams: Any
) -> subprocess.CompletedProcess[str]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE} | streams
    return subprocess.run(
        [sys.executable, str(ROOT / command), *args],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=120,
        **streams,
    )


@pytest.mark.parametrize(
    ("command", "args", "says"),
    [
        ("bhysend", "", "name a guest"),
        ("bhysend", "-x qemu:/a", "option -x not recognized"),
        ("bhysend", "--dis qemu:/a", "option --dis: write it in full"),
        ("bhysend", "-k -n qemu:/a", "-k and -n exclude each other"),
        ("bhysend", "qemu:/a -v", "option -v stands after the guest"),
        ("bhysend", "-d 300 qemu:/a", "-d 300: not a time with its unit"),
        ("bhysend", "web1", "guest web1: bhyve guests live on FreeBSD; a QEMU guest is qemu:/"),
        ("bhysend", "vbox:/a", "guest vbox:/a: bhyve's snapshot files are sent from their"),
        ("bhysend", "qemu:", "the path of the QMP socket is not absolute"),
        ("bhysend", "we%b1", "guest we%b1: not a guest's name, nor qemu:/path/to/qmp.sock"),
        ("bhysend", "-C /x.conf qemu:/a", "-C: QEMU tells its own configuration"),
        ("bhysend", "qemu:relative", "the path of the QMP socket is not absolute"),
        ("bhysend", "--discard", "--discard: name one guest"),
        ("bhysend", "-a qemu:/a ssh hv2 bhyrecv", "-a and a command exclude each other"),
        ("bhysend", "--in-doubt qemu:/a", "--in-doubt goes with --resume only"),
        ("bhysend", "-A -v", "-A goes with no other option"),
        ("bhyrecv", "-q 7", "-q 7: not a stream id"),
        ("bhyrecv", "-k", "option -k not recognized"),
        ("bhyrecv", "-x", "option -x requires argument"),
        ("bhyrecv", "-S /d -u", "-S makes files and starts nothing: not with -u"),
        ("bhyrecv", "a b", "name at most one guest"),
        ("bhyrecv", "-o disk0", "-o disk0: not a key=value"),
        ("bhyrecv", "--resume", "--resume: name one guest"),
        ("bhyrecv", "--aga", "option --aga: write it in full"),
    ],
)
def test_a_wrong_command_line_is_64(
    environment: dict[str, str], command: str, args: str, says: str
) -> None:
    done = run(environment, command, *args.split())
    assert done.returncode == 64, done.stderr
    assert done.stdout == ""
    assert says in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_the_usage_is_said_with_it(environment: dict[str, str]) -> None:
    assert "usage: bhysend [-afknPv]" in run(environment, "bhysend", "-x").stderr
    assert "usage: bhyrecv [-fnPuv]" in run(environment, "bhyrecv", "-x").stderr


@pytest.fixture
def terminal() -> Iterator[int]:
    far, near = os.openpty()
    yield near
    os.close(near)
    os.close(far)


def test_no_stream_goes_to_a_terminal(
    environment: dict[str, str], tmp_path: Path, terminal: int
) -> None:
    done = run(environment, "bhysend", "qemu:/a", stdout=terminal)
    assert done.returncode == 64
    assert "standard output is a terminal" in done.stderr
    assert not (tmp_path / "state").exists()


def test_no_answers_come_from_a_terminal(
    environment: dict[str, str], tmp_path: Path, terminal: int
) -> None:
    done = run(environment, "bhysend", "-A", stdin=terminal)
    assert done.returncode == 64
    assert "standard input is a terminal" in done.stderr
    assert not (tmp_path / "state").exists()


def test_no_stream_comes_from_a_terminal(
    environment: dict[str, str], tmp_path: Path, terminal: int
) -> None:
    done = run(environment, "bhyrecv", "web1", stdin=terminal)
    assert done.returncode == 64
    assert "standard input is a terminal" in done.stderr
    assert not (tmp_path / "state").exists()


def test_an_empty_input_is_65(environment: dict[str, str]) -> None:
    done = run(environment, "bhyrecv", "web1")
    assert done.returncode == 65
    assert "header at offset 0x0: the stream ends after 0 bytes of 72" in done.stderr


def test_a_guest_that_is_not_there_is_69(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "bhysend", f"qemu:{tmp_path}/none.sock")
    assert done.returncode == 69
    assert done.stdout == ""
    assert f"{tmp_path}/none.sock" in done.stderr


def test_the_state_directory_is_the_one_that_is_named(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert run(environment, "bhysend", "-l").stdout == ""
    base = tmp_path / "state"
    assert base.stat().st_mode & 0o7777 == 0o700
    record = Record("c" * 32, "web1", "qemu:/web1", "lock", HELD, {"hypervisor": "none"})
    Records(base, "source").write(record)
    done = run(environment, "bhysend", "-l")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\t")[3] == "c" * 32
    assert run(environment, "bhyrecv", "-l").stdout == ""


def test_a_loose_state_directory_is_76(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o755)
    for command in PAGES:
        done = run(environment, command, "-l")
        assert done.returncode == 76
        assert "not ours alone" in done.stderr


def test_a_list_that_cannot_be_written_is_74(environment: dict[str, str], tmp_path: Path) -> None:
    run(environment, "bhysend", "-l")
    record = Record("c" * 32, "web1", "qemu:/web1", "lock", HELD, {"hypervisor": "none"})
    Records(tmp_path / "state", "source").write(record)
    with open("/dev/full", "w") as full:
        done = run(environment, "bhysend", "-l", stdout=full)
    assert done.returncode == 74, done.stderr
    assert done.stderr == "bhysend: cannot write the list: No space left on device\n"


@pytest.mark.parametrize("args", ["-l", "-q " + "c" * 32])
def test_what_cannot_be_written_is_named(
    environment: dict[str, str], tmp_path: Path, args: str
) -> None:
    run(environment, "bhyrecv", "-l")
    record = Record("c" * 32, "web1", "qemu:/web1", "lock", LOADED, {"hypervisor": "none"})
    Records(tmp_path / "state", "destination").write(record)
    with open("/dev/full", "w") as full:
        done = run(environment, "bhyrecv", *args.split(), stdout=full)
    assert done.returncode == 74, done.stderr
    what = "list" if args == "-l" else "answers"
    assert f": cannot write the {what}: No space left on device\n" in done.stderr


def closed(environment: dict[str, str], line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, in which $P is the Python interpreter."""
    return subprocess.run(
        ["/bin/sh", "-c", line],
        env={**environment, "P": sys.executable},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_closed_standard_output_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    # Otherwise the first file that is opened would get this number, and then the stream.
    done = closed(environment, f'"$P" bhysend qemu:{tmp_path}/none.sock >&-')
    assert done.returncode == 64, done.stderr
    assert "standard output is closed" in done.stderr


def test_a_closed_standard_input_is_refused(environment: dict[str, str]) -> None:
    done = closed(environment, '"$P" bhyrecv web1 <&-')
    assert done.returncode == 64, done.stderr
    assert "standard input is closed" in done.stderr


def test_closed_standard_input_of_the_third_stage_is_refused(environment: dict[str, str]) -> None:
    done = closed(environment, '"$P" bhysend -A <&-')
    assert done.returncode == 64, done.stderr
    assert "standard input is closed" in done.stderr


def test_a_closed_standard_error_changes_no_status(environment: dict[str, str]) -> None:
    assert closed(environment, '"$P" bhysend web1 2>&-').returncode == 64
    assert closed(environment, '"$P" bhysend -l 2>&-').returncode == 0


def test_a_full_standard_error_changes_no_status(environment: dict[str, str]) -> None:
    """By itself, Python ends with status 120 if it cannot write the rest of standard error."""
    assert closed(environment, '"$P" bhysend web1 2>/dev/full').returncode == 64
    assert closed(environment, '"$P" bhyrecv -X 2>/dev/full').returncode == 64
    assert closed(environment, '"$P" bhysend -l 2>/dev/full').returncode == 0
