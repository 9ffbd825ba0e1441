"""The power button of a guest that has moved: SIGTERM presses it, as at the source.

    python -m pytest -m bhyve tests/bhyve/test_power.py

Run the test as root.  It needs no ROM: the guest is the few instructions below, which switch ACPI
on, beat as the ROM of rom.py does, and power off when the button is pressed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve.freebsd import FreeBsdHost

from .rom import Host, booted, until

pytestmark = [
    pytest.mark.bhyve,
    pytest.mark.skipif(
        not sys.platform.startswith("freebsd"), reason="a bhyve guest needs FreeBSD"
    ),
]

# 16-bit code at 0xff00 of the ROM's 64 KiB, with CS:IP F000:FF00 and DS 0.
_CODE = bytes.fromhex(
    "fc"  #             cld
    "31c0 8ed8 8ec0"  # ds = es = 0
    "b0a0 e6b2"  #      out 0xb2, 0xa0           SMI_CMD: ACPI on
    "ba0204 b82001 ef"  # out 0x402, 0x120       PM1 enable: power button, global lock
    "be6dff bf0005 b91500 2ef3a4"  # copy the text to 0x500
    # beat:
    "be0005 b91500"  #  for each character of the text:
    "bafd03 ec a820 74f8"  #  wait until COM1 can send
    "baf803 ac ee e2f1"  #    send it
    "bf0a05"  #         count: the last digit
    "fe05 803d39 7606"  # digit += 1; up to "9": done
    "c60530 4f ebf3"  # digit = "0", on with the one before
    "ba0204 ed 89c3"  # in 0x402                 PM1 enable
    "ba0004 ed 21d8"  # and in 0x400             PM1 status
    "f6c401 740d"  #    no power button: wait
    "baf803 b050 ee"  # send "P"
    "ba0404 b80034 ef"  # out 0x404, 0x3400      PM1 control: S5
    "66b900004000"  #   wait: 2^22 rounds
    "6649 75fc"  #      ecx -= 1
    "ebb1"  #           beat
)
_TEXT = b"HB 00000000 . bad 0 \n"
_RESET = bytes.fromhex("e90dff")  # at 0xfff0: jmp 0xff00
_CODE_AT, _TEXT_AT, _RESET_AT = 0xFF00, 0xFF6D, 0xFFF0
_ROM_BYTES = 1 << 16


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as path:
        rom = bytearray(b"\xf4" * _ROM_BYTES)
        for at, what in ((_CODE_AT, _CODE), (_TEXT_AT, _TEXT), (_RESET_AT, _RESET)):
            rom[at : at + len(what)] = what
        monkeypatch.setenv("BHYSEND_TEST_ROM", f"{path}/rom.bin")
        Path(path, "rom.bin").write_bytes(rom)
        with booted(Path(path)) as made:
            yield made


def test_sigterm_presses_it_after_each_move(host: Host) -> None:
    assert FreeBsdHost().has_power_button(host.pid())
    for _ in range(2):
        to = host.other()
        done = host.run(*host.send("-f"), *host.receive(to))
        assert done.status == 0, done.said
        assert "power button" not in done.said
        host.arrived(to)
        host.prove(5)
        assert FreeBsdHost().has_power_button(host.pid())
    os.kill(host.pid(), signal.SIGTERM)
    until(lambda: not host.pid(), "end of the guest")
    assert host.lived[-1].said().endswith("P")


def test_a_guest_without_acpi_gets_none(host: Host) -> None:
    """Before the guest switches ACPI on, SIGTERM ends its bhyve, also after a move."""
    rom = Path(os.environ["BHYSEND_TEST_ROM"])
    rom.write_bytes(rom.read_bytes().replace(bytes.fromhex("e6b2"), b"\x90\x90"))
    host.end()
    host.reboot()
    assert not FreeBsdHost().has_power_button(host.pid())
    to = host.other()
    done = host.run(*host.send("-f"), *host.receive(to))
    assert done.status == 0, done.said
    host.arrived(to)
    assert not FreeBsdHost().has_power_button(host.pid())
    os.kill(host.pid(), signal.SIGTERM)
    until(lambda: not host.pid(), "end of bhyve")
    assert not host.lived[-1].said().endswith("P")
