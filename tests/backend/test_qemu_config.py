"""argv -> configuration -> argv: what travels, what stays, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.qemu.command import build
from bhystream.backend.qemu.compare import compare
from bhystream.backend.qemu.config import guest_name, reduce_argv
from bhystream.backend.qemu.facts import Facts
from bhystream.backend.qemu.graph import Drive, Medium, file_of, is_open
from bhystream.backend.qemu.options import parse_size, split_keyval
from bhystream.backend.qemu.resources import Resources
from bhystream.backend.qemu.validate import validate
from bhystream.errors import IncompatibleError, UsageError
from bhystream.guest import GUEST_NAME

from .qemu_rig import strings

FACTS = Facts(machine="pc-q35-7.2", accel="tcg")
BASE = [
    "-name", "guest=web1,debug-threads=on", "-nodefaults", "-m", "512M",
    "-object", "memory-backend-file,id=ram0,size=512M,mem-path=/dev/shm/web1,share=on",
    "-machine", "q35,memory-backend=ram0,smm=off",
]  # fmt: skip
FULL = [
    *BASE,
    "-S", "-daemonize", "-pidfile", "/run/web1.pid", "-D", "/var/log/q.log", "-d", "guest_errors",
    "-no-user-config", "-display", "none", "-vnc", ":1", "-sandbox", "on", "-msg", "timestamp=on",
    "-chardev", "socket,id=mon,path=/run/web1.mon,server=on,wait=off",
    "-mon", "chardev=mon,mode=control",
    "-qmp", "unix:/run/web1.qmp,server=on,wait=off", "-monitor", "none", "-incoming", "defer",
    "-accel", "tcg,thread=single,tb-size=256", "-cpu", "qemu64,+ssse3,-x2apic,pmu=off",
    "-smp", "2,sockets=1,cores=2,threads=1", "-uuid", "8C1B4C5E-0D3F-4C41-9E63-0B8F5B3C2A11",
    "-rtc", "base=utc,driftfix=slew", "-boot", "order=c,menu=off,once=d", "-no-reboot", "-usb",
    "-smbios", "type=1,manufacturer=Example Inc,product=web",
    "-global", "ICH9-LPC.disable_s3=1", "-action", "panic=pause",
    "-kernel", "/boot/vmlinuz", "-initrd", "/boot/initrd.img", "-append", "root=/dev/vda ro",
    "-drive", "file=/srv/a,,b.img,if=none,id=d0,format=raw,cache=none,aio=native",
    "-device", "virtio-blk-pci,drive=d0,id=vd0,bootindex=1,addr=0x5",
    "-blockdev", '{"driver":"file","filename":"/srv/c.qcow2","node-name":"f1"}',
    "-blockdev", "driver=qcow2,node-name=n1,file=f1,read-only=on",
    "-device", '{"driver":"virtio-blk-pci","drive":"n1","num-queues":2,"packed":true}',
    "-cdrom", "/srv/cd.iso",
    "-netdev", "tap,id=n0,ifname=tap7,script=/etc/qemu-ifup,vhost=on",
    "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,romfile=",
    "-nic", "user,model=e1000,hostfwd=tcp::2222-:22",
    "-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0",
    "-object", "iothread,id=io0",
    "-serial", "file:/var/log/web1.serial",
    "-chardev", "socket,id=agent,path=/run/web1.agent,server=on,wait=off",
    "-device", "virtio-serial-pci,id=vs0",
    "-device", "virtserialport,bus=vs0.0,chardev=agent,name=org.example.0",
]  # fmt: skip
KEYS = {
    "disk0": "/dst/a.img", "disk1": "/dst/cd.iso", "disk2": "/dst/c.qcow2", "net0": "tap:tap9",
    "net1": "user", "serial0": "/dst/log", "serial1": "unix:/dst/agent", "kernel": "/dst/k",
    "initrd": "/dst/i",
}  # fmt: skip


def drives(a: str, cd: str, c: str, label: str) -> tuple[Drive, ...]:
    """Return FULL's drives as QEMU describes them.  label: the third drive's."""
    return (
        Drive("d0", "vd0", False, Medium("#block1", "raw", 1 << 20, False, a)),
        Drive("ide2-cd0", "", True, Medium("#block2", "raw", 2048, True, cd)),
        Drive(label, "", False, Medium("n1", "qcow2", 1 << 30, True, c)),
    )


HERE = Facts(
    machine="pc-q35-7.2",
    accel="tcg",
    drives=drives("/srv/a,b.img", "/srv/cd.iso", "/srv/c.qcow2", ""),
)
THERE = Facts(
    machine="pc-q35-7.2",
    accel="tcg",
    drives=drives("/dst/a.img", "/dst/cd.iso", "/dst/c.qcow2", "n1"),
)


def reduced(*extra: str) -> dict[str, Any]:
    return reduce_argv([*BASE, *extra], FACTS)


def full() -> dict[str, Any]:
    return reduce_argv(FULL, HERE)


def present(
    drive: str,
    medium: Medium | None,
    *,
    label: str = "virtio0",
    is_removable: bool = False,
    changes: list[str] | None = None,
) -> dict[str, Any]:
    """Reduce a -drive that holds `medium` now, according to QEMU."""
    found = Facts(
        "x86_64", "pc-q35-7.2", "tcg", {}, (Drive(label, "", is_removable, medium),), "/w"
    )
    return reduce_argv([*BASE, "-drive", drive], found, "", changes)


def test_no_path_of_the_source_host_travels() -> None:
    config = full()
    append = config.pop("append")
    assert append == "root=/dev/vda ro"
    assert [text for text in strings(config) if "/" in text] == []


def test_the_configuration_survives_json_and_validation() -> None:
    config = full()
    assert validate(json.loads(json.dumps(config))) == config


def test_argv_to_configuration_to_argv_is_the_same_machine() -> None:
    config = validate(full())
    resources = Resources.parse(KEYS)
    argv = build(config, resources, name="web2", ram_path="/dev/shm/x,y", qmp_path="/run/q,mp")
    again = reduce_argv(argv, THERE)
    assert compare(config, again) == []
    assert again["name"] == "web2"


def test_the_destination_waits_in_a_sandbox_and_runs_no_script() -> None:
    argv = build(validate(full()), Resources.parse(KEYS), name="w", ram_path="/r,m", qmp_path="/q")
    text = " ".join(argv)
    for expected in (
        "-S -incoming defer",
        "-nodefaults",
        "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "mem-path=/r,,m,share=on,prealloc=off",
        "tap,ifname=tap9,script=no,downscript=no,id=n0",
        "rng-builtin,id=rng0",
        "file,id=bhyrecv-serial0,path=/dst/log,append=on",
    ):
        assert expected in text
    for gone in ("/srv", "/etc", "/boot", "/var", "/run/web1", "aio=", "tb-size", "once="):
        assert gone not in text


def test_an_alias_becomes_the_pinned_machine() -> None:
    assert reduced()["machine"]["type"] == "pc-q35-7.2"


def test_the_image_format_that_qemu_probed_travels() -> None:
    config = present("file=/a,if=virtio", Medium("#block1", "qcow2", 77, False, "/a"))
    assert config["disks"][0]["props"]["format"] == "qcow2"
    assert config["disks"][0]["size_bytes"] == 77


@pytest.mark.parametrize(
    ("then", "now", "line"),
    [
        ("/w/a", "a", ""),
        ("file:/w/a", "/w/x/../a", ""),
        ("nbd:unix:/n:exportname=a", "nbd+unix:///a?socket=/n", ""),
        ("/w/a", 'json:{"driver":"raw","file":{"driver":"file","filename":"/w/a"}}', ""),
        ("/w/a", "b", "QEMU writes to /w/b, but its command line names /w/a"),
        ("/w/a", 'json:{"driver":"raw","file":{"driver":"file","filename":"/b"}}', "to /b, but"),
        ("/w/a", "nbd://secret@host/a", "QEMU writes to a network image, but its command line"),
        ("rbd:p/a:key=secret", "/w/a", "to /w/a, but its command line names a network image"),
    ],
)
def test_another_image_than_the_command_lines_is_named(then: str, now: str, line: str) -> None:
    drive, changes = f"if=virtio,format=raw,file={then}", list[str]()
    medium = Medium("#block1", "raw", 512, False, file_of(now))
    config = present(drive, medium, changes=changes)
    assert config["disks"][0]["size_bytes"] == 512
    assert len(changes) == (line != "") and line in "".join(changes)
    assert "secret" not in "".join(changes)
    if line:
        with pytest.raises(IncompatibleError, match="disk virtio0: QEMU writes to") as caught:
            present(drive, medium)
        assert "or use -f" in caught.value.hint


@pytest.mark.parametrize("name", ["/dev/fdset/1", "/dev/fd/3", "/proc/self/fd/3", "nbd:h:1", "x"])
def test_what_is_no_path_of_qemus_leads_nowhere_else(name: str) -> None:
    """The relative paths of a daemon, whose directory is "/", are not known either."""
    assert is_open(name, "/", os.getpid(), frozenset())
    assert not is_open("/x/y", "/", os.getpid(), frozenset())


def test_an_image_is_compared_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    for now, count in (("hard", 0), ("b", 1)):
        changes: list[str] = []
        medium = Medium("#block1", "raw", 512, False, str(tmp_path / now))
        present(f"if=virtio,format=raw,file={tmp_path}/a", medium, changes=changes)
        assert len(changes) == count


def test_a_medium_of_a_tray_may_be_another() -> None:
    drive = "if=ide,media=cdrom,format=qcow2,file=/a"
    medium = Medium("#block1", "raw", 2048, True, "/b")
    config = present(drive, medium, label="ide0-cd0", is_removable=True)
    assert config["disks"][0]["props"] == {"media": "cdrom", "format": "raw"}


def test_a_disk_is_told_as_it_may_be_written_now() -> None:
    for option, now, wanted in (
        ("", True, "on"),
        (",readonly=on", False, "off"),
        ("", False, None),
    ):
        drive = "if=virtio,format=raw,file=/a" + option
        config = present(drive, Medium("#block1", "raw", 512, now, "/a"))
        assert config["disks"][0]["props"].get("readonly") == wanted


def test_a_disk_that_is_gone_or_below_a_filter_is_refused() -> None:
    drive, gone = "if=virtio,format=raw,file=/a", "disk virtio0 is not there any more"
    medium = Medium("#block1", "copy-before-write", 1, False, "/a")
    with pytest.raises(IncompatibleError, match=gone):
        present(drive, None, changes=[])
    with pytest.raises(IncompatibleError, match=gone):
        present(drive, medium, label="virtio1", changes=[])
    with pytest.raises(IncompatibleError, match="virtio0: its format copy-before-write cannot"):
        present(drive, medium, changes=[])


@pytest.mark.parametrize("device", ["", "vd1"])
def test_a_disk_whose_device_has_another_drive_now_is_refused(device: str) -> None:
    """An unplugged device's drive is there for a moment longer, in no device or in another."""
    there = (
        Drive("d0", device, False, Medium("#block1", "raw", 1 << 20, False, "/a")),
        Drive("", "vd0", False, Medium("n9", "raw", 1 << 20, False, "/b")),
    )
    options = [
        "-drive",
        "if=none,id=d0,file=/a,format=raw",
        "-device",
        "virtio-blk,drive=d0,id=vd0",
    ]
    found = Facts("x86_64", "pc-q35-7.2", "tcg", {}, there, "/")
    with pytest.raises(IncompatibleError, match="disk d0 is not there any more"):
        reduce_argv([*BASE, *options], found)


