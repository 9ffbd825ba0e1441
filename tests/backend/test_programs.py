"""Programs are run, and their output is returned or reported."""

from __future__ import annotations

import os

import pytest

from bhystream.backend import programs
from bhystream.errors import GuestError


def test_a_program_sees_none_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBXO_OPTIONS", "json")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    seen = programs.ask("/usr/bin/env").splitlines()
    assert "LC_ALL=C" in seen
    assert "TZ=UTC0" in seen
    assert not [line for line in seen if line.startswith("LIBXO")]


def test_what_a_failing_program_printed_is_not_an_answer() -> None:
    assert programs.ask("/bin/sh", "-c", "echo yes") == "yes\n"
    assert programs.ask("/bin/sh", "-c", "echo no; exit 1") == ""


def test_a_failure_is_told_in_the_program_s_last_words() -> None:
    with pytest.raises(GuestError, match=r"^cannot destroy guest a: vm_destroy: No$"):
        programs.do(
            "destroy guest a", "/bin/sh", "-c", "echo x >&2; echo 'vm_destroy: No' >&2; exit 3"
        )
    with pytest.raises(GuestError, match=r"^cannot be: /bin/sh ended with status 3$"):
        programs.do("be", "/bin/sh", "-c", "exit 3")


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(GuestError, match="cannot run /nowhere/x: No such file"):
        programs.run("/nowhere/x")


def test_no_ctrl_c_reaches_a_program() -> None:
    """The terminal sends SIGINT to our process group, while a program cleans up for us."""
    group = programs.ask("/bin/sh", "-c", "cut -d ' ' -f 5 /proc/$$/stat")
    assert int(group) != os.getpgrp()
