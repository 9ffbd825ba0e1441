"""A vm-bhyve guest's configuration comes from its log, and its locks are respected."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from backend.bhyve_samples import (
    ARGV,
    CONF,
    DEVICES,
    DIRECTORY,
    MAC,
    OPTIONS,
    UUID,
    log_of,
    make_guest,
)
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.datastore import find
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest, last_start
from bhystream.backend.process import Identity
from bhystream.errors import GuestError, IncompatibleError, InputOutputError, InternalError

HOST = "src.example"
BHYVE = Identity(4711, 5, "boot-1")
SAID = "2026-02-03T05:00:00+00:00: "


def guest_in(tmp_path: Path, log: str | None = None, conf: str = CONF) -> VmBhyveGuest:
    """Make the directory of a guest that vm-bhyve runs."""
    directory = make_guest(tmp_path / "vm", log, conf)
    (directory / "run.lock").write_text(f"{HOST}\n")
    found = find([tmp_path / "vm"], "web1", HOST)
    assert found is not None
    return found


def argv_of(log: str) -> list[str]:
    found = last_start(log)
    assert found is not None
    return found.argv()


@pytest.fixture
def locks(tmp_path: Path) -> Locks:
    found = guest_in(tmp_path).locks
    (found.directory / "run.lock").unlink()
    return found


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


def test_the_argv_of_the_last_start_is_read() -> None:
    assert [*argv_of(log_of()), "web1"] == ARGV


def test_the_configuration_is_that_of_the_last_start(tmp_path: Path) -> None:
    found = guest_in(tmp_path).running(BHYVE)
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


def test_only_the_last_of_several_starts_counts() -> None:
    old = log_of(OPTIONS.replace("-m 4G", "-m 1G"), iso="-s 3:0,ahci-cd,/iso/a.iso,ro")
    assert argv_of(old + log_of()) == ARGV[:-1]


def test_an_iso_of_the_last_start_is_a_disk(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, log_of(iso="-s 3:0,ahci-cd,/iso/a.iso,ro,bootindex=1"))
    assert guest.running(BHYVE).section["resources"]["disk0"] == "pci.0.3.0.port.0.path"


def test_the_state_that_it_was_resumed_from_is_no_configuration() -> None:
    assert argv_of(log_of(OPTIONS + " -r /zroot/my vms/web1/web1.save")) == ARGV[:-1]


def test_a_log_with_the_dates_of_older_versions_is_read() -> None:
    old = (log_of() + f"{SAID}stopped\n").replace("2026-02-03T04:05:06+00:00", "Feb 03 04:05:06")
    old = old.replace(SAID, "Feb 03 05:00:00: ")
    assert argv_of(old) == ARGV[:-1]
    found = last_start(old)
    assert found is not None and found.ended == "stopped"


# Whether the log's last start is the bhyve that runs.

ENDED = ["bhyve exited with status 1", "stopped"]


@pytest.mark.parametrize(
    ("lines", "ended"),
    [
        ([], ""),
        (["destroying network device tap0"], ""),
        (ENDED[:1], "bhyve exited with status 1"),
        (ENDED, "stopped"),
        (["bhyve exited with status 137", "suspended"], "suspended"),
        (["bhyve exited with status 0", "restarting"], "bhyve exited with status 0"),
        (["bhyve exited with status 0", "restarting", "starting bhyve (run 2)"], ""),
        ([*ENDED, "initialising", " [loader: uefi]"], "initialising"),
        ([*ENDED, "initialising", "fatal; pci passthrough not supported"], "fatal;"),
        (["initialising"], "initialising"),
        (["initialising network device tap0"], ""),
        (["fatal; loader returned error 1"], "fatal;"),
    ],
)
def test_a_start_describes_what_runs_until_the_log_says_more(
    tmp_path: Path, lines: list[str], ended: str
) -> None:
    log = log_of(devices=moved(DEVICES, tmp_path))
    guest = guest_in(tmp_path, log + "".join(f"{SAID}{line}\n" for line in lines))
    assert guest.last_started().full["cpus"] == "2"
    if not ended:
        assert guest.running(BHYVE).full["cpus"] == "2"
        return
    with pytest.raises(IncompatibleError, match=f"after the last start it says '{ended}") as caught:
        guest.running(BHYVE)
    assert "-C" in caught.value.hint


def test_a_start_anew_describes_what_runs(tmp_path: Path) -> None:
    old = log_of(OPTIONS.replace("-c 2", "-c 1")) + "".join(f"{SAID}{line}\n" for line in ENDED)
    assert guest_in(tmp_path, old + log_of()).running(BHYVE).full["cpus"] == "2"


@pytest.mark.parametrize("lock", [None, "", "other.example\n", "held-by-bhysend\n"])
def test_the_log_of_a_guest_that_vm_bhyve_does_not_run_is_not_believed(
    tmp_path: Path, lock: str | None
) -> None:
    guest = guest_in(tmp_path)
    path = guest.directory / "run.lock"
    path.unlink() if lock is None else path.write_text(lock)
    with pytest.raises(IncompatibleError, match=r"run\.lock does not name this host") as caught:
        guest.running(BHYVE)
    assert "-C" in caught.value.hint


# What the .conf has named since the last start.


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "disk0.img",
            "disk0b.img",
            "its disk0 is disk0b.img \\(file\\), the last start had /zroot",
        ),
        ("\ndisk1_type", '\ndisk1_dev="sparse-zvol"\ndisk1_type', r"disk1 is .* \(sparse-zvol\)"),
        ("\ndisk1_type", '\ndisk1_dev="custom"\ndisk1_type', r"disk1 is disk1.img \(custom\)"),
        ("disk1_name", "disk2_name", "it has 1 disks, the last start had 2"),
        ("graphics", 'disk2_type="virtio-blk"\ndisk2_name="x"\ngraphics', "it has 3 disks"),
        ("graphics", 'network1_type="e1000"\ngraphics', "it has 2 network cards, .* had 1"),
        ('"uefi"', '"bhyveload"', "its loader is bhyveload, the last start had boot ROM /usr"),
        ("uefi_vars", "x", r"its uefi_vars has changed, the last start had .*uefi-vars\.fd"),
    ],
)
def test_a_conf_that_was_changed_since_the_last_start_is_refused(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    guest = guest_in(tmp_path, log_of(devices=moved(DEVICES, tmp_path)), CONF.replace(old, new, 1))
    said = said.replace("/zroot", str(tmp_path))
    with pytest.raises(IncompatibleError, match=said) as caught:
        guest.last_started()
    assert "-o" in caught.value.hint
    assert guest.running(BHYVE).full["cpus"] == "2"  # the guest still runs with it


def moved(text: str, tmp_path: Path) -> str:
    """Return a start's words, with the disks in this test's directory."""
    return text.replace(DIRECTORY, f"{tmp_path}/vm/web1")


def test_a_conf_that_says_the_same_is_no_change(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, log_of(devices=moved(DEVICES, tmp_path)))
    assert guest.last_started().resources()["pci.0.4.0.path"] == f"{tmp_path}/vm/web1/disk0.img"


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("zvol", "disk0", "/dev/zvol/zroot/vm/web1/disk0"),
        ("sparse-zvol", "d", "/dev/zvol/tank/a/b/web1/d"),
        ("custom", "/dev/da0", "/dev/da0"),
        ("iscsi", "iqn.2026-01.example", "/dev/da7"),
    ],
)
def test_a_disk_is_where_vm_bhyve_has_it(tmp_path: Path, kind: str, name: str, path: str) -> None:
    conf = f'disk0_type="virtio-blk"\ndisk0_name="{name}"\ndisk0_dev="{kind}"\n'
    devices = f"-s 0,hostbridge -s 31,lpc -s 0:4:0,virtio-blk,{path}"
    assert guest_in(tmp_path, log_of(devices=devices), conf).last_started()


def test_an_iso_and_the_disks_of_bhyve_options_are_not_the_confs(tmp_path: Path) -> None:
    options = OPTIONS + " -s 0:20:0,virtio-blk,/extra"
    log = log_of(options, moved(DEVICES, tmp_path), iso="-s 3:0,ahci-cd,/iso/a.iso,ro")
    found = guest_in(tmp_path, log).last_started()
    assert len([word for word in found.section["resources"] if word.startswith("disk")]) == 4


def test_a_log_without_a_start_is_refused_with_its_cure(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, "2026-02-03T04:05:06+00:00: initialising\n")
    with pytest.raises(IncompatibleError, match="records no start of web1") as caught:
        guest.running(BHYVE)
    assert "-C" in caught.value.hint


def test_a_start_that_broke_off_in_the_log_is_none() -> None:
    assert last_start("x:  [bhyve options: -c 2]\n") is None
    assert last_start("x:  [bhyve devices: -s 0,lpc]\n") is None
    assert last_start("") is None


def test_a_missing_log_is_an_error(tmp_path: Path) -> None:
    guest = guest_in(tmp_path)
    (guest.directory / "vm-bhyve.log").unlink()
    with pytest.raises(InputOutputError, match=r"cannot read .*vm-bhyve\.log"):
        guest.running(BHYVE)


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
        guest_in(tmp_path, conf=CONF.replace(old, new)).running(BHYVE)


def test_a_conf_written_otherwise_is_the_same(tmp_path: Path) -> None:
    conf = CONF.replace(UUID, UUID.upper()).replace(MAC, MAC.upper())
    assert guest_in(tmp_path, conf=conf).running(BHYVE).section["keys"]["uuid"] == UUID


def test_a_conf_without_uuid_and_mac_contradicts_nothing(tmp_path: Path) -> None:
    conf = 'loader="uefi"\nnetwork0_type="virtio-net"\n'
    assert guest_in(tmp_path, conf=conf).running(BHYVE).section["keys"]["uuid"] == UUID


def test_a_card_that_the_last_start_had_not_is_refused(tmp_path: Path) -> None:
    start = log_of(devices="-s 0,hostbridge -s 31,lpc")
    with pytest.raises(IncompatibleError, match=r"has network0_mac .*, the last start had none"):
        guest_in(tmp_path, start).running(BHYVE)


def test_a_device_that_bhyve_cannot_save_is_refused(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, log_of(devices=DEVICES + " -s 0:10:0,nvme,/dev/zvol/x"))
    with pytest.raises(IncompatibleError, match=r"does not save nvme@pci.0.10.0"):
        guest.running(BHYVE)


def test_a_guest_of_another_host_is_refused(locks: Locks) -> None:
    (locks.directory / "run.lock").write_text("other.example\n")
    [reason] = locks.reasons()
    assert reason.what.endswith("run.lock: the guest belongs to 'other.example'")


@pytest.mark.parametrize(
    ("content", "says", "cure"),
    [
        ("", "is empty, as after a power failure", "on no other host: rm {}"),
        ("\n", "is empty, as after a power failure", "on no other host: rm {}"),
        ("HV1.Example\n", "names 'HV1.Example', and this host is", "hostname > {}"),
        ("other.example\n", "belongs to 'other.example'", "surely does not run there: rm {}"),
    ],
)
def test_a_lock_that_is_not_ours_says_what_helps(
    tmp_path: Path, content: str, says: str, cure: str
) -> None:
    found = Locks("web1", tmp_path, "hv1.example")
    (tmp_path / "run.lock").write_text(content)
    [reason] = found.reasons()
    assert says in reason.what
    assert cure.format(tmp_path / "run.lock") in reason.cure
    assert reason == f"{reason.what}; {reason.cure}"


def test_a_stale_saved_state_is_refused(locks: Locks) -> None:
    (locks.directory / "web1.save").symlink_to("/nowhere")
    [reason] = locks.reasons()
    assert "web1.save exists: " in reason.what
    assert reason.cure == "run vm discard web1"


def test_a_guest_that_runs_here_may_be_moved(locks: Locks) -> None:
    (locks.directory / "run.lock").write_text(f"{HOST}\n")
    assert locks.reasons() == []
    assert locks.is_supervised() and locks.holder() == HOST


def test_the_end_is_announced_and_taken_back(locks: Locks) -> None:
    locks.before_kill()
    assert (locks.directory / "suspending.lock").read_text() == f"{HOST}\n"
    locks.take_back()
    locks.take_back()
    assert not (locks.directory / "suspending.lock").exists()


def test_a_guest_that_is_gone_is_locked_for_its_new_host(locks: Locks) -> None:
    """vm-bhyve, which reads the first line, does not start it; it may come back from anywhere."""
    locks.before_kill()  # vm-bhyve older than 1.7.0 leaves suspending.lock where it is
    locks.gone_to("dst.example")
    lock = locks.directory / "run.lock"
    assert not (locks.directory / "suspending.lock").exists()
    assert lock.read_text() == "dst.example\nmoved by bhysend\n"
    assert not locks.reasons() and not locks.is_supervised()
    lock.write_text("dst.example\n")
    assert locks.reasons()  # vm-bhyve's own lock, in a datastore that both hosts share
    locks.gone_to("dst.example")
    locks.release()
    assert locks.holder() is None


def test_a_held_guest_is_locked_with_a_foreign_word(locks: Locks) -> None:
    locks.held("held-by-bhysend")
    assert locks.holder() == "held-by-bhysend"
    locks.gone_to("dst.example")
    assert locks.holder() == "dst.example"


def supervise(locks: Locks) -> Path:
    """Write run.lock as vm-bhyve's supervisor does."""
    lock = locks.directory / "run.lock"
    lock.write_text(f"{HOST}\n")
    return lock


