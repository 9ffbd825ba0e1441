"""bhyve_config(5) text becomes a CONFIG section; a key that cannot travel is refused by name."""

from __future__ import annotations

import hashlib
import json

import pytest

from bhystream.backend.bhyve import command, config
from bhystream.backend.bhyve.defaults import default_mac, default_serial, memory_bytes, topology
from bhystream.backend.bhyve.keys import Slot
from bhystream.backend.bhyve.validate import validate
from bhystream.errors import IncompatibleError

UUID = "4ca2e2b7-6f0b-11ef-8a6a-0cc47a8c1a2e"
FILE = f"""# web1
cpus=4
cores=2
sockets=2
memory.size=4G
uuid={UUID.upper()}
acpi_tables=yes
x86.strictmsr=OFF
gdb.port=1234
vcpu.0.cpuset=3
pci.0.0.0.device=hostbridge
pci.0.31.0.device=lpc
pci.0.10.0.device=virtio-blk
pci.0.10.0.path=/dev/zvol/tank/%(name)-data
pci.0.10.0.ser=DATA
pci.0.3.0.device=ahci
pci.0.3.0.port.0.type=hd
pci.0.3.0.port.0.path=/dev/zvol/tank/%(name)
pci.0.3.0.port.1.type=cd
pci.0.3.0.port.1.path=/iso/seed.iso
pci.0.4.0.device=virtio-net
pci.0.4.0.backend=tap7
pci.0.4.0.mac=58:9C:FC:0:1:2
pci.0.5.0.device=fbuf
pci.0.5.0.tcp=127.0.0.1:5901
pci.0.5.0.password=secret
lpc.com1.path=/dev/nmdm0A
lpc.bootrom=/rom.fd
"""


def test_a_file_becomes_a_section() -> None:
    section = config.read(FILE, "web1").section
    assert section["name"] == "web1"
    assert section["resources"] == {
        "disk0": "pci.0.3.0.port.0.path",
        "disk1": "pci.0.3.0.port.1.path",
        "disk2": "pci.0.10.0.path",
        "net0": "pci.0.4.0.backend",
        "com1": "lpc.com1.path",
        "bootrom": "lpc.bootrom",
        "vnc": "pci.0.5.0.rfb",
    }
    keys = section["keys"]
    assert keys["cpus"] == "4" and keys["sockets"] == "2" and keys["threads"] == "1"
    assert keys["memory.size"] == str(4 << 30)
    assert keys["uuid"] == UUID
    assert keys["acpi_tables"] == "true" and keys["x86.strictmsr"] == "false"
    assert keys["pci.0.4.0.mac"] == "58:9c:fc:00:01:02"
    assert keys["pci.0.10.0.ser"] == "DATA"


def test_no_resource_of_the_host_is_in_the_section() -> None:
    text = json.dumps(config.read(FILE, "web1").section["keys"])
    for word in ("/", "tap7", "127.0.0.1", "secret", "1234", "cpuset", "nmdm"):
        assert word not in text


def test_a_section_of_ours_passes_our_own_check() -> None:
    section = config.read(FILE, "web1").section
    assert validate(json.loads(json.dumps(section))) == section


def test_the_source_keeps_its_own_keys_whole() -> None:
    found = config.read(FILE, "web1")
    again = config.read(command.config_file(found.full), "web1")
    assert again.full == found.full and again.section == found.section
    assert found.full["pci.0.3.0.port.0.path"] == "/dev/zvol/tank/web1"
    assert found.full["pci.0.5.0.password"] == "secret"
    assert found.resources()["pci.0.5.0.rfb"] == "127.0.0.1:5901"


def test_a_section_and_its_resources_make_the_same_machine() -> None:
    found = config.read(FILE, "web1")
    text = command.config_file({**found.section["keys"], **found.resources()})
    assert config.read(text, "web1").section == found.section


def test_the_last_of_a_key_wins_and_comments_stand_at_the_start_only() -> None:
    assert config.parse("a=1\n#a=2\na=3 # not a comment\n\n") == {"a": "3 # not a comment"}


