"""A host for each test, and guests that a module's tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from guest import Spec

from .travel import Host, Stable, Traveller, short_directory

# A guest whose moves take a moment: little memory, and much of it changing.
SMALL = Spec(
    "microvm",
    memory_mib=128,
    proof={"mib": 32, "work": 16, "holes": 2, "rate": 16, "sweep": 100},
)


@pytest.fixture
def host() -> Iterator[Host]:
    directory = short_directory()
    try:
        yield Host(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


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
