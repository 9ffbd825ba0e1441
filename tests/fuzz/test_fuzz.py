"""Each target for a second or two, after its corpus; and the proof that a failure is found."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import planted, targets
from fuzz.runner import CORPUS, Fuzzer, corpus_of, main
from fuzz.target import Target

SECONDS = 1
PLANTED = {each.name: each for each in planted.TARGETS}

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="atheris is not made for it"
)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with Fuzzer("fuzz.targets", tmp_path_factory.mktemp("fuzz")) as made:
        yield made


@pytest.fixture(scope="module")
def planter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with Fuzzer("fuzz.planted", tmp_path_factory.mktemp("planted")) as made:
        yield made


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda each: each.name)
def test_any_bytes_are_taken_or_refused(target: Target, fuzzer: Fuzzer) -> None:
    result = fuzzer.fuzz(target, f"-max_total_time={SECONDS}")
    print(result)
    assert result.status == 0, result.log
    assert result.branches > 20
    assert result.tried > len(list(corpus_of(target).iterdir()))


def test_the_corpus_is_of_these_targets_and_small() -> None:
    longest = {corpus_of(each): each.longest for each in targets.TARGETS}
    assert set(CORPUS.iterdir()) == set(longest)
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200 << 10
    assert all(path.stat().st_size <= longest[path.parent] for path in files)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("crash", "IndexError: index out of range"),
        ("internal", "InternalError: a fault of the program's own"),
        ("memory", "MemoryError"),
        ("property", "Failure: it does not hold"),
    ],
)
def test_a_planted_bug_is_found(name: str, said: str, planter: Fuzzer) -> None:
    result = planter.fuzz(PLANTED[name], "-runs=1000000")
    assert result.status != 0 and said in result.log, result.log
    assert Path(result.saved).parent == planter.directory
    with pytest.raises(Exception) as caught:
        PLANTED[name].run(Path(result.saved).read_bytes())
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(said)


def test_a_hang_is_found(planter: Fuzzer) -> None:
    result = planter.fuzz(PLANTED["hang"], "-runs=10", seconds=1)
    assert result.status != 0 and "libFuzzer: timeout" in result.log, result.log


def test_the_run_ends_with_1_if_a_target_fails(capfd: pytest.CaptureFixture[str]) -> None:
    table = ["--table", "fuzz.planted", "--runs", "9"]
    assert main([*table, "sound"]) == 0
    assert main([*table, "property", "sound"]) == 1
    said = capfd.readouterr().out
    assert "FAILED" in said and "alone: python -m fuzz.fuzzed fuzz.planted property" in said
    with pytest.raises(SystemExit):
        main([*table, "nothing"])
