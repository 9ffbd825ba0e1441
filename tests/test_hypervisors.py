"""Which hypervisor an operand or a stream names, and what a host without it says."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from bhystream import hypervisors
from bhystream.backend.bhyve.cold import FilesSink
from bhystream.errors import BhyError, GuestError, IncompatibleError, UsageError
from bhystream.hypervisors import Receiving, Sending

ID = "a" * 32


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a host without bhyve, and without a stand-in in the environment."""
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(sysname="Linux"))
    monkeypatch.delenv("BHYSEND_VMM_DIR", raising=False)


@pytest.mark.parametrize(
    ("operand", "why"),
    [
        ("web1", "guest web1: bhyve guests live on FreeBSD"),
        ("./web1.ckp", "guest ./web1.ckp: bhyve's snapshot files are sent from their FreeBSD host"),
        ("/vm/web1", "guest /vm/web1: bhyve's snapshot files are sent from their FreeBSD host"),
    ],
)
def test_without_a_bhyve_its_operands_are_refused(tmp_path: Path, operand: str, why: str) -> None:
    what = Sending(operand, tmp_path)
    with pytest.raises(UsageError) as caught:
        hypervisors.open_snapshot(what) if what.is_cold else hypervisors.open_source(what)
    assert str(caught.value) == f"{why}; a QEMU guest is qemu:/path/to/qmp.sock"


@pytest.mark.parametrize("operand", ["-x", "..", ".web1", "a b", "we%b", "x" * 65, "vbox:a", ""])
def test_what_names_no_guest_is_refused(tmp_path: Path, operand: str) -> None:
    with pytest.raises(UsageError, match=r"not a guest's name, nor qemu:/path/to/qmp.sock"):
        hypervisors.open_source(Sending(operand, tmp_path))


def test_a_stand_in_that_is_not_there_is_no_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BHYSEND_VMM_DIR", str(tmp_path / "none"))
    with pytest.raises(BhyError) as caught:
        hypervisors.open_source(Sending("web1", tmp_path))
    assert not isinstance(caught.value, UsageError)
    assert "FreeBSD" not in str(caught.value)


def test_a_configuration_goes_with_no_qemu_guest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^-C: QEMU tells its own configuration$"):
        hypervisors.open_source(Sending("qemu:/run/web1.qmp", tmp_path, config="/web1.conf"))


@pytest.mark.parametrize("kind", ["bhyve", "standin"])
def test_without_a_bhyve_its_stream_is_one_that_this_host_cannot_take(
    tmp_path: Path, kind: str
) -> None:
    with pytest.raises(IncompatibleError) as caught:
        hypervisors.open_sink(kind, "web1", Receiving(None, tmp_path, ID))
    assert str(caught.value) == (
        f"guest web1: it runs under {kind}; there is no bhyve here: this is no FreeBSD host"
    )
    hint = "bhyrecv -S directory makes snapshot files of the guest, on any host"
    assert caught.value.hint == hint


@pytest.mark.parametrize("kind", ["bhyve", "standin"])
@pytest.mark.parametrize(("operand", "name"), [(None, "web1"), ("web2", "web2")])
def test_snapshot_files_are_made_without_a_bhyve(
    tmp_path: Path, kind: str, operand: str | None, name: str
) -> None:
    what = Receiving(operand, tmp_path, ID, directory=f"{tmp_path}/files")
    sink, found, where = hypervisors.open_sink(kind, "web1", what)
    assert isinstance(sink, FilesSink)
    assert (found, where) == (name, f"{tmp_path}/files/{name}")


@pytest.mark.parametrize(
    "what", [{"directory": "/x"}, {"dropped": ["pci.0.3.0"]}], ids=["-S", "-x"]
)
def test_qemu_guests_have_no_snapshot_files_and_no_keys(
    tmp_path: Path, what: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match=r"^-S and -x are for guests of bhyve"):
        hypervisors.open_sink("qemu", "web1", Receiving(None, tmp_path, ID, **what))  # type: ignore[arg-type]


def test_an_unknown_hypervisor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="the guest's hypervisor 'xen' is not known here"):
        hypervisors.open_sink("xen", "web1", Receiving(None, tmp_path, ID))
    with pytest.raises(GuestError, match="the record's hypervisor 'xen' is not known here"):
        hypervisors.open_paused({"hypervisor": "xen"})
