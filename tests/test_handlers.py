"""What a handler of a signal raises is not lost, in whatever place Python calls the handler."""

from __future__ import annotations

import _thread
import importlib
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bhystream import handlers
from bhystream.errors import InputOutputError, Interrupted
from bhystream.signals import Ended, Interrupts, Signals, end_early
from support.waiting import until

NUMBERS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP, signal.SIGALRM)
Place = Callable[[int], None]

# A module that is interrupted, in turn, in its body and where Python makes another error of it.
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


@pytest.fixture(autouse=True)
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put everything back, once no signal is on its way any more."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    found = {number: signal.getsignal(number) for number in NUMBERS}
    threads = _thread._count()
    yield
    until(lambda: _thread._count() == threads, "the signals that were put off")
    for number, handler in found.items():
        signal.signal(number, handler)


def in_callback(number: int) -> None:
    """Get a signal in the callback of a weak reference, from which Python raises nothing."""

    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert reference() is None


def in_finalizer(number: int) -> None:
    """Get a signal in a finalizer, from which Python raises nothing."""

    class Thing:
        def __del__(self) -> None:
            signal.raise_signal(number)

    Thing()


def in_import(text: str) -> Place:
    """Return what gets a signal while it imports a module of this text."""

    def place(number: int) -> None:
        name = f"interrupted_{time.monotonic_ns()}"
        Path(sys.path[0], f"{name}.py").write_text(text.format(number=int(number)))
        importlib.invalidate_caches()
        assert importlib.import_module(name).is_whole

    return place


@pytest.fixture(
    params=[in_callback, in_finalizer, in_import(BODY), in_import(CLASS)],
    ids=["callback", "finalizer", "module", "class"],
)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.syspath_prepend(tmp_path)
    found: Place = request.param
    return found


def wait() -> None:
    """Do something that only a signal ends."""
    time.sleep(20)
    pytest.fail("the signal was lost")


@pytest.mark.parametrize("is_early", [True, False], ids=["early", "late"])
def test_a_program_that_may_be_ended_ends(is_early: bool, place: Place) -> None:
    if is_early:
        end_early("why")
    else:
        Interrupts("why")
    with pytest.raises(Ended, match="interrupted by SIGTERM") as caught:
        place(signal.SIGTERM)
        wait()
    assert caught.value.hint == "why"
    signal.raise_signal(signal.SIGINT)  # and the next ones do nothing, as ever


def test_a_block_is_interrupted(place: Place) -> None:
    with pytest.raises(Interrupted, match="interrupted by SIGINT"), Signals().interruptible():
        place(signal.SIGINT)
        wait()


def test_what_is_deferred_meanwhile_raises_later(place: Place) -> None:
    signals, done = Signals(), []
    with pytest.raises(Interrupted), signals.interruptible():
        place(signal.SIGINT)
        with signals.deferred():
            time.sleep(3 * handlers._LATER_S)
            done.append("the part")
    assert done == ["the part"]


def test_what_comes_after_the_block_waits_for_the_next(place: Place) -> None:
    signals = Signals()
    with signals.interruptible():
        pass
    place(signal.SIGINT)
    time.sleep(3 * handlers._LATER_S)
    with pytest.raises(Interrupted), signals.interruptible():
        pass


def give_up() -> float:
    raise InputOutputError("given up")


def tell() -> None:
    give_up()


@pytest.mark.parametrize("name", ["watching", "until", "ticking"])
def test_a_limit_of_time_is_kept(name: str, place: Place) -> None:
    signals = Signals()
    limits: dict[str, AbstractContextManager[None]] = {
        "watching": signals.watching(lambda: 0, 1000),
        "until": signals.until(time.monotonic() + 1000, give_up),
        "ticking": signals.ticking(tell, 1000),
    }
    with pytest.raises(InputOutputError), limits[name]:
        place(signal.SIGALRM)
        wait()


def test_a_second_signal_meanwhile_is_not_lost_either() -> None:
    """It comes while the first one is being put off: what it raised would be dropped too."""
    called: list[int] = []

    def handle(number: int) -> None:
        called.append(number)
        if called == [signal.SIGINT]:
            raise Interrupted("dropped")

    handlers.install(signal.SIGINT, handle, lambda: signal.raise_signal(signal.SIGTERM))
    handlers.install(signal.SIGTERM, handle)
    in_callback(signal.SIGINT)
    assert called == [signal.SIGINT]
    until(lambda: len(called) > 2, "both signals")
    assert sorted(called[1:]) == [signal.SIGINT, signal.SIGTERM]


def test_an_exception_of_another_is_reported_by_python(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handlers.install(signal.SIGINT, lambda number: None)

    class Thing:
        def __del__(self) -> None:
            raise ValueError("of a finalizer")

    Thing()
    said = capsys.readouterr().err
    assert "Exception ignored in" in said
    assert "ValueError: of a finalizer" in said


def test_a_handler_that_raises_nothing_is_called_once(place: Place) -> None:
    called: list[int] = []
    handlers.install(signal.SIGINT, called.append)
    place(signal.SIGINT)
    until(lambda: called, "the signal")
    time.sleep(3 * handlers._LATER_S)
    assert called == [signal.SIGINT]
