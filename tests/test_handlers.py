"""What a handler of a signal raises is not lost, in whatever place Python calls the handler."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bhystream import handlers
from bhystream import signals as module
from bhystream.errors import GuestError, InputOutputError, Interrupted
from bhystream.signals import Interrupts, Signals, deliver, end_early
from bhystream.units import NS
from support.clock import Clock
from support.ending import ended

Place = Callable[[int], None]
LOST: list[str] = []

# A module that is interrupted in its body, and one where Python may make another error of it.
BODY = "import signal\nsignal.raise_signal({number})\nis_whole = True\n"
CLASS = """
import signal
class Named:
    def __set_name__(self, owner, name):
        signal.raise_signal({number})
class Owner:
    name = Named()
is_whole = True
"""
# A module that waits for what never comes.
HANGS = "import os, signal\nsignal.raise_signal({number})\nos.read({fd}, 1)\n"


@pytest.fixture(autouse=True)
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep quiet about what Python drops; import from tmp_path."""
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    monkeypatch.syspath_prepend(tmp_path)
    LOST.clear()


class Raising:
    """Gets a signal when it goes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def in_callback(number: int) -> None:
    """Get a signal in the callback of a weak reference, where Python prints what is raised."""

    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert reference() is None


def in_finalizer(number: int) -> None:
    """Get a signal in a finalizer, where Python prints what is raised."""
    Raising(number)


def in_silence(number: int) -> None:
    """Get a signal in code that forgets what is raised, as some of Python's own code does."""
    with contextlib.suppress(BaseException):
        signal.raise_signal(number)


def import_module(text: str, number: int) -> None:
    name = f"interrupted_{time.monotonic_ns()}"
    Path(sys.path[0], f"{name}.py").write_text(text.format(number=int(number)))
    importlib.invalidate_caches()
    assert importlib.import_module(name).is_whole


def in_module(number: int) -> None:
    """Get a signal while a module is imported."""
    import_module(BODY, number)


def in_class(number: int) -> None:
    """Get a signal in C code that makes another error of what is raised."""
    import_module(CLASS, number)


@pytest.fixture(params=[in_callback, in_finalizer, in_silence, in_module, in_class])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.param
    return found


def wait() -> None:
    """Do something that only a signal ends."""
    time.sleep(20)
    LOST.append("the signal")  # an error that is raised here might give way to the signal's


@contextlib.contextmanager
def raised(kind: type[BaseException], match: str | None = None) -> Iterator[None]:
    """Assert that the block raises, and that no wait() in it has lasted."""
    with pytest.raises(kind, match=match):
        yield
    assert not LOST


def start(is_early: bool) -> None:
    if is_early:
        end_early("why")
    else:
        Interrupts("why")


@pytest.mark.parametrize("is_early", [True, False])
def test_a_program_that_may_be_ended_ends(is_early: bool, place: Place) -> None:
    start(is_early)
    with ended(signal.SIGTERM) as errors:
        place(signal.SIGTERM)
        wait()
    signal.raise_signal(signal.SIGINT)  # and the next ones do nothing, as ever
    assert errors[0].hint == "why"
    signal.raise_signal(signal.SIGALRM)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "step", [deliver, Signals, Interrupts, lambda: Interrupts().ignore(lambda name: None)]
)
def test_an_early_signal_is_raised_before_the_next_step(
    step: Callable[[], object], place: Place
) -> None:
    start(is_early=True)
    with ended(signal.SIGTERM):
        place(signal.SIGTERM)
        step()


def test_what_cleans_up_is_left_alone(place: Place) -> None:
    """The signal is on its way, and not lost."""
    start(is_early=True)
    cleaned = False
    with ended(signal.SIGTERM):
        try:
            place(signal.SIGTERM)
            wait()
        finally:
            with contextlib.suppress(ValueError):
                raise ValueError
            time.sleep(3 * handlers.SOON_S)
            signal.raise_signal(signal.SIGALRM)
            cleaned = True
    assert cleaned


def test_what_catches_it_goes_on(place: Place) -> None:
    start(is_early=False)
    with ended(signal.SIGTERM):
        place(signal.SIGTERM)
        wait()
    time.sleep(3 * handlers.SOON_S)
    signal.raise_signal(signal.SIGALRM)


def test_a_block_is_interrupted(place: Place) -> None:
    with raised(Interrupted, match="interrupted by SIGINT"), Signals().interruptible():
        place(signal.SIGINT)
        wait()


