"""A vCPU: a thread that rewrites its working set, and checks each page before that.

The vCPU's registers are the step count and the progress of the sweep over all
of its pages; they travel in the vmcx blob and are nowhere in memory.  The vCPU's
FPU is in the file of vCPUs (cpu.py), and travels in no blob.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bhystream.guest import PAGE_BYTES

from .blob import number
from .cpu import Cpu
from .gate import Gate
from .node import Memory
from .proof import X87_AT, Plan, content, describe, describe_fpu, fpu_registers

_SLICE_S = 0.005
_TRY_S = 0.001
_BATCH_PAGES = 64
# A vCPU that stood for longer catches up on this much only: a pause is not made up for.
_DEBT_S = 0.05


@dataclass
class Registers:
    """The state of a vCPU that is not in memory.

    step: pages of the working set rewritten since boot.  swept: pages, static
    and working, checked in this sweep.  sweeps: full sweeps since boot.
    """

    step: int = 0
    swept: int = 0
    sweeps: int = 0

    def fields(self) -> dict[str, int]:
        """Return the registers by name."""
        return asdict(self)


def read_registers(fields: Any) -> Registers:
    """Return the registers of a blob.  A register that is missing is 0."""
    if not isinstance(fields, dict):
        return Registers()
    return Registers(**{name: number(fields, name) for name in Registers().fields()})


class Vcpu:
    """One vCPU and its program.

    rate, sweep_rate: bytes a second that this vCPU rewrites and checks; at a rate
    of 0 it rewrites as fast as it can.  index, cpu: the vCPU's number and its
    state in vmm.  tell: prints a line about a fault.  every_slice: called
    between two batches, about every 5 ms.
    """

    def __init__(
        self,
        plan: Plan,
        memory: Memory,
        gate: Gate,
        index: int,
        cpu: Cpu,
        *,
        rate: float,
        sweep_rate: float,
        tell: Callable[[str], None],
        every_slice: Callable[[], None] | None = None,
    ) -> None:
        self.registers = Registers()
        self.plan = plan
        self._memory = memory
        self._gate = gate
        self._index = index
        self._cpu = cpu
        self._state = b""
        self._rate = rate
        self._sweep_rate = sweep_rate
        self._tell = tell
        self._every_slice = every_slice

    def boot(self) -> None:
        """Write every page of the plan for the first time."""
        for page in (*self.plan.working, *self.plan.static):
            self._memory.write(page, content(page, 0))
        self._write_fpu()

    def start(self, name: str) -> None:
        """Start the thread, which runs when the gate opens."""
        self._state = self._cpu.state()
        self._gate.join(threading.Thread(target=self._run, name=name, daemon=True))

    def _run(self) -> None:
        self._gate.rest()
        last = time.monotonic()
        steps = sweeps = 0.0
        while True:
            # As bhyve's threads do: usr.sbin/bhyve/amd64/vmexit.c, vmexit_debug().  The program
            # is busy all the time, so it makes up for nothing.
            while self._cpu.get("suspended"):
                self._gate.rest(_TRY_S)
                last = time.monotonic()
            now = time.monotonic()
            passed = min(now - last, _DEBT_S)
            last = now
            steps += passed * self._rate / PAGE_BYTES if self._rate else _BATCH_PAGES
            sweeps += passed * self._sweep_rate / PAGE_BYTES
            while steps >= 1 and not self._stands:
                steps -= 1
                self._step()
            while sweeps >= 1 and not self._stands:
                sweeps -= 1
                self._sweep()
            if self._every_slice is not None:
                self._every_slice()
            self._gate.rest(_SLICE_S if self._rate else 0.0)

    @property
    def _stands(self) -> bool:
        return self._gate.is_closed or bool(self._cpu.get("suspended"))

    def _step(self) -> None:
        self._check_cpu()
        page, generation = self.plan.at(self.registers.step)
        self._check(page, generation)
        self._memory.write(page, content(page, generation + 1))
        self.registers.step += 1
        self._write_fpu()

    def _write_fpu(self) -> None:
        for at, data in fpu_registers(self._index, self.registers.step):
            self._cpu.put_fpu(at, data)

    def _check_cpu(self) -> None:
        """Tell once if the FPU or a register is wrong; the next step writes the FPU anew."""
        step = self.registers.step
        expected = fpu_registers(self._index, step)
        if any(self._cpu.fpu(at, len(data)) != data for at, data in expected):
            found = self._cpu.fpu(X87_AT, len(expected[0][1]))
            what = describe_fpu(self._index, found, step)
            self._tell(f"fpu vcpu {self._index}: expected step {step} found {what}")
        if self._cpu.state() != self._state:
            self._state = self._cpu.state()
            self._tell(f"registers vcpu {self._index}: expected those of before the pause")

    def _sweep(self) -> None:
        registers = self.registers
        page, generation = self.plan.held(registers.swept, registers.step)
        if self._check(page, generation):
            self._memory.write(page, content(page, generation))
        registers.swept += 1
        if registers.swept == self.plan.npages:
            registers.sweeps += 1
            registers.swept = 0

    def _check(self, page: int, generation: int) -> bool:
        """Return whether a page is wrong, and tell if it is."""
        found = self._memory.read(page)
        if found == content(page, generation):
            return False
        what = describe(page, found, generation)
        self._tell(f"page {page}: expected generation {generation} found {what}")
        return True
