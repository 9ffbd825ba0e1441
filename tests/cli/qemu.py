"""A guest that travels from one QEMU to the next; see travel.py."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from guest import Guest, Serial, SerialLog, Spec, images, peer_pid, reaping
from guest.qmp import run_command
from support.processes import is_gone
from support.waiting import DEADLINE_S, until

from .pipeline import BHYRECV, BHYSEND
from .travel import SHM, Host, Site, Traveller, processes_with, short_directory


class Firmware(Guest):
    """A guest without an operating system, whose firmware finds nothing to boot, and waits."""

    @property
    def argv(self) -> list[str]:
        """QEMU's command line."""
        words = super().argv
        for option in ("-kernel", "-initrd", "-append"):
            at = words.index(option)
            del words[at : at + 2]
        return words


class QemuPlace(Site):
    """The paths of one QEMU."""

    def __init__(self, qmp: Path, serial: Path, ram: Path) -> None:
        self.qmp = qmp
        self.ram = ram
        self.serial = Serial(serial, self._why_dead)
        self.operand = f"qemu:{qmp}"

    def arrive(self) -> None:
        self.pid = peer_pid(self.qmp)

    def status(self) -> str:
        """Return QEMU's run state."""
        state: str = run_command(self.qmp, "query-status", {})["status"]
        return state

    def runs(self) -> bool:
        return not (self.pid and self.has_ended()) and self._is_at("running")

    def is_held(self, host: Host) -> bool:
        return self._is_at("postmigrate")

    def is_loaded(self, host: Host) -> bool:
        return self._is_at("paused")

    def _is_at(self, status: str) -> bool:
        return bool(self.hypervisors()) and self.status() == status

    def is_building(self) -> bool:
        return bool(self.hypervisors())

    def hypervisors(self) -> list[int]:
        """Return the QEMUs that were started with this QMP socket."""
        found = []
        for pid in processes_with(f"unix:{self.qmp}"):
            with suppress(OSError):
                if b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                    found.append(pid)
        return found

    def processes(self) -> list[int]:
        return processes_with(str(self.qmp))

    def reaped(self) -> AbstractContextManager[None]:
        return reaping(self.qmp)

    def forsake(self) -> None:
        if self.hypervisors():
            assert self.status() == "inmigrate"
            assert self.said() == b""
        with reaping(self.qmp):
            pass
        for path in (self.qmp, self.serial.path, *_left()):
            # A memory file that a killed bhyrecv has left; a later one removes it.
            assert path.parent != SHM or path.stat().st_blocks == 0
            path.unlink(missing_ok=True)

    def assert_nothing_left(self) -> None:
        assert self.processes() == []
        for path in (self.qmp, self.ram, self.serial.path):
            assert not os.path.lexists(path)
        # Another test run may have killed its bhyrecv just now.
        until(lambda: not _left(), "the removal of memory files")

    def assert_tidy(self, host: Host) -> None:
        pass  # QEMU's files belong to the process that started it

    def said(self) -> bytes:
        return self.serial.read().raw

    def beats(self) -> list[int]:
        return [beat.sequence for beat in self.serial.read().heartbeats]

    def await_beats(self, count: int = 1, deadline_s: float = DEADLINE_S) -> None:
        self.serial.await_heartbeats(count, deadline_s)

    def await_sweeps(self, count: int = 1) -> None:
        self.serial.await_sweeps(count)

    def _why_dead(self) -> str | None:
        return f"QEMU {self.pid} has ended" if self.pid and is_gone(self.pid) else None


class QemuTraveller(Traveller):
    """A Linux guest.

    past: the guest's serial output in its earlier places.
    """

    needs = "-o kernel= -o initrd="
    missing = ("kernel: missing; say -o kernel=PATH", "initrd: missing; say -o initrd=PATH")

    def __init__(self, spec: Spec) -> None:
        """Boot the guest, and wait until it is ready."""
        self.spec = spec
        self.name = spec.name
        self.npages = spec.memory_mib << 8
        self.directory = short_directory()
        self.past = SerialLog(b"")
        self._images = images()
        self._places: list[QemuPlace] = []
        self._first = Guest(spec)
        try:
            self._first.start()
            self.at = self._add(
                QemuPlace(self._first.qmp_path, self._first.serial.path, self._first.ram_path)
            )
            self.place: Site = self.at
            self.at.arrive()
            self.at.serial.await_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for place in self._places:
            with reaping(place.qmp):
                pass
        self._first.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _add(self, place: QemuPlace) -> QemuPlace:
        self._places.append(place)
        return place

    def next(self, name: str | None = None) -> QemuPlace:
        leg = f"{len(self._places)}"
        here = self.directory
        return self._add(
            QemuPlace(here / f"{name or leg}.qmp", here / f"{leg}.serial", here / f"{leg}.ram")
        )

    def waiting(self, guest: Guest) -> QemuPlace:
        """Return the place of a QEMU that was started with incoming=True."""
        return self._add(QemuPlace(guest.qmp_path, guest.serial.path, guest.ram_path))

    def send(self, *options: str) -> list[str]:
        return [*BHYSEND, *options, self.place.operand]

    def receive(self, to: Site, *options: str) -> list[str]:
        return [*BHYRECV, *options, *self.resources(to), to.operand]

    def receive_bare(self, to: Site, *options: str) -> list[str]:
        return [*BHYRECV, *options, to.operand]

    def named_memory(self, to: Site) -> list[str]:
        return ["-o", f"mem={qemu_place(to).ram}"]

    def memory_file(self) -> Path:
        """Return a path of the file with the guest's memory, wherever the guest lives."""
        if self.at.ram.exists():
            return self.at.ram
        # The files that bhyrecv makes have no names.
        for entry in Path(f"/proc/{self.place.pid}/fd").iterdir():
            if "/bhyrecv-" in str(entry.readlink()):
                return entry
        raise LookupError("the guest's memory is in no file")

    def argv(self, to: QemuPlace) -> list[str]:
        """Return the QEMU command line, program first, that an operator would write for a place."""
        return self.spec.argv(
            self._images, ram_path=to.ram, qmp_path=to.qmp, serial_path=to.serial.path
        )

    def resources(self, to: Site) -> list[str]:
        values = {
            "serial0": qemu_place(to).serial.path,
            "kernel": self._images.kernel,
            "initrd": self._images.initramfs,
        }
        if self.spec.disk is not None:
            values["disk0"] = self.spec.disk
        return [word for key, value in values.items() for word in ("-o", f"{key}={value}")]

    def arrive(self, to: Site) -> None:
        self.past = self.log()
        self.at = qemu_place(to)
        super().arrive(to)

    def log(self) -> SerialLog:
        """Return all that the guest has said."""
        return self.past + self.at.serial.read()

    def beats(self) -> list[int]:
        return [beat.sequence for beat in self.log().heartbeats]

    def assert_unbroken(self) -> None:
        self.log().assert_unbroken()


def qemu_place(place: Site) -> QemuPlace:
    """Return the place, which must be QEMU's."""
    assert isinstance(place, QemuPlace)
    return place


def qemu(guest: Traveller) -> QemuTraveller:
    """Return the guest, which must be QEMU's."""
    assert isinstance(guest, QemuTraveller)
    return guest


def _left() -> list[Path]:
    """Return the memory files whose bhyrecv is gone; its pid is in the name."""
    return [path for path in SHM.glob("bhyrecv-*-*") if is_gone(int(path.name.split("-")[-1]))]
