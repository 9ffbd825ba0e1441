"""The host, the guest and the directories that the facts are checked with."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bhystream import state
from bhystream.backend.bhyve.config import GuestConfig
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.hosts import open_host
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.bhyve.place import Place, staging_root
from bhystream.backend.bhyve.source import BhyveSource, read_config
from bhystream.backend.bhyve.vmbhyve import find
from bhystream.backend.process import is_alive
from bhystream.errors import BhyError


def setting(name: str, what: str) -> str:
    """Return an environment variable; without it the test fails, and says what to set."""
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"set {name} to {what}")
    return value


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
    return manager.config()


@pytest.fixture
def memory(host: Host, guest: str) -> Iterator[Memory]:
    opened = Memory(host, guest)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def staging(host: Host) -> Iterator[Path]:
    """Make a directory where bhysend would make its own."""
    root = staging_root(host, "source", state.directory(), os.environ)
    path = root / f"bhytest-{secrets.token_hex(4)}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class Suspended:
    """What was seen while a guest was suspended, and after it was brought back.

    failure: what went wrong, "" if nothing did.  before: pages of the mapping
    at the suspend; after: the same when the VM was destroyed too.
    """

    failure: str = ""
    is_process_alive: bool = True
    has_sink: bool = False
    is_node_left: bool = False
    is_node_gone_in_the_end: bool = False
    states: tuple[str, ...] = ()
    before: tuple[bytes, ...] = ()
    after: tuple[bytes, ...] = ()
    runs_again: bool = False


@pytest.fixture(scope="session")
def suspended(host: Host, guest: str, config_path: str | None) -> Suspended:
    """Suspend the guest, look, and bring it back: once for all the tests that ask for it."""
    if os.environ.get("BHYSEND_TEST_SUSPEND") != "yes":
        pytest.skip("BHYSEND_TEST_SUSPEND=yes has the guest suspended and started again")
    seen = Suspended()
    base = state.directory()
    source = BhyveSource(host, guest, base, config_path, keep=False, force=False)
    ours = Memory(host, guest)
    try:
        source.prepare(secrets.token_hex(16))
        print(*source.warnings(), sep="\n")
        _look(host, guest, source, ours, seen)
    except BhyError as error:
        seen.failure = str(error)
    finally:
        ours.close()
        source.close()
    return seen


def _look(host: Host, guest: str, source: BhyveSource, ours: Memory, seen: Suspended) -> None:
    place = Place.from_json(source.revive())
    assert place.process is not None
    seen.has_sink = place.has_sink()
    try:
        source.pause()
        seen.is_process_alive = is_alive(place.process)
        seen.is_node_left = host.exists(guest)
        seen.states = tuple(item.name for item in source.states())
        seen.before = sample(ours)
        host.destroy(guest)
        seen.is_node_gone_in_the_end = not host.exists(guest)
        seen.after = sample(ours)
    finally:
        # Whatever was seen: the guest has to come back.
        source.resume()
        seen.runs_again = True


def sample(memory: Memory, count: int = 256) -> tuple[bytes, ...]:
    """Return some pages of a mapping, from all over it."""
    pages = []
    for view in memory.views:
        step = max(len(view) // count // 4096, 1) * 4096
        pages += [bytes(view[at : at + 4096]) for at in range(0, len(view), step)]
    return tuple(pages)
