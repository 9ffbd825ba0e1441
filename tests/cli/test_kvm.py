"""A guest under KVM moves there and back; its state has kvmclock and the kernel's APIC.

The test runs on every host with a working /dev/kvm, even if KVM itself is emulated: the guest is a
boot ROM that needs little of a processor.  On other hosts the test is skipped with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from backend.qemu_rig import Rig, rigged, state_of
from guest.qmp import run_command
from guest.rom import assert_unbroken, beats_of, build_rom, why_no_kvm
from support.waiting import until

from .pipeline import BHYRECV, BHYSEND, report, run

# A guest under emulated KVM, on a busy host, is slow.
_DEADLINE_S = 500.0
WHY_NOT = why_no_kvm()
pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(WHY_NOT), reason=f"no guest runs under KVM here: {WHY_NOT}"),
]


class Rom:
    """The guest, and all that it has printed in each of its places."""

    def __init__(self, rig: Rig, machine: str = "pc-q35-7.2") -> None:
        rig.state_dir.chmod(0o700)
        self.rig = rig
        self.environment = {**os.environ, "BHYSEND_STATE_DIR": str(rig.state_dir)}
        self.rom = build_rom(Path(rig.path("rom.bin")))
        self.serials = [Path(rig.path("0.serial"))]
        words = ["-bios", str(self.rom), "-cpu", "qemu64"]
        words += ["-chardev", f"file,id=serial0,path={self.serials[0]}"]
        words += ["-serial", "chardev:serial0"]
        self.qmp = rig.start("here", *words, machine=machine, accel="kvm")

    def said(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.serials)

    def prove(self, more: int = 10) -> None:
        """Assert that the guest beats on in its place, unharmed."""
        before = len(beats_of(self.said()))
        until(
            lambda: len(beats_of(self.said())) >= before + more, f"{more} more beats", _DEADLINE_S
        )
        said = self.said()
        assert_unbroken(said[: said.rindex(b"\n") + 1])
        assert run_command(Path(self.qmp), "query-kvm", {})["enabled"]
        of_cpu = {"path": "/machine/unattached/device[0]/lapic", "property": "type"}
        assert run_command(Path(self.qmp), "qom-get", of_cpu) == "kvm-apic"

    def receive(self, name: str) -> list[str]:
        """Return the command that receives the guest under another name."""
        self.serials.append(Path(self.rig.path(f"{len(self.serials)}.serial")))
        return [*BHYRECV, "-o", f"bios={self.rom}", "-o", f"serial0={self.serials[-1]}", name]

    def move(self, name: str, options: Sequence[str]) -> None:
        """Move the guest in the command form; assert that it arrives, and proves itself there."""
        sending = [*BHYSEND, *options, f"qemu:{self.qmp}", *self.receive(name)]
        [sent] = run(sending, env=self.environment)
        assert sent.status == 0, report(sent)
        self.qmp = str(self.rig.state_dir / f"{name}.qmp")
        assert state_of(self.qmp) == "running"
        self.prove()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigged() as made:
        yield made


@pytest.mark.parametrize(
    "machine, options",
    [("pc-q35-7.2", ()), ("pc-i440fx-7.2", ("-r", "0"))],
    ids=["q35-live", "pc-warm"],
)
def test_a_guest_under_kvm_moves_there_and_back(
    machine: str, options: Sequence[str], rig: Rig
) -> None:
    guest = Rom(rig, machine)
    guest.prove()
    for name in ("there", "back"):
        guest.move(name, options)


def test_a_guest_under_kvm_goes_on_where_it_was(rig: Rig) -> None:
    """It goes on after a checkpoint, which has its clock and APIC, and after a failed move."""
    guest = Rom(rig)
    guest.prove()
    stream = Path(rig.path("stream"))
    with stream.open("wb") as file:
        [kept] = run([*BHYSEND, "-k", f"qemu:{guest.qmp}"], env=guest.environment, stdout=file)
    assert kept.status == 0, report(kept)
    found = stream.read_bytes()
    for section in (b'"kvmclock"', b'"apic"', b'"cpu"'):
        assert section in found
    guest.prove()
    sending = [*BHYSEND, "-p", "exit 1", f"qemu:{guest.qmp}", *guest.receive("there")]
    [sent] = run(sending, env=guest.environment)
    assert sent.status == 69, report(sent)
    guest.serials.pop()
    guest.prove()
