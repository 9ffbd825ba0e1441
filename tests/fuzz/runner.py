"""Run targets, each in a process of its own, and report what they have reached."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzz.target import SECONDS, Target

CORPUS = Path(__file__).parent / "corpus"
_REACHED = re.compile(r"cov: (\d+) ft: (\d+)")
_TRIED = re.compile(r"stat::number_of_executed_units: (\d+)")
_SPEED = re.compile(r"stat::average_exec_per_sec: +(\d+)")
_SAVED = re.compile(r"Test unit written to (\S+)")
_IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
# Allocations are limited by the target itself; this is a limit for what calls leave behind.
_RSS_MIB = 1024


@dataclass(frozen=True)
class Result:
    """What one process has reached.  log: what it has printed; saved: the failing input."""

    name: str
    tried: int
    per_second: int
    branches: int
    features: int
    log: str = ""
    saved: str = ""
    status: int = 0

    def __str__(self) -> str:
        line = f"{self.name:15} {self.tried:9} inputs {self.per_second:7}/s"
        line += f" {self.branches:5} branches {self.features:6} features"
        return f"{line}  FAILED: {self.saved}" if self.status else line


class Fuzzer:
    """A process that fuzzes the targets of a table, each in a fork of its own.

    directory: for failing inputs and for the output.
    """

    def __init__(self, table: str, directory: Path) -> None:
        self.directory = directory
        # The targets' own files; libFuzzer ends a process without a chance to remove them.
        self._files = tempfile.TemporaryDirectory(prefix="fuzz-", dir=_IN_MEMORY)
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.fuzzed", table],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": self._files.name},
            text=True,
        )

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._files.cleanup()

    def fuzz(
        self,
        target: Target,
        limit: str,
        *,
        seed: int = 0,
        seconds: int = SECONDS,
        keep: Path | None = None,
    ) -> Result:
        """Fuzz one target.

        limit: an option of libFuzzer: "-max_total_time=10", "-runs=0".  seed: 0 for a random one.
        seconds: how long one input may take.  keep: as --keep.
        """
        found = (keep or self.directory) / target.name
        found.mkdir(parents=True, exist_ok=True)
        log = self.directory / f"{target.name}.log"
        options = [limit, f"-timeout={seconds}", f"-rss_limit_mb={_RSS_MIB}", f"-seed={seed}"]
        options += [f"-artifact_prefix={self.directory}/{target.name}-", "-print_final_stats=1"]
        options += [str(found), *([str(first)] if (first := corpus_of(target)).is_dir() else [])]
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(log), target.name, *options]) + "\n")
        self._process.stdin.flush()
        status = self._process.stdout.readline()
        return _result(target, log.read_text(errors="replace"), int(status))


def corpus_of(target: Target) -> Path:
    return CORPUS / (target.corpus or target.name)


def _result(target: Target, log: str, status: int) -> Result:
    branches, features = map(int, (_REACHED.findall(log) or [("0", "0")])[-1])
    saved = (_SAVED.findall(log) or ["no input was saved"])[-1]
    tried, speed = _number(_TRIED, log), _number(_SPEED, log)
    return Result(target.name, tried, speed, branches, features, log, saved, status)


def _number(pattern: re.Pattern[str], log: str) -> int:
    found = pattern.findall(log)
    return int(found[-1]) if found else 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests/fuzz/run")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=int, default=10)
    length.add_argument("--runs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--table", default="fuzz.targets")
    parser.add_argument("target", nargs="*")
    given = parser.parse_args(argv)
    known = {each.name: each for each in importlib.import_module(given.table).TARGETS}
    for name in given.target:
        if name not in known:
            parser.error(f"no target {name}; there are: {', '.join(known)}")
    limit = f"-max_total_time={given.seconds}" if given.runs is None else f"-runs={given.runs}"
    failed = False
    with Fuzzer(given.table, Path(tempfile.mkdtemp(prefix="fuzz-"))) as fuzzer:
        for name in given.target or known:
            result = fuzzer.fuzz(known[name], limit, seed=given.seed, keep=given.keep)
            print(result, flush=True)
            if result.status:
                failed = True
                print(re.sub("^#.*\n", "", result.log, flags=re.MULTILINE))
                print(
                    f"alone: python -m fuzz.fuzzed {given.table} {name} {result.saved}", flush=True
                )
    return int(failed)