@pytest.mark.parametrize(
    ("options", "machine", "labels"),
    [
        (["if=ide,index=2", "if=ide"], "pc-q35-7.2", ["ide2-hd0", "ide0-hd0"]),
        (["if=ide,index=2", "if=ide", "if=ide"], "pc-i440fx-7.2",
         ["ide1-hd0", "ide0-hd0", "ide0-hd1"]),
        (["if=ide,bus=1,unit=1", "if=ide"], "pc-i440fx-7.2", ["ide1-hd1", "ide0-hd0"]),
        (["if=virtio,index=1", "if=virtio"], "pc-q35-7.2", ["virtio1", "virtio0"]),
    ],
)  # fmt: skip
def test_qemus_own_names_of_drives(options: list[str], machine: str, labels: list[str]) -> None:
    there = tuple(
        Drive(label, "", False, Medium("", "raw", at, False, "/a"))
        for at, label in enumerate(labels)
    )
    argv = [*BASE]
    for option in options:
        argv += ["-drive", f"format=raw,file=/a,{option}"]
    config = reduce_argv(argv, Facts("x86_64", machine, "tcg", {}, there))
    assert [disk["size_bytes"] for disk in config["disks"]] == list(range(len(labels)))


def test_what_no_device_uses_stays_at_home() -> None:
    config = reduced(
        "-drive", "if=none,id=x,file=/x,format=raw", "-netdev", "user,id=n", "-chardev", "null,id=c"
    )  # fmt: skip
    assert (config["disks"], config["nets"], config["serials"]) == ([], [], [])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["-fsdev", "local,id=f,path=/"], "-fsdev"),
        (["-readconfig", "/etc/q"], "-readconfig"),
        (["-snapshot"], "-snapshot"),
        (["-numa", "node"], "-numa"),
        (["-icount", "1"], "-icount"),
        (["-m", "512M,slots=2,maxmem=1G"], "maxmem"),
        (["-device", "vfio-pci,host=01:00.0"], "vfio-pci"),
        (["-device", "virtio-rng-pci,romfile=/x"], "romfile"),
        (["-device", "virtio-rng-pci,iommu=1"], "iommu"),
        (["-device", "virtio-blk-pci,drive=nope"], "drive=nope"),
        (["-drive", "file=nbd:host:1,if=virtio,file.driver=nbd"], "nbd"),
        (["-drive", "file=/x,if=virtio,format=vmdk"], "vmdk"),
        (["-drive", "file=/x,if=scsi"], "scsi"),
        (["-blockdev", "driver=rbd,node-name=r,pool=p"], "rbd"),
        (["-netdev", "vhost-user,id=n,chardev=c"], "vhost-user"),
        (["-netdev", "tap,id=n,queues=4"], "queues"),
        (["-object", "secret,id=s,data=x"], "secret"),
        (["-object", "memory-backend-ram,id=r2,size=1M"], "memory-backend-ram"),
        (["-object", "memory-backend-memfd,id=r2,size=1M"], "r2"),
        (["-smbios", "file=/x"], "-smbios"),
        (["-boot", "splash=/x.bmp"], "splash"),
        (["-global", "migration.x-ignore-shared=on"], "migration.x-ignore-shared"),
        (["-global", "virtio-net-pci.romfile=x"], "romfile"),
        (["-machine", "firmware=/x"], "firmware"),
        (["-cpu", "max,prop=/x"], "prop=/x"),
        (["-vga", "qxl"], "qxl"),
        (["-net", "nic"], "-net"),
        (["disk.img"], "disk.img"),
        (["-serial"], "-serial"),
        (["-smp", "two"], "-smp: cpus: 'two'"),
        (["-m", "512M,maxmem=513M"], "maxmem"),
        (["-drive", "file=/x,if=virtio,snapshot=on"], "snapshot"),
        (["-drive", "file=/x,if=virtio,index=09"], "index: '09'"),
        (["-machine", "smp.cpus=0z1"], "-smp: cpus: '0z1'"),
    ],
)
def test_what_cannot_travel_is_refused_by_name(extra: list[str], named: str) -> None:
    with pytest.raises(IncompatibleError, match=named.replace(".", r"\.")):
        reduced(*extra)