def test_a_guest_that_we_started_has_no_supervisor_to_wait_for(locks: Locks) -> None:
    locks.runs_here("cpus=1\n", BHYVE)
    assert locks.holder() == HOST and not locks.is_supervised() and not locks.reasons()
    assert locks.supervisor_gone(0)
    locks.gone_to("dst.example")
    assert locks.holder() == "dst.example"


def test_the_configuration_of_a_guest_that_we_started_is_ours(tmp_path: Path) -> None:
    guest = guest_in(tmp_path)
    full = dict(guest.running(BHYVE).full) | {"pci.0.6.0.backend": "tap42"}
    guest.locks.runs_here(config_file(full), BHYVE)
    assert guest.running(BHYVE).full == full
    assert (guest.directory / "bhysend.conf").stat().st_mode & 0o777 == 0o600
    supervise(guest.locks)  # vm-bhyve has started the guest anew
    assert guest.running(BHYVE).full["pci.0.6.0.backend"] == "tap0"


@pytest.mark.parametrize(
    "who",
    [None, BHYVE._replace(pid=1), BHYVE._replace(start_ticks=99), BHYVE._replace(boot_id="b")],
)
def test_a_configuration_of_an_earlier_start_of_ours_is_not_believed(
    tmp_path: Path, who: Identity | None
) -> None:
    """Our bhyve has ended, its lock is left, and a bhyve of that name was started by hand."""
    guest = guest_in(tmp_path)
    guest.locks.runs_here(config_file(guest.running(BHYVE).full), who)
    with pytest.raises(IncompatibleError, match=r"bhysend\.conf is of another start") as caught:
        guest.running(BHYVE)
    assert "-C" in caught.value.hint


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


def test_a_guest_that_is_about_to_leave_is_still_its_hosts(locks: Locks) -> None:
    """In a datastore that both hosts share, the destination refuses it."""
    supervise(locks)
    locks.leaves()
    assert locks.holder() != HOST and locks.is_supervised() and not locks.reasons()
    there = replace(locks, hostname="dst.example")
    assert not there.is_supervised() and len(there.reasons()) == 1
    locks.take_back()
    assert (locks.directory / "run.lock").read_text() == f"{HOST}\n"


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
    with pytest.raises(InputOutputError, match=r"cannot write .*run\.lock"):
        locks.held("x")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "run.lock").mkdir()
    with pytest.raises(InputOutputError):
        locks.held("x")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["run.lock"]


def test_a_nul_in_the_log_is_dropped() -> None:
    """A power cut leaves NULs; no argument of a program holds one."""
    start = last_start(log_of(OPTIONS.replace("-c 2", "-c\0 2")))
    assert start is not None and start.argv() == last_start(log_of()).argv()  # type: ignore[union-attr]
