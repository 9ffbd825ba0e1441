"""The man pages and the two programs know the same options and variables."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import bhystream
from bhystream import commandline
from bhystream.backend.bhyve import identity, keys
from bhystream.backend.bhyve import resources as bhyve_resources
from bhystream.backend.qemu import resources as qemu_resources
from bhystream.errors import UsageError
from bhystream.recv import options as recv
from bhystream.send import options as send
from support.man_pages import ROOT, examples, section

PROGRAMS = {"bhysend": send, "bhyrecv": recv}
Letters = dict[str, bool]

needs_mandoc = pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not here")


def flags(lines: Sequence[str]) -> Letters:
    """Return the options in lines of mdoc, each with whether it has an argument."""
    found: Letters = {}
    for line in lines:
        match = re.search(r"\bFl (\S+)( Ar)?", line)
        assert match, line
        if match[1].startswith("-"):
            # The operand of a verb belongs to the verb.
            found["-" + match[1]] = bool(match[2]) and "-" + match[1] not in VERBS
        elif match[2] and len(match[1]) == 1:
            found[f"-{match[1]}"] = True
        else:
            found |= {f"-{letter}": False for letter in match[1]}
    return found


def parsed_by(program: str, monkeypatch: pytest.MonkeyPatch) -> Letters:
    """Return the options of a program's parser, in the form of flags()."""
    told: Letters = {}

    def record(argv: Sequence[str], short: str, long: Sequence[str], usage: str) -> None:
        told.update({f"-{m[0]}": bool(m[1]) for m in re.findall(r"(\w)(:?)", short)})
        told.update({f"--{word.rstrip('=')}": word.endswith("=") for word in long})
        raise UsageError("seen")

    monkeypatch.setattr(commandline, "parse", record)
    with pytest.raises(UsageError, match="seen"):
        parse: Callable[[Sequence[str]], object] = PROGRAMS[program].parse_options
        parse([])
    return told


# bhyrecv -q is a verb: the stream's id is its operand, as a guest is the operand of -l.
VERBS = {"-A", "-l", "-q", "--discard", "--in-doubt", "--resume"}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("part", ["SYNOPSIS", "OPTIONS"])
def test_a_page_has_the_options_of_its_program_and_no_other(
    program: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = section(f"{program}.8", part).splitlines()
    if part == "OPTIONS":
        lines = [line for line in lines if line.startswith(".It Fl ")]
    found = flags([line for line in lines if re.search(r"\bFl ", line)])
    found |= dict.fromkeys(VERBS & set(found), False)
    assert found == parsed_by(program, monkeypatch)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_options_are_sorted(program: str) -> None:
    lines = section(f"{program}.8", "OPTIONS").splitlines()
    words = [line.split()[2].lstrip("-") for line in lines if line.startswith(".It Fl ")]
    assert words == sorted(words, key=lambda word: (word.lower(), word))


def rendered(program: str, width: int) -> str:
    """Return the page as a terminal of this many columns shows it."""
    page = ROOT / "man" / f"{program}.8"
    done = subprocess.run(
        ["mandoc", "-T", "utf8", "-O", f"width={width}", page], capture_output=True, check=True
    )
    return re.sub(r".\x08", "", done.stdout.decode())


@needs_mandoc
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_usage_is_the_synopsis(program: str) -> None:
    text = rendered(program, 300)
    synopsis = text.split("\nSYNOPSIS\n")[1].split("\nDESCRIPTION\n")[0]
    usage: str = PROGRAMS[program].USAGE
    for said in (synopsis, usage):
        assert program in said
    lines = [" ".join(line.split()) for line in synopsis.splitlines() if line.strip()]
    joined = re.sub(r"\n {10,}", " ", usage.removeprefix("usage: "))
    assert [" ".join(line.split()) for line in joined.splitlines()] == lines


@needs_mandoc
@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "man").iterdir()))
def test_a_page_is_sound(page: str) -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", ROOT / "man" / page],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")


WAYS_OUT = {
    "bhysend": ["--discard web1", "--resume web1", "bhyrecv -q ID | bhysend -A"],
    "bhyrecv": ["bhysend --discard web1", "bhysend --resume web1"],
}


@needs_mandoc
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_first_screen_says_where_the_guest_is(program: str) -> None:
    """Each status, and what to type, in 80 columns and 40 lines."""
    lines = rendered(program, 80).splitlines()[:40]
    table = lines[lines.index("WHERE THE GUEST IS") :]
    # bhyrecv never returns 80; its table explains bhysend's 80.
    tags = [match[1] for line in table if (match := re.match(r" +(\d\S*?):? ", line))]
    found = [tag for tag in tags if tag.partition("\N{EN DASH}")[0] in {"0", "64", "80", "81"}]
    assert sorted(set(found)) == ["0", "64\N{EN DASH}77", "80", "81"]
    for words in WAYS_OUT[program]:
        assert any(words in line for line in table), words


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_options_follow_where_the_guest_is_and_the_requirements(program: str) -> None:
    text = (ROOT / "man" / f"{program}.8").read_text()
    titles = re.findall(r"^\.Sh (.+)$", text, re.M)
    first = ["NAME", "SYNOPSIS", "DESCRIPTION", "WHERE THE GUEST IS", "REQUIREMENTS", "OPTIONS"]
    assert titles[: len(first)] == first
    assert titles[-3:] == ["AUTHORS", "CAVEATS", "BUGS"]