def test_implicit_devices_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="without -nodefaults"):
        reduce_argv([word for word in BASE if word != "-nodefaults"], FACTS)


def test_unshared_memory_is_refused_with_the_cure() -> None:
    argv = [word.replace(",share=on", "") for word in BASE]
    with pytest.raises(IncompatibleError, match="not share=on") as caught:
        reduce_argv(argv, FACTS)
    assert "memory-backend=ram0" in caught.value.hint


def test_memory_that_the_machine_does_not_use_is_refused() -> None:
    argv = [word.replace("memory-backend=ram0,", "") for word in BASE]
    with pytest.raises(IncompatibleError, match="not the machine's memory"):
        reduce_argv(argv, FACTS)


def test_memory_of_another_size_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="-m and the memory backend differ"):
        reduced("-m", "256M")


def test_differences_are_named() -> None:
    here = reduced("-cpu", "max", "-device", "virtio-rng-pci", "-no-hpet")
    assert compare(reduced("-cpu", "qemu64"), here) == [
        "cpu: the stream says qemu64, here max",
        "device 0: the stream says none, here virtio-rng-pci",
        "-no-hpet: the stream says none, here given",
    ]


def test_names_of_host_resources_are_no_difference() -> None:
    one = reduced("-drive", "if=none,id=a,file=/a,format=raw", "-device", "virtio-blk-pci,drive=a")
    two = reduced("-drive", "if=none,id=b,file=/b,format=raw", "-device", "virtio-blk-pci,drive=b")
    assert compare(one, two) == []


