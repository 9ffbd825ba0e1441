"""A pause of BhyveSource that fails, and the FPU, which the pause stores: what is left then."""

from __future__ import annotations

import mmap
import signal

import pytest

from bhystream.backend.bhyve import carriable, fpu, paused
from bhystream.backend.bhyve.checkpoint import UnansweredError, settle
from bhystream.backend.bhyve.journal import Journal
from bhystream.backend.bhyve.lent import NotPutBackError
from bhystream.backend.bhyve.source import BhyveSource
from bhystream.errors import GuestEndedError, GuestError
from bhystream.guest import State

from .bhyve_rig import ID, Two
from .revived import open_paused


def refused(two: Two, made: BhyveSource, what: type[Exception], words: str) -> Exception:
    """Assert that the pause fails, and that the guest runs on by itself."""
    with pytest.raises(what, match=words) as caught:
        made.pause()
    made.close()
    two.assert_runs_on()
    return caught.value


# A pause that fails.


def test_a_state_that_has_grown_is_refused_and_said(two: Two, sink: str) -> None:
    two.start()
    made, _ = two.prepared()
    two.here.settings(fail=["hold-grow"])
    error = refused(two, made, GuestError, r"not what it was at the rehearsal: dev/\S+ has \d+")
    assert "bytes, not" in str(error)


def test_a_checkpoint_that_fails_while_it_seems_held_is_refused(two: Two, sink: str) -> None:
    """After such a failure the FIFO is full, and the guest runs."""
    two.start()
    made, record = two.prepared()
    two.here.settings(fail=["hold-fail"])
    words = "saved it at the rehearsal, but not now|refused: failed to snapshot: No space"
    refused(two, made, GuestError, words)
    open_paused(record).resume()
    two.assert_runs_on()


