"""The host, the guest and the directories with which the tests check the facts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bhystream.backend.base import Paused
from bhystream.backend.bhyve.config import GuestConfig
from bhystream.backend.bhyve.datastore import find
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.listening import listener
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.bhyve.opened import read_config
from bhystream.backend.bhyve.paused import PausedRecord
from bhystream.backend.bhyve.snapshot import Meta, parse
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.backend.bhyve.source import BhyveSource
from bhystream.handover import state
from bhystream.hypervisors import open_host, open_paused

from .button import with_button
from .rom import Host as RomHost


def setting(name: str, what: str) -> str:
    """Return an environment variable; if it is not set, fail and say what to set."""
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"set {name} to {what}")
    return value


@pytest.fixture
def button_host() -> Iterator[RomHost]:
    """Boot the guest of button.py."""
    with with_button() as made:
        yield made


@pytest.fixture(scope="session")
def host() -> Host:
    return open_host()


@pytest.fixture(scope="session")
def guest() -> str:
    return setting("BHYSEND_TEST_GUEST", "the name of a running guest that may be lost")


@pytest.fixture(scope="session")
def config_path() -> str | None:
    return os.environ.get("BHYSEND_TEST_CONFIG")


@pytest.fixture(scope="session")
def config(host: Host, guest: str, config_path: str | None) -> GuestConfig:
    if config_path:
        return read_config(config_path, guest)
    manager = find(host.datastores(), guest, os.uname().nodename)
    if manager is None:
        pytest.fail("set BHYSEND_TEST_CONFIG to the guest's bhyve_config(5) file")
    process = listener(host, guest)
    assert process is not None, "no process listens at the guest's checkpoint socket"
    return manager.running(process)


@pytest.fixture
def memory(host: Host, guest: str) -> Iterator[Memory]:
    opened = Memory(host, guest)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def staging(host: Host) -> Iterator[Path]:
    """Make a directory in the place where bhysend makes its directories."""
    directory = SnapshotDir(state.directory() / "held" / f"bhytest{secrets.token_hex(4)}")
    directory.make()
    try:
        yield directory.path
    finally:
        directory.remove(host)


@dataclass(frozen=True)
class Trial:
    """A guest that has rehearsed, and can be held.

    record: any process can find the guest by it.  plan: the rehearsal's FILE.meta.
    """

    source: BhyveSource
    record: PausedRecord
    plan: Meta

    @property
    def directory(self) -> SnapshotDir:
        """Return the directory of the guest's hold."""
        return SnapshotDir(Path(self.record.directory))

    def found_again(self) -> Paused:
        """Find the guest by its record alone."""
        return open_paused(self.record.to_json())


@contextmanager
def rehearsed(host: Host, guest: str, config_path: str | None) -> Iterator[Trial]:
    """Let a guest rehearse; when the with block ends, even by an exception, let the guest run."""
    source = BhyveSource(host, guest, state.directory(), config_path, force=False)
    try:
        prepared = source.prepare(secrets.token_hex(16))
        try:
            record = PausedRecord.from_json(prepared.record)
            yield Trial(source, record, parse(prepared.plan))
        finally:
            open_paused(prepared.record).resume()
    finally:
        source.close()


@pytest.fixture
def may_hold() -> None:
    """Skip the test unless the guest may be held."""
    if os.environ.get("BHYSEND_TEST_HOLD") != "yes":
        pytest.skip("set BHYSEND_TEST_HOLD=yes to have the guest held, and let go again")


@pytest.fixture
def trial(may_hold: None, host: Host, guest: str, config_path: str | None) -> Iterator[Trial]:
    """Return a guest that has rehearsed and can be held; the guest runs on after the test."""
    with rehearsed(host, guest, config_path) as made:
        print(*made.source.warnings(), sep="\n")
        yield made