def test_keyval_syntax() -> None:
    assert split_keyval("a,,b,c=d,,e,f", "first") == [("first", "a,b"), ("c", "d,e"), ("f", "on")]
    assert split_keyval('{"a":{"b":true},"c":1}') == [("a.b", "on"), ("c", "1")]
    with pytest.raises(IncompatibleError):
        split_keyval('{"a":[1]}')


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512 << 20), ("1G", 1 << 30), ("4096B", 4096), ("1.5G", 3 << 29), ("0.5", 1 << 19),
        ("0512", 512 << 20), ("0x10", 16 << 20), ("0x4b", 0x4B), ("0x10k", 16 << 10),
        ("2t", 2 << 40), ("1P", 1 << 50), ("1e", 1 << 60), ("64.0", 64 << 20), ("0.1k", 102),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, 1 << 20) == size


@pytest.mark.parametrize(
    "text", ["", "-1", "1.5", "1.5B", "9" * 20, "16E", "1X", "1.", "0x", "0x1.5", "1 G", "\u0661"]
)
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(IncompatibleError):
        parse_size(text, 1)


SPELLINGS: list[tuple[list[str], list[str]]] = [
    (
        ["-machine", "kernel_irqchip=off,mem_merge=on"],
        ["-machine", "kernel-irqchip=off,mem-merge=on"],
    ),
    (["-machine", "smp.cpus=2,smp.cores=2"], ["-smp", "2,cores=2"]),
    (["-machine", "boot.order=dc"], ["-boot", "dc"]),
    (["-machine", "memory.size=512M"], []),
    (["-m", "0.5G"], []),
    (["-m", "0x200"], []),
    (["-m", "524284.1K"], []),
    (["-m", "512M,slots=0,maxmem=512M"], []),
    (["-smp", "0x2"], ["-smp", "cpus=2"]),
    (["-smp", "010"], ["-smp", "8"]),
    (["-smbios", "type=0x1,serial=a"], ["-smbios", "type=1,serial=a"]),
    (["-device", "e1000-82540em"], ["-device", "e1000"]),
    (["-device", '{"driver":"e1000","addr":49}'], ["-device", "e1000,addr=6.1"]),
    (["-device", '{"driver":"e1000","addr":"0x6"}'], ["-device", "e1000,addr=0x6"]),
    *(
        (["-drive", f"file=/a,if=virtio,format=raw,{one}"], ["-drive", f"file=/a,if=virtio,{two}"])
        for one, two in (
            ("readonly=yes", "format=raw,readonly=on"),
            ("read-only=true", "format=raw,readonly=on"),
            ("readonly", "format=raw,readonly=on"),
            ("noreadonly", "format=raw,readonly=off"),
            ("node-name=x,auto-read-only=on", "format=raw"),
            ("snapshot=off,copy-on-read=no,force-share=off", "format=raw"),
            ("index=0x1", "format=raw,index=0x1"),
        )
    ),
]


