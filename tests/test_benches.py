"""Every bench runs, in its shortest form, and prints its figures, which have no limits here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from backend.bhyve_rig import require_sink

BENCHES = Path(__file__).with_name("bench")
DEADLINE_S = 240


def printed(name: str, *words: str) -> str:
    """Run a bench; return its output."""
    path = os.pathsep.join([str(BENCHES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(BENCHES / name), *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_bench_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert [
        path.name for path in BENCHES.glob("bench_*.py") if f'printed("{path.name}"' not in text
    ] == []


def test_the_loops_are_measured() -> None:
    said = printed("bench_kernels.py", "1", "1")
    assert "check + scatter" in said


@pytest.mark.standin
def test_everything_is_measured_side_by_side(tmp_path: Path) -> None:
    require_sink()
    picture = tmp_path / "ratios.svg"
    said = json.loads(printed("run", "--quick", "--json", "--picture", str(picture)))
    rows = {row["name"]: row for row in said["rows"]}
    for way in ("paused, warm", "copied, warm", "paused, cold", "copied, cold"):
        assert f"{way}: against the bare loop" in rows
        assert {f"{way}: CPU s/GB, send", f"{way}: CPU s/GB, receive"} <= rows.keys()
    for name, row in rows.items():
        assert row["ratio"] > 0 and min(row["runs"]) <= row["ratio"] <= max(row["runs"]), name
        assert row["met"] is None or isinstance(row["met"], bool)
    drawn = ElementTree.parse(picture).getroot()
    texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert rows.keys() <= texts


@pytest.mark.standin
def test_the_pause_is_measured() -> None:
    require_sink()
    said = printed("bench_pause.py", "1").splitlines()
    names = [line.partition(":")[0] for line in said if "ratio" in line]
    assert names == ["paused", "state", "last pages", "answers"]


@pytest.mark.guest
def test_the_downtime_is_measured() -> None:
    said = printed("bench_downtime.py", "1").splitlines()
    names = [line.partition(":")[0] for line in said if "median" in line]
    assert names == ["plain, pipe", "plain, ssh", "answered, pipe", "answered, ssh"]
