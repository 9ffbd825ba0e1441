"""The guest: vCPUs, kernel structures and devices that share one memory.

A new Guest is paused.  Either boot() fills its memory and start_vcpus() lets
the guest run, or load_kernel() and Device.load() take over a snapshot's state
and resume_vcpus() lets the guest run.

bhyve keeps a vCPU waiting that the guest never started.  But after a checkpoint
or a restore bhyve resumes all vCPUs: such a vCPU then runs from a state that the
guest never set.  Source: usr.sbin/bhyve/snapshot.c, vm_vcpu_resume();
bhyverun.c, main(), FreeBSD 15.1, run there.

The guest prints on its console, com1:

    beat N                     every 100 ms, without a gap, also across a move
    sweep N pages P wrong W    every vCPU has checked all its pages once more
    WRONG what: expected .. found ..    at once, when the guest finds a fault
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any

from bhystream.errors import GuestError, UsageError

from . import cpu as cpu_file
from .blob import number, pack_blob, unpack_blob
from .clocks import GuestClocks
from .config import Config, parse_bytes
from .devices import Device, Ticker, blob_complaints, uart_of
from .gate import Gate
from .interpreter import Interpreter
from .node import Memory
from .proof import (
    BOOT_PAGE,
    CLOCK_PAGE,
    FIRST_PAGE,
    TIMER_PAGE,
    ZERO,
    Boot,
    make_plans,
    unpack_boot,
)
from .settings import read_settings
from .sysctl import sysctl
from .vcpu import Vcpu, read_registers

KERNEL_STRUCTS = (
    "vhpet",
    "vm",
    "vioapic",
    "vlapic",
    "vmcx",
    "vatpit",
    "vatpic",
    "vpmtmr",
    "vrtc",
)
"""In the order of FILE.kern, G4.  Source: usr.sbin/bhyve/snapshot.c, snapshot_kern_structs."""

_BEAT_S = 0.1
_TRY_S = 0.001  # as in usr.sbin/bhyve/amd64/vmexit.c, vmexit_debug()
_TOLD_LIMIT = 50
_STRAYS_A_SLICE = 2048
_CLOCK = struct.Struct("<Q")
_DEFAULTS = {"touched": "64M", "working_set": "16M", "rate": "24M", "sweep_rate": "64M"}


def boot_parameters(config: Config, ncpus: int, npages: int) -> Boot:
    """Return the boot parameters of a configuration, limited to npages of memory.

    Raises UsageError if a standin.* key has an invalid value.
    """
    asked = {k: parse_bytes(config.get(f"standin.{k}", v)) for k, v in _DEFAULTS.items()}
    touched = max(min(asked["touched"] // 4096, (npages - FIRST_PAGE) // 16 * 16), ncpus)
    working = max(min(asked["working_set"] // 4096, touched), ncpus)
    waiting = config.get("standin.waiting", "0")
    if not waiting.isdigit() or int(waiting) >= ncpus:
        raise UsageError(f"standin.waiting: not a number of vCPUs below {ncpus}: {waiting!r}")
    return Boot(ncpus, npages, touched, working, asked["rate"], asked["sweep_rate"], int(waiting))


class Guest:
    """A guest, paused until start_vcpus() or resume_vcpus().

    gate: the gate that the devices with a pause callback were made with.
    """

    def __init__(
        self,
        memory: Memory,
        devices: Sequence[Device],
        gate: Gate,
        ncpus: int,
    ) -> None:
        self.memory = memory
        self.devices = devices
        self.ncpus = ncpus
        # A CPU does not enter a guest whose registers are all 0.  Source: the AMD64 manual,
        # volume 2, 15.5.1 (EFER.SVME is 0); the Intel manual, volume 3, 26.3 (CR4.VMXE is 0).
        self.can_enter = True
        self._unstarted: range = range(0)
        self._gate = gate
        self._cpus = Gate()
        self._uart = uart_of(devices)
        self._timer = Ticker("vhpet", "vhpet", memory, TIMER_PAGE, self._cpus)
        self._vcpus: list[Vcpu] = []
        self._clock = 0
        self._beats = 0
        self._next_beat = 0.0
        self._swept = 0
        self._wrong = 0
        self._told = 0
        self._pages = 0
        self._complaints: list[str] = []
        self._strays: Iterator[None] = iter(())
        self._telling = threading.Lock()
        self._restored: dict[str, dict[str, Any]] = {}
        directory = memory.path.parent.parent
        settings = read_settings(directory)
        self._is_intel = settings.cpu_vendor == "intel"
        self._cpu_path = memory.path.with_name(f"{memory.path.name}.cpu")
        self._cpu_file = cpu_file.create(self._cpu_path, ncpus, is_intel=self._is_intel)
        tsc_hz = int(sysctl(directory, "machdep.tsc_freq") or 0)
        self._clocks = GuestClocks(self._cpu_file, tsc_hz)
        self._held: list[threading.Thread] = []
        self._is_let_go = threading.Event()

    def hold_vcpus(self) -> None:
        """Start one thread for each vCPU that tries VM_RUN again and again until prepare().

        bhyve's vCPU threads do so while bhyve reads a snapshot.  VM_RUN runs
        nothing while the vCPU is suspended.
        """
        for index in range(self.ncpus):
            thread = threading.Thread(target=self._try_to_run, args=(index,), daemon=True)
            self._held.append(thread)
            thread.start()

    def _try_to_run(self, index: int) -> None:
        own = cpu_file.Cpus(self._cpu_path, is_intel=self._is_intel)
        interpreter = Interpreter(own[index], self.memory.segments()[0][1])
        try:
            while not self._is_let_go.wait(_TRY_S):
                if not own[index].get("suspended"):
                    with own.locked():
                        interpreter.run()
        except GuestError as error:
            sys.stderr.write(f"vm exit[{index}]: {error}\n")
            sys.stderr.flush()
            os.abort()
        finally:
            own.close()

    def boot(self, boot: Boot) -> None:
        """Fill a new guest's memory, as the boot parameters ask."""
        self.memory.write(BOOT_PAGE, boot.pack())
        self._advance_clock()
        self._make_vcpus(boot)
        for vcpu in self._vcpus:
            vcpu.boot()

    def prepare(self) -> None:
        """Start every thread: the devices run, the vCPUs stand until they are started or resumed.

        A snapshot's state is first compared with memory; the guest prints the
        differences when it runs.
        """
        if self._restored:
            self._take_state()
        self._let_go()
        for index, cpu in enumerate(self._cpu_file):
            cpu.start(index)
        self._clocks.go_on()
        for device in self.devices:
            device.start()
        self._timer.start()
        for index, vcpu in enumerate(self._vcpus):
            vcpu.start(f"vcpu {index}")
        self.resume_devices()

    def pause_vcpus(self) -> None:
        """Stop every vCPU; return when all stand."""
        self._cpus.close()
        self._let_wait(range(self.ncpus))

    def pause_devices(self) -> None:
        """Stop every device that has a pause callback; return when all stand."""
        self._gate.close()

    def resume_devices(self) -> None:
        """Undo pause_devices()."""
        self._gate.open()

    def start_vcpus(self) -> None:
        """Let the vCPUs run that bhyve (the first) or the guest's firmware (the others) starts."""
        self._let_wait(self._unstarted)
        self._cpus.open()

    def resume_vcpus(self) -> None:
        """Let every vCPU run, paused or not, and even a vCPU that the guest never started."""
        for index in self._unstarted:
            self._complaints.append(f"vcpu {index}: ran without a SIPI")
        self._unstarted = range(0)
        self._let_wait(())
        self._cpus.open()

    @property
    def is_paused(self) -> bool:
        """Whether the vCPUs stand."""
        return self._cpus.is_closed

    def _let_wait(self, waiting: Collection[int]) -> None:
        """Mark the vCPUs that wait in bhyve (VM_DEBUG_CPUS), and no others, as suspended."""
        for index, cpu in enumerate(self._cpu_file):
            cpu.put("suspended", int(index in waiting))

    def _let_go(self) -> None:
        """End the threads of hold_vcpus()."""
        self._is_let_go.set()
        for thread in self._held:
            thread.join()
        self._held.clear()

    def save_kernel(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the blob of each kernel structure of the paused guest."""
        for name in KERNEL_STRUCTS:
            fields: dict[str, Any] = {}
            if name == "vhpet":
                fields = self._timer.fields()
            elif name == "vm":
                fields = {"beats": self._beats, "swept": self._swept, "wrong": self._wrong}
            elif name == "vmcx":
                fields = {"vcpus": [vcpu.registers.fields() for vcpu in self._vcpus]}
            yield name, self._clocks.save(name) + pack_blob(name, name, self._clock, fields)

    def save_device(self, device: Device) -> bytes:
        """Return a device's blob."""
        return device.save(self._clock)

    def load_kernel(self, name: str, blob: bytes) -> None:
        """Take over the blob of a kernel structure; prepare() checks the blob."""
        if name == "vmcx" and not any(blob):
            self.can_enter = False
        self._restored[name] = unpack_blob(self._clocks.load(name, blob))
        if name == "vhpet":
            self._timer.take(self._restored[name])

    def _take_state(self) -> None:
        self._clock = _CLOCK.unpack_from(self.memory.read(CLOCK_PAGE))[0]
        boot = unpack_boot(self.memory.read(BOOT_PAGE))
        if boot is None or boot.ncpus != self.ncpus or boot.npages != self.memory.npages:
            self._complaints.append(f"boot page: expected parameters found {boot}")
            boot = Boot(self.ncpus, self.memory.npages, self.ncpus, self.ncpus, 1 << 20, 1 << 20)
        self._make_vcpus(boot)
        state = self._restored
        registers = state["vmcx"].get("vcpus")
        if not isinstance(registers, list) or len(registers) != len(self._vcpus):
            self._complaints.append(
                f"registers: expected {len(self._vcpus)} vCPUs found {registers!r:.60}"
            )
            registers = [None] * len(self._vcpus)
        for vcpu, fields in zip(self._vcpus, registers, strict=True):
            vcpu.registers = read_registers(fields)
        self._beats = number(state["vm"], "beats")
        self._swept = number(state["vm"], "swept")
        self._wrong = number(state["vm"], "wrong")
        for name, fields in state.items():
            self._complaints.extend(blob_complaints(name, fields, self._clock))
        self._complaints.extend(self._timer.memory_complaints())
        for device in self.devices:
            self._complaints.extend(device.complaints(self._clock))
        self._strays = self._find_strays()

    def _find_strays(self) -> Iterator[None]:
        """Check that the pages which the guest never wrote are zero, one page for each yield."""
        known = {page for vcpu in self._vcpus for page in vcpu.plan.working + vcpu.plan.static}
        for page in self.memory.allocated():
            if page >= FIRST_PAGE and page not in known:
                found = self.memory.read(page)
                if found != ZERO:
                    self._tell(f"page {page}: expected never written found {found[:8].hex()}")
            yield

    def _make_vcpus(self, boot: Boot) -> None:
        self._unstarted = range(boot.started, boot.ncpus)
        plans = make_plans(boot)
        self._pages = sum(plan.npages for plan in plans)
        for index, plan in enumerate(plans):
            self._vcpus.append(
                Vcpu(
                    plan,
                    self.memory,
                    self._cpus,
                    index,
                    self._cpu_file[index],
                    rate=boot.rate / boot.started,
                    sweep_rate=boot.sweep_rate / boot.started,
                    tell=self._tell,
                    every_slice=None if index else self._keep_house,
                )
            )

    def _keep_house(self) -> None:
        """Advance the clock and print on the console; vCPU 0 does so between two batches."""
        self._advance_clock()
        while self._complaints:
            self._tell(self._complaints.pop(0))
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + _BEAT_S
            self._beats += 1
            self._print(f"beat {self._beats}")
        is_searched = sum(1 for _ in islice(self._strays, _STRAYS_A_SLICE)) < _STRAYS_A_SLICE
        sweeps = min(vcpu.registers.sweeps for vcpu in self._vcpus)
        if sweeps > self._swept and is_searched:
            self._swept = sweeps
            self._print(f"sweep {sweeps} pages {self._pages} wrong {self._wrong}")

    def _advance_clock(self) -> None:
        self._clock += 1
        self.memory.write(CLOCK_PAGE, _CLOCK.pack(self._clock))

    def _tell(self, complaint: str) -> None:
        with self._telling:
            self._wrong += 1
            self._told += 1
            if self._told <= _TOLD_LIMIT:
                self._print(f"WRONG {complaint}")

    def _print(self, line: str) -> None:
        if self._uart is not None:
            self._uart.write(line)