@pytest.mark.parametrize(("one", "other"), SPELLINGS)
def test_one_thing_may_be_spelt_in_many_ways(one: list[str], other: list[str]) -> None:
    assert reduced(*one) == reduced(*other)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("web1", "web1"), ("my web server", "my-web-server"), ("a,,b", "a-b"), ("-x", "x"),
        ("..", "qemu7"), ("\u00fc", "qemu7"), ("x" * 80, "x" * 64), ("_x.", "_x"), ("", "qemu7"),
        ("../etc", "etc"),
    ],
)  # fmt: skip
def test_a_guest_of_any_name_can_be_called(name: str, called: str) -> None:
    argv = ["-name", name, *BASE[2:]]
    config = reduce_argv(argv, FACTS, "qemu7")
    assert config["name"] == called
    assert GUEST_NAME.fullmatch(called)
    assert validate(config)["name"] == called
    assert guest_name(argv) == name.replace(",,", ",")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("disc0", "/x"),
        ("disk00", "/x"),
        ("net0", "tap:a,script=/x"),
        ("net0", "bridge"),
        ("mem", ""),
    ],
)
def test_a_wrong_resource_is_a_usage_error(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"-o {key}"):
        Resources.parse({key: value})


def test_missing_resources_are_named_ready_to_paste() -> None:
    reasons = Resources.parse({}).reasons(validate(full()))
    text = "\n".join(reasons)
    for key in ("disk0=PATH", "disk1=PATH", "disk2=PATH", "net0=tap:IFNAME", "kernel=PATH"):
        assert f"-o {key}" in text
    assert "serial" not in text


def test_a_key_that_the_guest_has_no_use_for_is_named() -> None:
    reasons = Resources.parse({"disk3": "/x", "kernel": "/x"}).reasons(validate(reduced()))
    assert [reason.split(":")[0] for reason in reasons] == ["disk3", "kernel"]


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000, '{"a":' * 100 + "1" + "}" * 100, '{"driver": "a\\u0000b"}', '{"a"']
)
def test_json_that_no_option_holds_is_refused(text: str) -> None:
    with pytest.raises(IncompatibleError, match="cannot read the JSON of an option"):
        split_keyval(text)
