"""A host for each test, and guests that a module's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import kinds
from .sshd import Sshd
from .travel import Host, Stable, Traveller, fifo, new_host


@pytest.fixture
def host() -> Iterator[Host]:
    with new_host() as made:
        yield made


@pytest.fixture
def gate(host: Host) -> Iterator[tuple[Path, int]]:
    """Make a FIFO from which a -p command reads a line; yield it and a descriptor for writing."""
    path = host.directory / "gate"
    with fifo(path) as fd:
        yield path, fd
        os.write(fd, b"\n")  # ends the -p command of a bhysend that was killed


@pytest.fixture(scope="module")
def stable() -> Iterator[Stable]:
    made = Stable()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(params=[kinds.QEMU, kinds.G5])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of the guest; see kinds.py."""
    return str(request.param)


@pytest.fixture
def small(kind: str, stable: Stable) -> Traveller:
    return kinds.small(kind, stable)


@pytest.fixture
def proof(kind: str, stable: Stable) -> Traveller:
    return kinds.proof(kind, stable)