def test_a_reference_is_replaced_also_by_a_later_line() -> None:
    assert config.expand(config.parse("a=/x/%(b)/y\nb=%(c)\nc=z"))["a"] == "/x/z/y"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("novalue", "line 1: 'novalue' is not key=value"),
        ("a=1\nb=", "line 2: 'b=' is not key=value"),
        ("=1", "line 1: '=1' is not key=value"),
        ("a b=1", "line 1: 'a b' is no key"),
        ("a=" + "x" * (300 << 10), "longer than"),
        ("\n".join(f"k{n}=1" for n in range(1025)), "more than 1024 keys"),
    ],
)
def test_a_malformed_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        config.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=%(b)", r"a: '%\(b\)' refers to a key that is not set"),
        ("a=%(a)", "a: its references do not end"),
        ("a=100%", "a % that is no reference"),
        ("a=%%(b)\nb=1", "a % that is no reference"),
        ("a=%(b", "a % that is no reference"),
        ("a=\\%(b)\nb=1", "a % that is no reference"),
        ("a=x\tb", "not printable"),
        ("a=" + "x" * 1024, "too long"),
        ("b=" + "x" * 1000 + "\na=%(b)%(b)", "a: .* too long"),
    ],
)
def test_a_value_that_bhyve_would_not_read_as_we_do_is_refused(text: str, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        config.expand(config.parse(text))


def test_references_that_multiply_are_stopped_early() -> None:
    text = "\n".join(f"k{n}=%(k{n + 1})%(k{n + 1})%(k{n + 1})" for n in range(15)) + "\nk15=xxxx"
    with pytest.raises(IncompatibleError, match="too long"):
        config.expand(config.parse(text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pci.0.9.0.foo=1", "^configuration: key pci.0.9.0.foo is not known$"),
        ("pci.0.4.0.foo=1", "key pci.0.4.0.foo is not known"),
        ("pci.0.4.0=virtio-net", "key pci.0.4.0 is not known"),
        ("pci.0.3.0.porto=1", "key pci.0.3.0.porto is not known"),
        ("pci.0.4.0.mtu=09", "pci.0.4.0.mtu: '09' is not allowed"),
        ("pci.0.4.0.mtu=9e3", "pci.0.4.0.mtu: '9e3' is not allowed"),
        ("pci.0.3.0.port.32.type=hd", "key pci.0.3.0.port.32.type is not known"),
        ("pci.0.04.0.mac=58:9c:fc:00:00:01", "key pci.0.04.0.mac is not known"),
        ("bogus=1", "key bogus is not known"),
        ("domains.0.size=1G", "domains.0.cpus is missing"),
        ("domains.1.cpus=0", "domains.1: there is no domains.0"),
        ("domains.8.cpus=0", "key domains.8.cpus is not known"),
        ("domains.0.cpus=0-x", "domains.0.cpus: '0-x' is not allowed"),
        ("domains.0.cpus=3-1", "domains.0.cpus: '3-1' is not allowed"),
        ("lpc.pc-testdev=on", "bhyve does not save lpc.pc-testdev"),
        ("pci.enable_bars=maybe", "pci.enable_bars: 'maybe' is not allowed"),
        ("lpc.com5.path=/dev/nmdm9A", "key lpc.com5.path is not known"),
        ("pci.0.9.0.device=nvme2", r"pci.0.9.0.device: 'nvme2' is not allowed"),
        ("pci.0.9.0.device=nvme", "bhyve does not save nvme@pci.0.9.0"),
        ("pci.0.9.0.device=passthru", "bhyve does not save passthru@pci.0.9.0"),
        ("tpm.type=passthru", "bhyve does not save tpm"),
        ("tpm.intf=crb", "bhyve does not save tpm"),
        ("tpm.ppi=qemu", "bhyve does not save tpm"),
        ("pci.0.9.0.device=lpc", "a second lpc"),
        ("pci.0.9.0.device=fbuf", "a second fbuf"),
        ("pci.0.3.0.port.2.path=/x", "pci.0.3.0.port.2.type is missing"),
        ("pci.0.4.0.backend=vale0:1", "vale0:1' cannot travel, only tap, vmnet, ngd, netgraph"),
        ("pci.0.4.0.type=netmap", "netmap' cannot travel"),
        ("pci.0.4.0.mac=01:00:00:00:00:01", "pci.0.4.0.mac: .* is not allowed"),
        ("pci.0.31.0.pcireg.vendor=host", "pcireg.vendor: 'host' is not allowed"),
        ("keyboard.layout=../../etc/passwd", "keyboard.layout: .* is not allowed"),
        ("cpus=5", "2 sockets of 2 cores of 1 threads are not 5 cpus"),
        ("cores=65535", "are not 4 cpus"),
        ("cpus=many", "cpus: 'many' is no number"),
        ("memory.size=4X", "memory.size: '4X' is no size"),
        ("memory.size=5000000b", "no multiple of 4096"),
        ("acpi_tables=perhaps", "acpi_tables: 'perhaps' is not allowed"),
    ],
)
def test_what_cannot_travel_is_refused_by_name(line: str, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        config.read(FILE + line + "\n", "web1")


def test_more_cpus_than_bhyve_counts_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="are not at most 65535 cpus"):
        topology({"sockets": "65535", "cores": "2"})


@pytest.mark.parametrize(("mtu", "made"), [("0x5dc", "1500"), ("02734", "1500"), ("1500", "1500")])
def test_a_number_is_read_as_bhyve_does(mtu: str, made: str) -> None:
    found = config.read(f"{FILE}pci.0.4.0.mtu={mtu}\n", "web1")
    assert found.section["keys"]["pci.0.4.0.mtu"] == made


def test_a_guest_without_a_size_has_bhyves() -> None:
    found = config.read(FILE.replace("memory.size=4G\n", ""), "web1")
    assert found.section["keys"]["memory.size"] == str(256 << 20)
    assert found.full["memory.size"] == "256M"


@pytest.mark.parametrize("key", ["a\x1bb", "k" * 200, "a..b"])
def test_a_strange_key_is_shown_short_and_plain(key: str) -> None:
    keys = config.parse(FILE) | {key: "1"}
    with pytest.raises(IncompatibleError, match="is not known") as caught:
        config.split(keys, "web1")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 140


def test_a_missing_uuid_is_refused_with_its_cure() -> None:
    text = FILE.replace(f"uuid={UUID.upper()}\n", "")
    with pytest.raises(IncompatibleError, match="uuid is not set: the default changes") as caught:
        config.read(text, "web1")
    assert "set uuid=UUID in the file of -C to the one that the guest shows" in caught.value.hint


def test_a_missing_mac_is_what_bhyve_makes_of_slot_function_and_name() -> None:
    text = FILE.replace("pci.0.4.0.mac=58:9C:FC:0:1:2\n", "")
    found = config.read(text, "web1")
    digest = hashlib.md5(b"4-0-web1").hexdigest()
    made = f"00:a0:98:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"
    assert found.section["keys"]["pci.0.4.0.mac"] == made == default_mac(Slot(0, 4, 0), "web1")
    assert found.full["pci.0.4.0.mac"] == made and "pci.0.4.0.mac" in found.computed


def test_a_missing_serial_is_what_bhyve_makes_of_the_path() -> None:
    keys = config.read(FILE, "web1").section["keys"]
    digest = hashlib.md5(b"/dev/zvol/tank/web1").hexdigest().upper()
    made = f"BHYVE-{digest[:4]}-{digest[4:8]}-{digest[8:12]}"
    assert keys["pci.0.3.0.port.0.ser"] == made == default_serial("/dev/zvol/tank/web1")
    assert len(made) == 20


def test_a_serial_by_its_other_name_is_enough() -> None:
    keys = config.read(FILE.replace("pci.0.10.0.ser", "pci.0.10.0.serial"), "web1").section["keys"]
    assert keys["pci.0.10.0.serial"] == "DATA" and "pci.0.10.0.ser" not in keys


def test_a_disk_without_path_and_serial_is_refused_with_its_cure() -> None:
    with pytest.raises(IncompatibleError, match=r"pci.0.12.0.ser is not set: the default") as e:
        config.read(FILE + "pci.0.12.0.device=virtio-blk\n", "web1")
    assert e.value.hint == "set pci.0.12.0.ser"


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [
        ("512", 512 << 20), ("1048576", 1 << 20), ("256M", 256 << 20), ("4g", 4 << 30),
        ("1T", 1 << 40), ("4096K", 4 << 20), ("0x100", 256 << 20), ("8192B", 8192),
        ("1048575", 1048575 << 20), ("010", 8 << 20),
    ],
)  # fmt: skip
def test_a_memory_size_is_read_as_bhyve_does(size: str, size_bytes: int) -> None:
    assert memory_bytes(size) == size_bytes