def test_a_block_that_ends_first_is_interrupted_at_its_end(place: Place) -> None:
    signals = Signals()
    with signals.interruptible():
        with raised(Interrupted), signals.interruptible():
            place(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # after an exception nothing raises any more


def test_in_a_deferred_part_it_waits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOON_S", 1000)  # not before the deferred part begins
    monkeypatch.setattr(module, "_TICK_S", 2)
    signals = Signals()
    done: list[str] = []
    with raised(Interrupted), signals.interruptible():
        place(signal.SIGINT)
        with signals.deferred():
            signal.raise_signal(signal.SIGALRM)
            done.append("the part")
        wait()
    assert done == ["the part"]


def test_after_the_block_it_waits_for_the_next(place: Place) -> None:
    signals = Signals()
    with signals.interruptible():
        pass
    place(signal.SIGINT)
    signal.raise_signal(signal.SIGALRM)
    with raised(Interrupted), signals.interruptible():
        LOST.append("the signal")


def test_after_the_block_it_can_be_forgotten(place: Place) -> None:
    signals = Signals()
    place(signal.SIGINT)
    signals.forget()
    with signals.interruptible():
        signal.raise_signal(signal.SIGALRM)


def test_what_cleans_up_in_a_block_is_left_alone(place: Place) -> None:
    signals = Signals()
    cleaned = False
    with raised(Interrupted), signals.interruptible():
        try:
            place(signal.SIGINT)
            wait()
        finally:
            signal.raise_signal(signal.SIGALRM)
            with signals.interruptible():
                signal.raise_signal(signal.SIGALRM)
            with signals.deferred():
                pass
            signal.raise_signal(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_an_error_of_ours_that_comes_of_it_stays() -> None:
    with raised(GuestError, match="has ended"), Signals().interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise GuestError("it has ended meanwhile")


def test_an_error_that_python_makes_of_it_does_not() -> None:
    with raised(Interrupted), Signals().interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise RuntimeError("Error calling __set_name__")


def give_up() -> float:
    raise InputOutputError("given up")


@pytest.mark.parametrize("place", [in_callback, in_finalizer, in_silence, in_module])
@pytest.mark.parametrize("name", ["watching", "until"])
def test_a_limit_of_time_is_kept(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    signals = Signals()
    limits: dict[str, AbstractContextManager[None]] = {
        "watching": signals.watching(lambda: 0, 1),
        "until": signals.until(1000, give_up),
    }
    with raised(InputOutputError), limits[name]:
        clock.now_ns = 1000 * NS
        place(signal.SIGALRM)
        wait()


@pytest.mark.parametrize("is_early", [True, False])
def test_an_import_that_never_ends_is_interrupted(is_early: bool) -> None:
    theirs, ours = os.pipe()
    Path(sys.path[0], "hangs.py").write_text(HANGS.format(number=int(signal.SIGTERM), fd=theirs))
    importlib.invalidate_caches()
    end = threading.Timer(20, os.write, (ours, b"the signal was lost"))
    end.start()
    try:
        if is_early:
            end_early("")
            with ended(signal.SIGTERM):
                importlib.import_module("hangs")
        else:
            with raised(Interrupted), Signals().interruptible():
                importlib.import_module("hangs")
                LOST.append("the signal")
    finally:
        end.cancel()
        end.join()
        os.close(theirs)
        os.close(ours)


def test_an_import_is_not_taken_for_one_that_hung_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(handlers, "time", clock)
    imports = handlers.Imports()
    found: list[bool] = []

    def look(*_: object) -> None:
        found.append(imports.is_in(sys._getframe()))

    signal.signal(signal.SIGTERM, look)
    for seconds in (0, 0.1, 10, 0.1):
        clock.now_ns += round(seconds * NS)
        in_module(signal.SIGTERM)
    for _ in range(10):
        clock.now_ns += NS // 10
        in_module(signal.SIGTERM)
    assert found == [True] * 12 + [False] * 2


def test_exceptions_that_follow_each_other_in_a_circle_are_no_trap() -> None:
    first, second, other = ValueError("a"), ValueError("b"), ValueError("c")
    first.__context__, second.__context__ = second, first
    try:
        raise first
    except ValueError:
        assert handlers.is_handled(second)
        assert not handlers.is_handled(other)
