"""A bhyve guest of a few instructions, which obeys its power button.

It switches ACPI on, beats as the ROM of rom.py does, and powers off when its power button is
pressed.  It checks no page, and runs in real mode.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .rom import Host, booted

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
    "66b900000002"  #   wait: 2^25 rounds
    "6649 75fc"  #      ecx -= 1
    "ebb1"  #           beat
)
_TEXT = b"HB 00000000 . bad 0 \n"
_RESET = bytes.fromhex("e90dff")  # at 0xfff0: jmp 0xff00
_CODE_AT, _TEXT_AT, _RESET_AT = 0xFF00, 0xFF6D, 0xFFF0
_ROM_BYTES = 1 << 16
_ACPI_ON = bytes.fromhex("e6b2")


def button_rom(*, has_acpi: bool = True) -> bytes:
    """Return the ROM.  has_acpi: False if the guest is to leave ACPI off."""
    rom = bytearray(b"\xf4" * _ROM_BYTES)
    code = _CODE if has_acpi else _CODE.replace(_ACPI_ON, b"\x90\x90")
    for at, what in ((_CODE_AT, code), (_TEXT_AT, _TEXT), (_RESET_AT, _RESET)):
        rom[at : at + len(what)] = what
    return bytes(rom)


@contextmanager
def with_button() -> Iterator[Host]:
    """Boot the guest, and end it after the with block.  Its ROM is the file host.rom."""
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as path:
        rom = Path(path, "rom.bin")
        rom.write_bytes(button_rom())
        before = os.environ.get("BHYSEND_TEST_ROM")
        os.environ["BHYSEND_TEST_ROM"] = str(rom)
        try:
            with booted(Path(path)) as made:
                yield made
        finally:
            del os.environ["BHYSEND_TEST_ROM"]
            if before is not None:
                os.environ["BHYSEND_TEST_ROM"] = before
