"""The prediction of the pause: an estimate of each part, corrected by experience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bhystream.guest import Fixed
from bhystream.send import hostload, strides
from bhystream.send.precopy import Outlook
from bhystream.send.prediction import Prediction
from bhystream.send.stopwatch import Parts

GIB, MS = 1 << 30, 1_000_000
VIEW = Outlook(last_pages=7, copy_ns=300, scan_ns=80)


@pytest.fixture(autouse=True)
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has CPUs for all threads: one more than the guest has vCPUs."""
    monkeypatch.setattr(strides, "_cpus", lambda: 64)


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing says that the host is busy."""
    monkeypatch.setattr(hostload, "SCHEDSTAT", tmp_path / "schedstat")


def predicting(base: Path, *, vcpus: int = 1, **given: Any) -> Prediction:
    """Return the prediction of a move to "hv2" by two threads."""
    usual = {"kind": "qemu", "where": "hv2", "is_early": True, "hook": None, "memory_bytes": GIB}
    wanted = {**usual, **given}
    return Prediction(lambda: Fixed(1000, 2000, vcpus), base, **wanted)


def test_without_experience_the_parts_are_the_estimates(tmp_path: Path) -> None:
    # The scan by two threads; two trips, for END and GO.
    assert predicting(tmp_path).parts(VIEW, 50) == Parts(1000, 340, 0, 2100)
    assert predicting(tmp_path, where="").parts(VIEW, 50) == Parts(1000, 340, 0, 0)
    assert Parts(1, 2, 4, 8).total_ns == 15


def test_verify_is_one_more_scan_by_one_thread(tmp_path: Path) -> None:
    assert predicting(tmp_path, is_verified=True).parts(VIEW, 50) == Parts(1000, 420, 0, 2100)
    found = predicting(tmp_path, is_verified=True).foretell(80, 50)
    assert [each.time_ns for each in found if each.part == "scan"] == [120]


def test_a_verified_move_teaches_nothing_about_another(tmp_path: Path) -> None:
    made = predicting(tmp_path, is_verified=True)
    made.parts(VIEW, 50)
    made.learn(Parts(1000, 840, 0, 4200))
    known = predicting(tmp_path, is_verified=True).parts(VIEW, 50)
    assert known == Parts(1000, 840, 0, 4200)
    assert predicting(tmp_path).parts(VIEW, 50) == Parts(1000, 340, 0, 2100)


def test_each_part_is_corrected_by_its_own_experience(tmp_path: Path) -> None:
    made = predicting(tmp_path)
    made.parts(VIEW, 50)
    made.learn(Parts(3000, 680, 0, 1050))
    assert predicting(tmp_path).parts(VIEW, 50) == Parts(3000, 680, 0, 1050)
    # Half of the scan and of the copy: the last pages change with their measurements.
    half = Outlook(last_pages=7, copy_ns=150, scan_ns=40)
    assert predicting(tmp_path).parts(half, 50).last_ns == 340


def answers_ns(base: Path, trip_ms: int, taken_ms: int = 0) -> int:
    """Return how long the answers of a move shall take, which then take some time."""
    made = predicting(base)
    found = made.parts(VIEW, trip_ms * MS).answers_ns
    foretold = predicting(base).foretell(80, trip_ms * MS)[2]
    assert foretold.time_ns == found
    if taken_ms:
        made.learn(Parts(1000, 340, 0, taken_ms * MS))
    return found


def test_answers_take_what_they_took_and_a_long_way(tmp_path: Path) -> None:
    assert answers_ns(tmp_path, 5, taken_ms=30) == 10 * MS + 2000
    # A trip within a site is a part of what the answers took.
    assert answers_ns(tmp_path, 1) == answers_ns(tmp_path, 10) == 30 * MS
    # A longer one, or a filter that holds much back, comes on top, and does not stay.
    assert answers_ns(tmp_path, 710, taken_ms=1430) == 1430 * MS
    assert answers_ns(tmp_path, 1) == 30 * MS


@pytest.mark.parametrize("given", [{"is_early": False}, {"is_verified": True}])
def test_answers_that_wait_for_the_memory_depend_on_its_size(
    given: dict[str, bool], tmp_path: Path
) -> None:
    made = predicting(tmp_path, memory_bytes=GIB, **given)
    made.parts(VIEW, 50)
    made.learn(Parts(1000, 340, 0, 9000))
    answers = {
        gib: predicting(tmp_path, memory_bytes=gib * GIB, **given).parts(VIEW, 50).answers_ns
        for gib in (1, 2, 64)
    }
    assert answers == {1: 9000, 2: 2100, 64: 2100}


LOADS = {False: b"1000000000 299000000 7\n", True: b"1000000000 301000000 7\n"}


def test_a_busy_host_has_notes_of_its_own(tmp_path: Path) -> None:
    def move(*, busy: bool, taken: Parts) -> tuple[Parts, list[int]]:
        hostload.SCHEDSTAT.write_bytes(LOADS[busy])
        told = [each.time_ns for each in predicting(tmp_path).foretell(80, 50)]
        made = predicting(tmp_path)
        found = made.parts(VIEW, 50)
        made.learn(taken)
        return found, told

    idle, busy = Parts(3000, 680, 0, 1050), Parts(5000, 1360, 0, 9000)
    move(busy=False, taken=idle)
    # The notes of an idle host will do until there is one of a busy host.
    assert move(busy=True, taken=busy) == (Parts(4800, 1088, 0, 1680), [4800, 128, 1680])
    for _ in range(2):
        assert move(busy=False, taken=idle) == (idle, [3000, 80, 1050])
        assert move(busy=True, taken=busy) == (busy, [5000, 160, 9000])


def test_what_one_kind_of_move_teaches_says_nothing_about_another(tmp_path: Path) -> None:
    made = predicting(tmp_path)
    made.parts(VIEW, 50)
    made.learn(Parts(3000, 680, 0, 4200))
    assert predicting(tmp_path, kind="bhyve").parts(VIEW, 50) == Parts(1000, 340, 0, 2100)
    assert predicting(tmp_path, where="hv3").parts(VIEW, 50) == Parts(3000, 680, 0, 2100)
    assert predicting(tmp_path, is_early=False).parts(VIEW, 50) == Parts(3000, 680, 0, 2100)
    assert predicting(tmp_path, vcpus=0).parts(VIEW, 50) == Parts(3000, 380, 0, 4200)


def test_the_last_of_several_predictions_is_the_one_that_teaches(tmp_path: Path) -> None:
    made = predicting(tmp_path)
    made.parts(Outlook(7, 10**9, 10**9), 10**9)
    made.parts(VIEW, 50)
    made.learn(Parts(1000, 340, 0, 2100))
    assert predicting(tmp_path).parts(VIEW, 50) == Parts(1000, 340, 0, 2100)


def test_a_hook_is_known_from_its_second_run_on(tmp_path: Path) -> None:
    hook = "zfs send -i with a secret"
    made = predicting(tmp_path, hook=hook)
    assert made.parts(VIEW, 50).hook_ns == 0
    made.learn(Parts(1000, 340, 5_000_000_000, 2100))
    known = predicting(tmp_path, hook=hook).parts(VIEW, 50)
    # The command runs beside the last pages, and the pause waits for the rest of it.
    assert known.last_ns + known.hook_ns == 5_000_000_000
    made = predicting(tmp_path, hook="another")
    made.learn(Parts(0, 340, 600_000_000_000, 0))  # ten minutes, which no estimate bounds
    slow = predicting(tmp_path, hook="another").parts(VIEW, 50)
    assert slow.last_ns + slow.hook_ns == 600_000_000_000
    assert predicting(tmp_path, hook="a third").parts(VIEW, 50).hook_ns == 0
    assert predicting(tmp_path).parts(VIEW, 50).hook_ns == 0
    assert "secret" not in (tmp_path / "experience.json").read_text()


def test_a_move_without_live_rounds_teaches_nothing(tmp_path: Path) -> None:
    predicting(tmp_path).learn(Parts(3000, 680, 0, 1050))
    assert predicting(tmp_path).parts(VIEW, 50) == Parts(1000, 340, 0, 2100)
