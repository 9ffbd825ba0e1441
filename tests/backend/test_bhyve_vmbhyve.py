"""A vm-bhyve guest's configuration comes from its log, and its locks are respected."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from backend.bhyve_samples import ARGV, CONF, DEVICES, MAC, OPTIONS, UUID, log_of, make_guest
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest, find, last_argv, parse_conf
from bhystream.errors import GuestError, IncompatibleError, InternalError, PipeError

HOST = "src.example"


def guest_in(tmp_path: Path, log: str | None = None, conf: str = CONF) -> VmBhyveGuest:
    make_guest(tmp_path / "vm", log, conf)
    found = find([tmp_path / "vm"], "web1", HOST)
    assert found is not None
    return found


@pytest.fixture
def locks(tmp_path: Path) -> Locks:
    return guest_in(tmp_path).locks


def test_a_guest_is_found_in_the_first_datastore_that_has_it(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    (first / "web1").mkdir(parents=True)  # a directory without web1.conf is no guest
    make_guest(second)
    found = find([first, second], "web1", HOST)
    assert found is not None and found.directory == second / "web1"
    assert find([first], "web1", HOST) is None
    assert find([], "web1", HOST) is None
    assert find([second], "../b/web1", HOST) is None
    assert find([second], "..", HOST) is None


def test_the_argv_of_the_last_start_is_read(tmp_path: Path) -> None:
    assert guest_in(tmp_path).argv() == ARGV


def test_the_configuration_is_that_of_the_last_start(tmp_path: Path) -> None:
    found = guest_in(tmp_path).config()
    assert found.name == "web1"
    assert found.section["resources"] == {
        "disk0": "pci.0.4.0.path",
        "disk1": "pci.0.5.0.port.0.path",
        "net0": "pci.0.6.0.backend",
        "com1": "lpc.com1.path",
        "bootrom": "lpc.bootrom",
        "bootvars": "lpc.bootvars",
        "vnc": "pci.0.8.0.rfb",
    }
    assert found.resources()["pci.0.6.0.backend"] == "tap0"
    assert "pci.0.8.0.wait" not in found.section["keys"]


def test_only_the_last_of_several_starts_counts(tmp_path: Path) -> None:
    old = log_of(OPTIONS.replace("-m 4G", "-m 1G"), iso="-s 3:0,ahci-cd,/iso/a.iso,ro")
    guest = guest_in(tmp_path, old + log_of())
    assert guest.argv() == ARGV


def test_an_iso_of_the_last_start_is_a_disk(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, log_of(iso="-s 3:0,ahci-cd,/iso/a.iso,ro,bootindex=1"))
    assert guest.config().section["resources"]["disk0"] == "pci.0.3.0.port.0.path"


def test_the_state_that_it_was_resumed_from_is_no_configuration(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, log_of(OPTIONS + " -r /zroot/my vms/web1/web1.save"))
    assert guest.argv() == ARGV


def test_a_log_with_the_dates_of_older_versions_is_read(tmp_path: Path) -> None:
    old = log_of().replace("2026-02-03T04:05:06+00:00", "Feb 03 04:05:06")
    assert guest_in(tmp_path, old).argv() == ARGV


def test_a_log_without_a_start_is_refused_with_its_cure(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, "2026-02-03T04:05:06+00:00: initialising\n")
    with pytest.raises(IncompatibleError, match="records no start of web1") as caught:
        guest.config()
    assert "-C" in caught.value.hint


def test_a_start_that_broke_off_in_the_log_is_none() -> None:
    assert last_argv("x:  [bhyve options: -c 2]\n") is None
    assert last_argv("x:  [bhyve devices: -s 0,lpc]\n") is None
    assert last_argv("") is None


def test_a_missing_log_is_an_error(tmp_path: Path) -> None:
    guest = guest_in(tmp_path)
    (guest.directory / "vm-bhyve.log").unlink()
    with pytest.raises(PipeError, match=r"cannot read .*vm-bhyve\.log"):
        guest.config()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (UUID, UUID.replace("4ca2", "4ca3"), "web1.conf has uuid '4ca3"),
        (MAC, "58:9c:fc:0a:1b:2d", "web1.conf has network0_mac '58:9c:fc:0a:1b:2d'"),
    ],
)
def test_a_conf_of_another_machine_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(IncompatibleError, match=message):
        guest_in(tmp_path, conf=CONF.replace(old, new)).config()


def test_a_conf_written_otherwise_is_the_same(tmp_path: Path) -> None:
    conf = CONF.replace(UUID, UUID.upper()).replace(MAC, MAC.upper())
    assert guest_in(tmp_path, conf=conf).config().section["keys"]["uuid"] == UUID


def test_a_conf_without_uuid_and_mac_contradicts_nothing(tmp_path: Path) -> None:
    conf = 'loader="uefi"\nnetwork0_type="virtio-net"\n'
    assert guest_in(tmp_path, conf=conf).config().section["keys"]["uuid"] == UUID


def test_a_card_that_the_last_start_had_not_is_refused(tmp_path: Path) -> None:
    start = log_of(devices="-s 0,hostbridge -s 31,lpc")
    with pytest.raises(IncompatibleError, match=r"has network0_mac .*, the last start had none"):
        guest_in(tmp_path, start).config()


def test_a_device_that_bhyve_cannot_save_is_refused(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, log_of(devices=DEVICES + " -s 0:10:0,nvme,/dev/zvol/x"))
    with pytest.raises(IncompatibleError, match=r"does not save nvme@pci.0.10.0"):
        guest.config()


def test_a_conf_is_read_and_never_run(tmp_path: Path) -> None:
    text = f'a="$(touch {tmp_path}/x)"\nb=\'q q\' # c\n# d=1\ne=f\ng="h\\"i"\nexit\n'
    found = parse_conf(text, "web1.conf")
    assert found == {"a": f"$(touch {tmp_path}/x)", "b": "q q", "e": "f", "g": 'h"i'}
    assert not (tmp_path / "x").exists()


def test_an_open_quote_in_a_conf_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"web1\.conf: line 2: a quote is open"):
        parse_conf('a=1\nb="2\n', "web1.conf")


def test_a_guest_of_another_host_is_refused(locks: Locks) -> None:
    (locks.directory / "run.lock").write_text("other.example\n")
    with pytest.raises(IncompatibleError, match=r"run.lock: the guest belongs to 'other.example'"):
        locks.require_free()
    locks.require_free(["other.example"])


@pytest.mark.parametrize(
    ("content", "says", "cure"),
    [
        ("", "is empty, as after a power failure", "remove that file"),
        ("\n", "is empty, as after a power failure", "remove that file"),
        ("HV1.Example\n", "names 'HV1.Example', and this host is", "write this host's name"),
        ("other.example\n", "belongs to 'other.example'", "if it surely does not run there"),
    ],
)
def test_a_lock_that_is_not_ours_says_what_helps(
    tmp_path: Path, content: str, says: str, cure: str
) -> None:
    found = Locks("web1", tmp_path, "hv1.example")
    (tmp_path / "run.lock").write_text(content)
    with pytest.raises(IncompatibleError) as caught:
        found.require_free()
    assert says in str(caught.value)
    assert cure in caught.value.hint
    [reason] = found.reasons()
    assert says in reason
    assert cure in reason


def test_a_stale_saved_state_is_refused(locks: Locks) -> None:
    (locks.directory / "web1.save").symlink_to("/nowhere")
    with pytest.raises(IncompatibleError, match=r"web1.save exists: .* run vm discard"):
        locks.require_free()


def test_a_guest_that_runs_here_may_be_moved(locks: Locks) -> None:
    (locks.directory / "run.lock").write_text(f"{HOST}\n")
    locks.require_free()
    assert locks.is_supervised() and locks.holder() == HOST


def test_the_end_is_announced_and_taken_back(locks: Locks) -> None:
    locks.before_kill()
    assert (locks.directory / "suspending.lock").read_text() == f"{HOST}\n"
    locks.take_back()
    locks.take_back()
    assert not (locks.directory / "suspending.lock").exists()


def test_a_guest_that_is_gone_is_locked_for_its_new_host(locks: Locks) -> None:
    locks.gone_to("dst.example")
    assert (locks.directory / "run.lock").read_text() == "dst.example\n"
    assert locks.reasons() and not locks.is_supervised()
    locks.release()
    assert locks.holder() is None


def test_a_held_guest_is_locked_with_a_foreign_word(locks: Locks) -> None:
    locks.held("held-by-bhysend")
    assert locks.holder() == "held-by-bhysend"
    locks.gone_to("dst.example")
    assert locks.holder() == "dst.example"


def supervise(locks: Locks) -> Path:
    """Write run.lock as vm-bhyve does."""
    lock = locks.directory / "run.lock"
    lock.write_text(f"{HOST}\n")
    return lock


def test_a_guest_that_we_started_has_no_supervisor_to_wait_for(locks: Locks) -> None:
    locks.runs_here()
    assert locks.holder() == HOST and not locks.is_supervised() and not locks.reasons()
    assert locks.supervisor_gone(0)
    locks.gone_to("dst.example")
    assert locks.holder() == "dst.example"


def test_the_configuration_of_a_guest_that_we_started_is_ours(tmp_path: Path) -> None:
    guest = guest_in(tmp_path)
    full = dict(guest.config().full) | {"pci.0.6.0.backend": "tap42"}
    guest.locks.runs_here(config_file(full))
    assert guest.config().full == full
    assert (guest.directory / "bhysend.conf").stat().st_mode & 0o777 == 0o600
    supervise(guest.locks)  # vm-bhyve has started it anew
    assert guest.config().full["pci.0.6.0.backend"] == "tap0"


def test_a_configuration_of_an_earlier_start_of_ours_is_not_believed(tmp_path: Path) -> None:
    guest = guest_in(tmp_path)
    guest.locks.runs_here("cpus=1\n")
    guest.locks.runs_here()
    assert guest.config().full["cpus"] == "2"


def test_nothing_is_written_over_a_supervisor(locks: Locks) -> None:
    supervise(locks)
    for take in (locks.gone_to, locks.held):
        with pytest.raises(GuestError, match="supervisor has not ended"):
            take("dst.example")
    locks.release()
    assert locks.holder() == HOST


@pytest.mark.parametrize("word", ["", "a b", "a\nb", "../x", "-x"])
def test_a_word_that_is_no_hostname_is_not_written(locks: Locks, word: str) -> None:
    with pytest.raises(GuestError, match="cannot be written"):
        locks.held(word)
    assert locks.holder() is None


def test_the_word_for_held_is_never_this_host(locks: Locks) -> None:
    with pytest.raises(InternalError, match="where vm start would run it"):
        locks.held(HOST)


def test_the_end_of_the_supervisor_is_waited_for(locks: Locks) -> None:
    lock = supervise(locks)
    assert not locks.supervisor_gone(0)
    ended = threading.Timer(0.1, lock.unlink)
    ended.start()
    assert locks.supervisor_gone(30)
    ended.join()


def test_a_supervisor_is_gone_when_the_destination_has_the_lock(locks: Locks) -> None:
    (locks.directory / "run.lock").write_text("dst.example\n")
    assert locks.supervisor_gone(0)


def test_a_lock_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    locks = Locks("web1", tmp_path / "none", HOST)
    with pytest.raises(PipeError, match=r"cannot write .*run\.lock"):
        locks.held("x")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "run.lock").mkdir()
    with pytest.raises(PipeError):
        locks.held("x")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["run.lock"]