def test_every_page_is_installed() -> None:
    text = (ROOT / "setup.py").read_text()
    for page in sorted(path.name for path in (ROOT / "man").iterdir()):
        directory = f'("share/man/man{page[-1]}", ['
        assert f'"man/{page}"' in text.split(directory)[1].split("]")[0]


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "man").iterdir()))
def test_what_a_page_refers_to_is_there(page: str) -> None:
    """Check the references to sections of the same page, and to our other pages."""
    text = (ROOT / "man" / page).read_text()
    titles = {title.replace("\\&", "") for title in re.findall(r"^\.S[hs] (.+)$", text, re.M)}
    for title in re.findall(r"\bSx (.+?)(?: Ta .+)?(?: [.,;:)]+)*$", text, re.M):
        assert title.replace("\\&", "") in titles
    for name, number in re.findall(r"\bXr (bhy(?:send|recv|stream)\S*) (\d)", text):
        assert (ROOT / "man" / f"{name}.{number}").exists(), name


def lent(page: str) -> set[str]:
    """Return the words of -o that a page lists."""
    text = section(page, "RESOURCES OF THE DESTINATION")
    lines = [line for line in text.splitlines() if line.startswith(".It Cm ")]
    return {word for line in lines for word in re.findall(r"\b([a-z]+)\d?=", line)}


def test_the_pages_of_the_hypervisors_list_what_a_host_lends() -> None:
    devices = {"disk", "net", "serial"}
    assert lent("bhysend-qemu.7") == devices | set(qemu_resources._PLAIN)
    assert lent("bhysend-bhyve.7") == set(bhyve_resources._CHECKS)


def test_the_variables_that_are_read_are_on_a_page() -> None:
    """A program reads each variable on its page, and each variable that it reads is there."""
    read: set[str] = set()
    for path in Path(bhystream.__path__[0]).rglob("*.py"):
        read |= set(re.findall(r'"((?:BHYSEND|BHYRECV|SSH|XDG)_[A-Z_]+)"', path.read_text()))
    said = {
        page: set(re.findall(r"^\.It Ev (\S+)$", section(f"{page}.8", "ENVIRONMENT"), re.M))
        for page in PROGRAMS
    }
    assert said["bhysend"] | said["bhyrecv"] == read
    assert not any(name.startswith("BHYRECV") for name in said["bhysend"])
    shared = {"BHYSEND_STATE_DIR", "BHYSEND_VMM_DIR", "XDG_STATE_HOME"}
    assert said["bhysend"] & said["bhyrecv"] == shared


def test_the_format_lists_the_keys_that_travel_and_no_other() -> None:
    """The keys have no slot; of a family, such as bios.X, the page has bios. and each X."""
    text = (ROOT / "man/bhystream.5").read_text().split(".Ss CONFIG of bhyve\n")[1]
    text = text.split("\n.Ss ")[0]
    said = set(re.findall(r"[A-Za-z0-9_.-]+", text))
    travels = {key for key, rule in keys._GLOBAL.items() if rule.role == "guest"}
    for key in travels:
        family, _, last = key.rpartition(".")
        assert key in said or {f"{family}.", last} <= said, key
    listed = [word for word in said if re.fullmatch(r"(x86|memory|rtc|keyboard|lpc)\.\w+", word)]
    for key in listed:
        assert key in travels or key.startswith(("lpc.com", "lpc.boot")), key


def test_the_format_lists_the_devices_and_their_keys() -> None:
    text = (ROOT / "man/bhystream.5").read_text().split(".It Li hostbridge\n")[1]
    text = ".It Li hostbridge\n" + text.split("\n.El")[0]
    parts = re.findall(r"^\.It Li (\S+)\n(.*?)(?=^\.It |\Z)", text, re.M | re.S)
    assert {device for device, _ in parts} == set(keys.SAVED)
    for device, body in parts:
        said = set(re.findall(r"[a-z0-9_]+", body))
        for key, rule in keys.SAVED[device].items():
            if rule.role == "guest":
                assert set(key.split(".")[:1]) <= said, (device, key)


def test_the_format_lists_what_a_host_says_of_itself() -> None:
    text = (ROOT / "man/bhystream.5").read_text().split(".Ss HOST of bhyve\n")[1]
    said = set(re.findall(r"^\.It Li (\S+) Ta ", text.split("\n.Ss ")[0], re.M))
    made = {
        "cpu.vendor",
        "bhyve.hash",
        "vmm.hash",
        identity.CONF,
        identity.POWER_BUTTON,
        *identity._STRINGS,
        *identity._INTEGERS,
    }
    assert said == made