@pytest.mark.parametrize("size", ["", "G", "4 G", "-1", "1.5G", "0", "4GG", "09", "1" * 40])
def test_what_is_no_memory_size_is_refused(size: str) -> None:
    with pytest.raises(IncompatibleError, match=r"memory\.size"):
        memory_bytes(size)


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({}, (1, 1, 1, 1)),
        ({"cpus": "4"}, (4, 4, 1, 1)),
        ({"sockets": "2", "cores": "2", "threads": "2"}, (8, 2, 2, 2)),
        ({"cores": "4"}, (4, 1, 4, 1)),
    ],
)
def test_the_topology_is_made_explicit(
    given: dict[str, str], counts: tuple[int, int, int, int]
) -> None:
    wanted = dict(zip(("cpus", "sockets", "cores", "threads"), map(str, counts), strict=True))
    assert topology(given) == wanted


def test_the_devices_are_named_as_the_snapshot_names_them() -> None:
    assert config.devices(config.read(FILE, "web1").section) == (
        "hostbridge@pci.0.0.0",
        "ahci@pci.0.3.0",
        "virtio-net@pci.0.4.0",
        "fbuf@pci.0.5.0",
        "virtio-blk@pci.0.10.0",
        "lpc@pci.0.31.0",
        "atkbdc",
    )


