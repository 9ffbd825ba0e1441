"""What earlier moves have taught: notes that make a prediction better, and never stop a move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bhystream.send.experience import Experience, Like


def test_a_part_takes_what_it_took_before(tmp_path: Path) -> None:
    first = Experience(tmp_path)
    assert first.noted("state") is None and first.factor("state") == 1.0
    first.learn("state", 10, 25)
    first.save()
    second = Experience(tmp_path)
    assert second.noted("state") == second.factor("state") == 2.5
    assert second.noted("answers") is None


def test_one_busy_moment_spoils_nothing(tmp_path: Path) -> None:
    made = Experience(tmp_path)
    for taken in (20, 20, 300):
        made.learn("state", 10, taken)
    assert made.factor("state") == 2.0


def test_a_change_that_lasts_is_learned_in_three_moves(tmp_path: Path) -> None:
    made = Experience(tmp_path)
    for taken in (10, 10, 10, 10, 10, 40, 40, 40):
        made.learn("state", 10, taken)
    assert made.factor("state") == 4.0


def test_notes_of_any_size_do_not_stop_a_move(tmp_path: Path) -> None:
    (tmp_path / "experience.json").write_text(f'{{"state": [1{"0" * 400}, 1e999, NaN]}}')
    assert Experience(tmp_path).factor("state") == 50.0


@pytest.mark.parametrize(("estimate", "taken"), [(0, 5), (5, 0), (-1, 5)])
def test_nothing_is_learned_from_what_was_no_estimate(
    tmp_path: Path, estimate: int, taken: int
) -> None:
    made = Experience(tmp_path)
    made.learn("state", estimate, taken)
    assert made.noted("state") is None


def test_a_factor_has_bounds(tmp_path: Path) -> None:
    made = Experience(tmp_path)
    made.learn("long", 1, 10**12)
    made.learn("short", 10**12, 1)
    assert (made.factor("long"), made.factor("short")) == (50.0, 0.02)
    assert (made.noted("long"), made.noted("short")) == (1e6, 1e-6)


def test_other_notes_will_do_until_there_is_one(tmp_path: Path) -> None:
    made, like = Experience(tmp_path), Like("other", 1.5)
    assert made.noted("state", like) is None and made.factor("state", like) == 1.0
    made.learn("other", 10, 30)
    assert made.noted("state", like) == made.factor("state", like) == 4.5
    assert made.noted("state") is None
    made.learn("state", 10, 20)
    assert made.noted("state", like) == made.factor("state", like) == 2.0


def test_the_oldest_parts_are_dropped(tmp_path: Path) -> None:
    made = Experience(tmp_path)
    for number in range(100):
        made.learn("stays", 1, 2)
        made.learn(f"part {number}", 1, 2)
    made.save()
    noted = json.loads((tmp_path / "experience.json").read_bytes())
    assert len(noted) == 64
    assert "stays" in noted and "part 99" in noted and "part 1" not in noted


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"17",
        b"[" * 100_000,
        b'{"state": 3}',
        b'{"state": ["x", null, {}]}',
        b'{"state": [NaN]}',
    ],
)
def test_a_broken_file_is_no_experience(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "experience.json").write_bytes(text)
    made = Experience(tmp_path)
    assert made.noted("state") is None and made.factor("state") == 1.0
    made.learn("state", 1, 3)
    made.save()
    assert Experience(tmp_path).factor("state") == 3.0


def test_absurd_notes_are_bounded(tmp_path: Path) -> None:
    # A number of 401 digits is no float.
    notes = f'{{"a": [1e300], "b": [-5], "c": [2, 2, "x", 2], "d": [{10**400}], "e": [Infinity]}}'
    (tmp_path / "experience.json").write_text(notes)
    made = Experience(tmp_path)
    assert [made.factor(part) for part in "abcde"] == [50.0, 0.02, 2.0, 50.0, 50.0]


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    made = Experience(tmp_path / "missing")
    made.learn("state", 1, 3)
    made.save()
    assert not (tmp_path / "missing").exists()
