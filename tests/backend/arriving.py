"""A guest that arrives from one stand-in's host at another.

    with arriving() as guest:                    # at the source: rehearsed, paused, ended
        sink = guest.sink()
        guest.build(sink)                        # what the engine does up to READY: early
        sink.start()
        guest.await_unbroken()

BhyveSource makes the guest's plan, state and memory images, and the pages go
through base.Target in extents, as those of a stream do.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bhystream.backend.base import Target
from bhystream.backend.bhyve import snapshot
from bhystream.backend.bhyve.loaded import start_waiting
from bhystream.backend.bhyve.restore import Restore
from bhystream.backend.bhyve.restoredguest import RestoredGuest
from bhystream.backend.bhyve.sink import BhyveSink
from bhystream.backend.bhyve.source import BhyveSource
from bhystream.backend.bhyve.waitingrestore import WaitingRestore
from bhystream.backend.process import EndedError, Identity, await_end, identify
from bhystream.guest import PAGE_BYTES, State
from bhystream.handover import state
from bhystream.standin.node import data_extents
from standin.rig import DEADLINE_S, Console, Rig, Spec, assert_unbroken

ID = "0123456789abcdef" * 2
UUID = "11111111-2222-3333-4444-555555555555"
DATA, ZERO = 0, 1


class Arriving:
    """One guest on its way.

    head, plan, states: those of a stream.  early, image: the files of its
    memory at the rehearsal, and in the pause.  resources: the -o values, by
    word; a word with None is left out.
    """

    def __init__(self, directory: Path, here: Rig, there: Rig, spec: Spec) -> None:
        self.directory, self.here, self.there, self.spec = directory, here, there, spec
        self.base = directory / "state"
        self.staging_root = directory / "staging"
        self.staging_root.mkdir(0o700)
        os.environ["BHYRECV_STAGING"] = str(self.staging_root)
        self.guest = here.start("g", spec)
        self.early, self.image = directory / "early", directory / "image"
        self._leave()
        self.resources = self._resources()

    def _leave(self) -> None:
        """Rehearse the guest, pause it and end it; write its memory at both times into files."""
        base = self.directory / "s"
        os.environ["BHYSEND_STATE_DIR"] = str(base)
        os.environ["BHYSEND_VMM_DIR"] = str(self.here.directory)
        state.directory()
        config = self.directory / "g.conf"
        config.write_text(self._text())
        source = BhyveSource(self.here.host, "g", base, str(config), force=False)
        try:
            self.head = source.head()
            self.plan = source.prepare(ID).plan
            self._write_image(source, self.early)
            self.guest.console.await_sweeps(1)
            paused = source.pause()
            self.states = list(paused.states())
            self._write_image(source, self.image)
            paused.discard("there")
        finally:
            source.close()
        os.environ["BHYSEND_STATE_DIR"] = str(self.base)
        os.environ["BHYSEND_VMM_DIR"] = str(self.there.directory)
        state.directory()
        self.guest.await_exit()

    @staticmethod
    def _write_image(source: BhyveSource, path: Path) -> None:
        """Write the memory as it is in bhyve's snapshot, as a sparse file."""
        views, base = source.memory(), 0
        with path.open("wb") as file:
            file.truncate(sum(map(len, views)))
            for first, end in source.touched():
                at = first * PAGE_BYTES
                base = len(views[0]) if at >= len(views[0]) else 0
                view = views[1 if base else 0]
                os.pwrite(file.fileno(), view[at - base : end * PAGE_BYTES - base], at)

    def _text(self) -> str:
        """Return the configuration as an operator would write it."""
        lines = (self.here.directory / "g.config").read_text().splitlines()
        kept = [line for line in lines if "standin." not in line]
        return "\n".join([*kept, f"uuid={UUID}", "name=g", ""])

    def _resources(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {"com1": str(self.there.directory / "g.console")}
        if self.spec.has_rom:
            found["bootrom"] = str(self.there.rom)
        text = self._text()
        for index, _ in enumerate(re.findall(r"^pci\..*\.path=", text, re.M)):
            disk = self.there.directory / f"g-{index}.img"
            disk.touch()
            found[f"disk{index}"] = str(disk)
        for index, _ in enumerate(re.findall(r"^pci\..*\.backend=", text, re.M)):
            self.there.host.make_tap(f"tap{index}", "bridge0")
            found[f"net{index}"] = f"tap{index}"
        return found

    def bare(self) -> Arriving:
        """Return a copy for another process, which starts no guest and ends none."""
        found = copy.copy(self)
        found.guest, found.here, found.there = None, None, Rig.at(self.there.directory)  # type: ignore[assignment]
        return found

    # The sink.

    def sink(self, name: str = "g", *, id_: str = ID, **options: Any) -> BhyveSink:
        """Make a sink.  options: those of BhyveSink."""
        given = {word: value for word, value in self.resources.items() if value is not None}
        options = {"force": False, **options}
        return BhyveSink(self.there.host, name, given, [], self.base, id_, **options)

    def open(self, sink: BhyveSink, *, late: bool = False) -> Sequence[Target]:
        """Let the sink check the guest and open it."""
        assert sink.check(self.head) == []
        return sink.open(b"" if late else self.plan)

    def build(
        self, sink: BhyveSink, *, late: bool = False, states: Sequence[State] | None = None
    ) -> None:
        """Do what the engine does up to READY: two rounds, the second with the changed pages."""
        targets = self.open(sink, late=late)
        self.place(targets, self.early)
        self.place(targets, self.image, self.early)
        sink.load(self.states if states is None else states)

    def place(self, targets: Sequence[Target], image: Path, before: Path | None = None) -> None:
        """Place the pages of an image, or only those that differ from an earlier image."""
        base = 0
        for segment, target in zip(self.head.layout.segments, targets, strict=True):
            for first, end in self.touched(image, before, base, segment.npages):
                listed, pages = bytearray(), bytearray()
                for page in range(first, end):
                    data, old = read_page(image, page), before and read_page(before, page)
                    if data == old:
                        continue
                    is_zero = not any(data)
                    listed += struct.pack("<QII", page, 1, ZERO if is_zero else DATA)
                    pages += b"" if is_zero else data
                target.place(base, segment.npages, memoryview(listed), memoryview(pages))
            base += segment.npages

    @staticmethod
    def touched(
        image: Path, before: Path | None, base: int, npages: int
    ) -> Iterator[tuple[int, int]]:
        """Yield the extents of pages that are no hole in either of two images of the memory."""
        for path in (image, *([before] if before else [])):
            with path.open("rb") as file:
                start, end = base * PAGE_BYTES, (base + npages) * PAGE_BYTES
                for at, stop in data_extents(file.fileno(), start, end):
                    yield at // PAGE_BYTES, -(-stop // PAGE_BYTES)

    # At the destination.

    @property
    def console(self) -> Console:
        """The console at the destination."""
        return Console(self.there.directory / "g.console")

    def await_unbroken(self, sweeps: int = 1) -> None:
        """Wait until the guest has checked every page of its memory at the destination."""
        self.console.await_sweeps(sweeps)
        assert_unbroken(self.guest.console, self.console)

    def memory(self, name: str = "g") -> Path:
        """Return the node of the guest's VM; an offset in it is a guest physical address."""
        return self.there.directory / "vmm" / name

    def started(self) -> list[Path]:
        """Return the files that name a started bhyve."""
        return sorted((self.base / "loaded").glob("*.started"))

    def left(self) -> list[str]:
        """Return what is left at the destination: files, logs, VMs, processes."""
        found = [*self.staging_root.iterdir(), *(self.base / "log").iterdir()]
        if (self.base / "loaded").exists():
            found += (self.base / "loaded").iterdir()
        found += (self.there.directory / "vmm").iterdir()
        return [*map(str, found), *map(str, self.processes())]

    def processes(self) -> list[int]:
        """Return the bhyves of the destination, found by their command lines."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            is_there = str(self.staging_root) in words.decode(errors="replace")
            if is_there or str(self.base) in words.decode(errors="replace"):
                found.append(int(path.parent.name))
        return [pid for pid in found if pid != os.getpid()]


def read_page(image: Path, page: int) -> bytes:
    """Return a page of a memory image."""
    with image.open("rb") as file:
        return os.pread(file.fileno(), PAGE_BYTES, page * PAGE_BYTES)


def restored_of(guest: Arriving) -> RestoredGuest:
    """Return the record that a sink makes of the guest."""
    sink = guest.sink()
    assert sink.check(guest.head) == []
    return RestoredGuest.from_json(sink.record())


def restore_of(guest: Arriving) -> Restore:
    """Write the guest's files, with all of its memory; return a restore from them."""
    restored = restored_of(guest)
    (guest.base / "loaded").mkdir(exist_ok=True)
    restored.make_staging()
    subprocess.run(["cp", "--sparse=always", guest.image, restored.files.memory], check=True)
    restored.files.meta.write_bytes(guest.states[0].data)
    return Restore(guest.there.host, restored, restored.files)


def kern(guest: Arriving) -> bytes:
    """Return FILE.kern."""
    return b"".join(state.data for state in guest.states[1:] if not state.is_optional)


def fpu(guest: Arriving) -> list[State]:
    """Return the FPU states of its vCPUs."""
    return snapshot.fpu_states(guest.states)


def hold(guest: Arriving) -> WaitingRestore:
    """Start a restore of the guest; return it when its bhyve waits."""
    return restore_of(guest).hold(len(kern(guest)))


def process_of(one: WaitingRestore) -> Identity:
    """Return the process of a started restore."""
    assert one.started.process is not None
    return one.started.process


def is_clean(guest: Arriving) -> bool:
    """Say whether a start has left nothing but the guest's files."""
    return (
        not guest.there.host.exists("g")
        and list((guest.base / "log").iterdir()) == []
        and guest.started() == []
        and guest.processes() == []
    )


def again(guest: Arriving) -> None:
    """Start the guest once more, from the files that are left; assert that every page is right."""
    guest.there.settings(fail=[])
    restored = restored_of(guest)
    one = start_waiting(guest.there.host, restored, restored.files, len(kern(guest)))
    one.load([kern(guest)], fpu(guest))
    one.release()
    guest.await_unbroken()


@contextmanager
def arriving(spec: Spec | None = None, **settings: Any) -> Iterator[Arriving]:
    """Make two hosts and a guest on its way; afterwards end what runs on the hosts."""
    before = dict(os.environ)
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="arr", dir="/dev/shm"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        here, there = (stack.enter_context(Rig(**settings)) for _ in range(2))
        try:
            made = Arriving(directory, here, there, spec or Spec())
            stack.callback(end, made)
            yield made
        finally:
            os.environ.clear()
            os.environ.update(before)


def end(made: Arriving) -> None:
    """Kill the bhyves that a test has left waiting."""
    for pid in made.processes():
        with suppress(EndedError):
            kill(pid)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a process a signal that ends it, and return when it has ended.

    processes() cannot tell that: a dying process loses its command line before it has ended.
    """
    who = identify(pid, "bhyve")
    os.kill(pid, number)
    assert await_end(who, DEADLINE_S)
