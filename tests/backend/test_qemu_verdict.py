"""What a QEMU program says of itself, and a program that fails instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from bhystream.backend.qemu.verdict import machines
from bhystream.errors import GuestError


def test_a_program_that_fails_is_not_one_that_knows_no_machine(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho Supported machines are:\necho no room >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(GuestError) as raised:
        machines(str(program))
    assert str(raised.value) == f"{program} -machine help ended with status 3: no room"