@pytest.mark.parametrize("name", ["", "..", ".", "-r", "a/b", "a" * 65, "a b"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(IncompatibleError, match="name: "):
        config.read(FILE, name)


def test_either_name_of_the_boot_rom_will_do() -> None:
    found = config.read(FILE + "bootrom=/new.fd\n", "web1")
    assert found.section["resources"]["bootrom"] == "lpc.bootrom"
    assert found.full["lpc.bootrom"] == "/new.fd" and "bootrom" not in found.full


def test_a_boot_rom_is_written_under_the_names_of_every_version() -> None:
    text = command.config_file({"lpc.bootrom": "/a.fd", "lpc.bootvars": "/v.fd"})
    assert text.splitlines() == [
        "bootrom=/a.fd",
        "bootvars=/v.fd",
        "lpc.bootrom=/a.fd",
        "lpc.bootvars=/v.fd",
    ]


NUMA = FILE.replace("memory.size=4G\n", "")


def test_memory_domains_travel_with_their_sum() -> None:
    text = f"""{NUMA}memory.size=1G
domains.0.size=1G
domains.0.cpus=0x0,2-3
domains.0.domain_policy=prefer:0
domains.1.size=3072
domains.1.cpus=1
"""
    found = config.read(text, "web1")
    keys = found.section["keys"]
    assert keys["domains.0.size"] == str(1 << 30) and keys["domains.1.size"] == str(3 << 30)
    assert keys["memory.size"] == str(4 << 30), "bhyve passes over a memory.size of its own"
    assert keys["domains.0.cpus"] == "0,2-3" and "domains.0.domain_policy" not in keys
    assert found.full["domains.0.domain_policy"] == "prefer:0"
    assert validate(json.loads(json.dumps(found.section))) == found.section


def test_domains_share_the_memory_where_one_has_no_size() -> None:
    text = f"{NUMA}memory.size=4G\ndomains.0.size=1G\ndomains.0.cpus=0\ndomains.1.cpus=1-3\n"
    keys = config.read(text, "web1").section["keys"]
    assert keys["domains.0.size"] == keys["domains.1.size"] == str(2 << 30)
    with pytest.raises(IncompatibleError, match=r"memory.size: 3 domains cannot share it"):
        config.read(f"{text}domains.2.cpus=0\n", "web1")


@pytest.mark.parametrize(
    "lines",
    [
        "pci.0.4.0.backend=netgraph\npci.0.4.0.path=sw:\npci.0.4.0.peerhook=link1\n"
        "pci.0.4.0.socket=web1\npci.0.4.0.hook=vmlink",
        "pci.0.4.0.backend=slirp\npci.0.4.0.open=true\npci.0.4.0.hostfwd=tcp:1.2.3.4:22-:22",
        "pci.0.4.0.backend=ngd0",
        "pci.0.4.0.backend=em7\npci.0.4.0.type=tap",
    ],
)
def test_a_card_travels_without_what_its_backend_is_here(lines: str) -> None:
    found = config.read(f"{FILE}{lines}\n", "web1")
    card = {key for key in found.section["keys"] if key.startswith("pci.0.4.0.")}
    assert card == {"pci.0.4.0.device", "pci.0.4.0.mac"}
    assert found.section["resources"]["net0"] == "pci.0.4.0.backend"
    assert {line.partition("=")[0] for line in lines.split("\n")} <= found.full.keys()


def test_whether_bars_are_enabled_travels() -> None:
    found = config.read(f"{FILE}pci.enable_bars=on\nlpc.pc-testdev=no\n", "web1")
    assert found.section["keys"]["pci.enable_bars"] == "true"
    assert found.section["keys"]["lpc.pc-testdev"] == "false"


def test_a_later_key_travels_under_the_name_that_all_versions_know() -> None:
    found = config.read(FILE + "virtio_msix=true\nvirtio.msix=off\n", "web1")
    assert found.section["keys"]["virtio_msix"] == "false"
    assert "virtio.msix" not in found.full


def test_what_matters_to_a_monitor_only_is_dropped() -> None:
    text = f"{FILE}monitor=true\nmonitor.enabled=yes\nmonitor.no_reboot=true\n"
    found = config.read(text, "web1")
    assert not [key for key in found.full if key.startswith("monitor")]


def test_the_command_names_the_file_the_snapshot_and_the_guest() -> None:
    words = command.argv(["/usr/sbin/bhyve"], "web2", "/run/web2.conf", "/run/web2.ckp")
    assert words == ["/usr/sbin/bhyve", "-k", "/run/web2.conf", "-r", "/run/web2.ckp", "web2"]
    with pytest.raises(IncompatibleError, match="cannot be a guest's"):
        command.argv(["bhyve"], "-r", "/c", "/s")


def test_a_tap_of_another_name_gets_its_type() -> None:
    text = command.config_file({"cpus": "1", "pci.0.4.0.backend": "web0"})
    assert text == "cpus=1\npci.0.4.0.backend=web0\npci.0.4.0.type=tap\n"
    for backend in ("tap3", "vmnet1", "ngd0", "netgraph", "slirp"):
        assert "type" not in command.config_file({"pci.0.4.0.backend": backend})


@pytest.mark.parametrize("value", ["a\nmonitor=true", "", "100%"])
def test_a_value_that_would_be_read_otherwise_is_not_written(value: str) -> None:
    with pytest.raises(IncompatibleError, match="cannot be written"):
        command.config_file({"uuid": value})
    with pytest.raises(IncompatibleError, match="cannot be written"):
        command.config_file({"#uuid": "1"})