# Each example is run by sh(1), over programs that only note their words.

RESOURCES = {
    "bhysend-qemu.7": {"disk0", "net0"},
    "bhysend-bhyve.7": {"disk0", "net0", "com1", "bootrom"},
}
PAGES_WITH_EXAMPLES = ["bhysend.8", "bhyrecv.8", "bhysend-bhyve.7", "bhysend-qemu.7"]
FAKES = (
    *("bhysend", "bhyrecv", "bhyve", "bhyvectl", "qemu-system-x86_64", "ssh", "env", "sleep"),
    *("zfs", "zstd", "mbuffer", "nc", "pgrep", "fsync", "make", "kldload", "kldunload"),
    *("mkdir", "mount", "pwait", "grep"),
)
# ssh hands its words, joined by spaces, to the shell at the other host.
FAKE = r"""#!/bin/sh
name=${0##*/}
printf '%s\037' "$name" "$@" "
" >> "$NOTES"
case $name in
ssh)    shift; exec sh -c "$*" ;;
env)    exec /usr/bin/env "$@" ;;
grep)   exit 1 ;;
bhysend)
    hook=
    while getopts AafklnPvB:C:d:p:r:T:z:-: letter; do
        case $letter in p) hook=$OPTARG ;; -) exit 0 ;; esac
    done
    shift $((OPTIND - 1))
    [ -z "$hook" ] || BHYSEND_GUEST=web1 BHYSEND_ID=1234 sh -c "$hook" || exit 69
    [ $# -le 1 ] || { shift; exec "$@"; } ;;
esac
while read -r _; do :; done
"""


def run_example(command: str, before: Sequence[str], directory: Path) -> list[list[str]]:
    """Run one example after the assignments of earlier examples; return each program's words."""
    programs = directory / "bin"
    if not programs.exists():
        programs.mkdir()
        for name in FAKES:
            (programs / name).write_text(FAKE)
            (programs / name).chmod(0o755)
        (programs / "sh").symlink_to("/bin/sh")
        (directory / "backup").mkdir()
    for name in ("backup/web1.bhys", "web1.bhys"):
        (directory / name).touch()
    notes = directory / "notes"
    notes.write_text("")
    script = "".join([*before, command, "wait\n"]).replace("/backup/", f"{directory}/backup/")
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", "hv2", "web1", "web2"],
        cwd=directory,
        env={"PATH": str(programs), "NOTES": str(notes)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), command
    calls = notes.read_text().split("\037\n\037")
    assert calls.pop() == ""
    return [call.split("\037") for call in calls]


@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES)
def test_each_example_gives_each_program_the_words_that_a_reader_means(
    page: str, tmp_path: Path
) -> None:
    commands = examples(page)
    before: list[str] = []
    for command in commands:
        if command.startswith("o="):
            before.append(command)
            continue
        calls = run_example(command, before, tmp_path)
        assert calls or command.startswith("umask "), command
        for name, *words in calls:
            check_words(name, words, command)
            if name == "bhyrecv" and "$o" in command and any(w.startswith("disk0=") for w in words):
                given = {w.partition("=")[0] for w in words if re.match(r"[a-z]+\d?=", w)}
                assert given == RESOURCES.get(page, RESOURCES["bhysend-bhyve.7"]), command
        # Each program that the example names was run, by a shell of this or the other host.
        names = set(re.findall(r"\b(?:bhysend|bhyrecv|zfs|zstd|mbuffer|nc)(?= )", command))
        assert names <= {name for name, *_ in calls}, command
    assert len(before) == ("$o" in " ".join(commands))


def check_words(name: str, words: Sequence[str], command: str) -> None:
    """Check that no word has a line's end, and that our programs take the words."""
    hooks = {words[at + 1] for at, word in enumerate(words) if word == "-p"}
    assert not any("\n" in word for word in words if word not in hooks), (name, words, command)
    if name in PROGRAMS:
        parse: Callable[[Sequence[str]], object] = PROGRAMS[name].parse_options
        parse([word.replace("ID", "0" * 32) for word in words])


def test_the_examples_are_found() -> None:
    found = {page: len(examples(page)) for page in PAGES_WITH_EXAMPLES}
    assert found["bhysend.8"] > 25 and found["bhyrecv.8"] > 15
    assert any("zstd -dc | bhyrecv $o" in command for command in examples("bhysend.8"))


def test_a_resource_with_a_line_end_is_noticed(tmp_path: Path) -> None:
    """The remote shell takes what follows a line's end for another command."""
    with pytest.raises(AssertionError):
        run_example('ssh hv2 "zstd -dc | bhyrecv $o"\n', ["o='-o a=b\n  -o c=d'\n"], tmp_path)
