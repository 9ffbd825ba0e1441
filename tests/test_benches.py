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
from bench.closing import closing, received_s

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


def test_a_closing_line_is_taken_apart() -> None:
    said = (
        "bhysend: guest g: round 0: 7 pages, 9 zero, 221.0 MiB in 651 ms; pause 758 ms predicted\n"
        "bhysend: guest g: round 1: 12%, 225.0 MiB/s; 256.0 KiB in it, 225.4 MiB in all, 1.00 s\n"
        "bhyrecv(hv2): guest g: it runs here; 2 rounds, 229.9 MiB; paused 158 ms, 101 ms of it"
        " here, plus the transit of END\n"
        "bhysend: guest g: it runs on hv2, and is gone here; 2 rounds, 229.5 MiB; paused 1.10 s"
        " (state 7.1 ms, last pages 49 ms, another part 2 m 05 s), predicted 1.20 s (8.0 ms, 50 ms,"
        " 1.10 s)\n"
    )
    found = closing(said)
    parts_s = {"state": 0.0071, "last pages": 0.049, "another part": 125.0}
    assert (found.paused_s, found.predicted_s) == (1.1, 1.2)
    assert found.parts_s == pytest.approx(parts_s)
    assert found.last_bytes == pytest.approx(8.5 * 2**20, abs=1)
    assert received_s(said) == 0.158


@pytest.mark.guest
def test_everything_is_measured_side_by_side(tmp_path: Path) -> None:
    require_sink()
    picture = tmp_path / "ratios.svg"
    said = json.loads(printed("run", "--quick", "--json", "--picture", str(picture)))
    rows = {row["name"]: row for row in said["rows"]}
    for way in ("paused, warm", "copied, warm", "paused, cold", "copied, cold"):
        assert f"{way}: against the bare loop" in rows
        assert {f"{way}: CPU s/GB, send", f"{way}: CPU s/GB, receive"} <= rows.keys()
    assert "paused guest to cat >/dev/null: against QEMU" in rows
    assert "RssAnon of bhyrecv, 512 MiB, live: against the allowance" in rows
    for name, row in rows.items():
        assert row["runs"] and min(row["runs"]) > 0, name
        lowest, highest = (0, 1) if row["is_share"] else (min(row["runs"]), max(row["runs"]))
        assert lowest <= row["ratio"] <= highest, name
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


@pytest.mark.standin
def test_the_time_from_ctrl_c_to_the_end_is_measured() -> None:
    said = printed("bench_interrupts.py", "1").splitlines()
    assert [line for line in said if line.startswith("three-stages, READY")]
    assert said[-1].startswith("one piece of a scan")
