"""A host for each test, and guests that a module's tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import Spec

from .travel import Host, Stable, Traveller, fifo, short_directory

# A guest whose moves take a moment: little memory, and much of it changing.
SMALL = Spec(
    "microvm",
    memory_mib=128,
    proof={"mib": 32, "work": 16, "holes": 2, "rate": 16, "sweep": 100},
)

# Every combination, not only those that differ most.
EVERY = "BHYSEND_TEST_EVERY" in os.environ


@pytest.fixture
def host() -> Iterator[Host]:
    directory = short_directory()
    try:
        yield Host(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def gate(host: Host) -> Iterator[tuple[Path, int]]:
    """A FIFO that a command at the pause reads a line from, and a descriptor to write it."""
    path = host.directory / "gate"
    with fifo(path) as fd:
        yield path, fd
        os.write(fd, b"\n")  # to the command of a bhysend that was killed


@pytest.fixture(scope="module")
def stable() -> Iterator[Stable]:
    made = Stable()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def small(stable: Stable) -> Traveller:
    return stable.lend(SMALL)