def test_the_vcpus_tell_a_failed_checkpoint_from_a_hold(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if FILE.kern has its whole size."""
    two.start()
    made, _ = two.prepared()
    monkeypatch.setattr(paused.BhyvePaused, "_vcpus_stand", lambda self: False)
    monkeypatch.setattr(paused.BhyvePaused, "_is_lost", lambda self: False)
    with pytest.raises(GuestError, match="but not now"):
        made.pause()
    made.close()
    monkeypatch.undo()
    two.assert_runs_on()


@pytest.mark.parametrize("fail", ["hold-die", "held-die"])
def test_a_bhyve_that_dies_in_the_pause_is_a_guest_that_has_ended(two: Two, fail: str) -> None:
    guest = two.start()
    made, record = two.prepared()
    two.here.settings(fail=[fail])
    with pytest.raises(GuestEndedError, match="has ended"):
        paused = made.pause()
        guest.await_exit()  # bhyve may die a moment after the pause
        paused.require_paused()
    made.close()
    assert guest.await_exit() == -signal.SIGKILL
    with pytest.raises(GuestEndedError):
        open_paused(record).resume()
    assert two.held() == []


def test_a_bhyve_that_drops_the_descriptor_ends_with_our_end_of_it(two: Two) -> None:
    """The descriptor is needed: without it, only our process reads bhyve's FIFO."""
    guest = two.start()
    made, _ = two.prepared()
    two.here.settings(fail=["no-anchor"])
    with pytest.raises(GuestEndedError):
        paused = made.pause()
        guest.await_exit()
        paused.require_paused()
    made.close()
    assert guest.await_exit() == -signal.SIGPIPE


def test_a_pause_without_an_answer_is_given_up_and_the_guest_runs_on(
    two: Two, sink: str, impatient: None
) -> None:
    two.start()
    made, _ = two.prepared()
    two.here.settings(fail=["hang"])
    refused(two, made, UnansweredError, "has not answered for")


def test_a_request_that_was_given_up_never_holds_the_guest_later(
    two: Two, sink: str, impatient: None
) -> None:
    guest = two.start()
    made, _ = two.prepared()
    with two.here.connect("g"):  # bhyve serves this connection first, and waits for its request
        with pytest.raises(UnansweredError):
            made.pause()
        made.close()
        assert two.held() == []
    assert settle(two.here.host.run_dir, "g", "guest g", 20.0)
    assert "Failed to open kernel data snapshot file." in guest.stderr()
    two.assert_runs_on()


def test_a_bhyve_that_hangs_in_the_pause_stands_and_is_the_operator_s(
    two: Two, impatient: None
) -> None:
    guest = two.start()
    made, record = two.prepared()
    two.here.settings(fail=["hold-hang"])
    with pytest.raises(UnansweredError):
        made.pause()
    made.close()
    assert two.held() == [ID]  # bhyve may still come to its last write
    guest.kill()
    open_paused(record).discard("")
    assert two.held() == []


def test_a_guest_that_was_started_anew_is_not_paused_with_the_memory_of_the_old(
    two: Two,
) -> None:
    guest = two.start()
    made, record = two.prepared()
    guest.power_off()
    again = two.start()
    with pytest.raises(GuestEndedError, match="another guest has its name now"):
        made.pause()
    made.close()
    with pytest.raises(GuestEndedError):
        open_paused(record).resume()
    again.console.await_sweeps(1)
    two.assert_runs_on()


def test_a_guest_that_powers_off_before_the_pause_is_gone(two: Two) -> None:
    guest = two.start()
    made, record = two.prepared()
    guest.power_off()
    with pytest.raises(GuestEndedError, match="its bhyve has ended meanwhile"):
        made.pause()
    made.close()
    with pytest.raises(GuestEndedError):
        open_paused(record).resume()
    assert two.held() == []


# The FPU.


def with_fpu(patch: pytest.MonkeyPatch, raises: BaseException | None = None) -> None:
    """Let fpu.save() return the registers of one vCPU, or raise."""

    def save(vm: object, memory: mmap.mmap, ncpus: int, journal: Journal) -> fpu.Saved:
        assert len(memory) == 64 << 20 and ncpus == 2
        if raises:
            raise raises
        return fpu.Saved((FPU_0,), ("vCPU 1 is not carried",))

    patch.setattr(carriable, "carriable", lambda vm, ncpus: [f"fpu: of {ncpus}"])
    patch.setattr(fpu, "save", save)


FPU_0 = State("fpu/0", b"x", is_optional=True)


def test_the_fpu_s_states_follow_all_others_but_the_clock_s_and_its_reasons_are_told(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fpu(monkeypatch)
    two.start()
    made, _ = two.prepared()
    assert "fpu: of 2" in made.warnings()
    paused = made.pause()
    *_, last, clock = paused.states()
    assert (last, clock.name, clock.is_optional) == (FPU_0, "clock", True)
    assert paused.reasons == ["vCPU 1 is not carried"]
    paused.resume()
    made.close()
    two.assert_runs_on()


def test_an_fpu_that_cannot_be_stored_is_no_failure_of_the_move(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fpu(monkeypatch, GuestError("cannot run it"))
    two.start()
    made, _ = two.prepared()
    paused = made.pause()
    assert paused.reasons == ["fpu: cannot run it"]
    paused.require_paused()
    paused.resume()
    made.close()
    two.assert_runs_on()


def test_a_guest_whose_registers_were_not_put_back_is_not_let_go(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fpu(monkeypatch, NotPutBackError("vCPU 0: its registers are not what they were"))
    guest = two.start()
    made, record = two.prepared()
    (two.base / "held" / ID / "journal").touch()
    with pytest.raises(GuestError, match="vCPU 0: its registers are not"):
        made.pause()
    made.close()
    found = open_paused(record)
    assert found.stands()
    with pytest.raises(GuestError, match="were not put back"):
        found.resume()
    found.discard("")
    assert guest.await_exit() == -signal.SIGKILL


def test_an_interrupt_while_the_fpu_is_stored_lets_the_guest_go(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fpu(monkeypatch, KeyboardInterrupt())
    two.start()
    made, _ = two.prepared()
    with pytest.raises(KeyboardInterrupt):
        made.pause()
    made.close()
    two.assert_runs_on()
