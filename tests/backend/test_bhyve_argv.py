"""bhyve's command line is read as bhyve reads it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backend.bhyve_samples import ARGV, DIRECTORY, MAC, UUID
from bhystream.backend.bhyve import command, config
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.errors import AccessError, IncompatibleError, InputOutputError


def test_the_argv_of_a_vm_bhyve_guest_becomes_keys() -> None:
    assert parse_argv(ARGV) == {
        "name": "web1",
        "cpus": "2",
        "memory.size": "4G",
        "acpi_tables": "true",
        "x86.vmexit_on_hlt": "true",
        "x86.vmexit_on_pause": "true",
        "x86.strictmsr": "false",
        "rtc.use_localtime": "false",
        "uuid": UUID,
        "lpc.bootrom": "/usr/local/share/uefi-firmware/BHYVE_UEFI.fd",
        "lpc.bootvars": f"{DIRECTORY}/uefi-vars.fd",
        "lpc.com1.path": "/dev/nmdm-web1.1A",
        "pci.0.0.0.device": "hostbridge",
        "pci.0.31.0.device": "lpc",
        "pci.0.4.0.device": "virtio-blk",
        "pci.0.4.0.path": f"{DIRECTORY}/disk0.img",
        "pci.0.5.0.device": "ahci",
        "pci.0.5.0.port.0.type": "hd",
        "pci.0.5.0.port.0.path": f"{DIRECTORY}/disk1.img",
        "pci.0.5.0.port.0.ro": "true",
        "pci.0.6.0.device": "virtio-net",
        "pci.0.6.0.backend": "tap0",
        "pci.0.6.0.mac": MAC,
        "pci.0.7.0.device": "virtio-rnd",
        "pci.0.8.0.device": "fbuf",
        "pci.0.8.0.tcp": "0.0.0.0:5900",
        "pci.0.8.0.w": "1024",
        "pci.0.8.0.h": "768",
        "pci.0.8.0.password": "secret",
        "pci.0.8.0.wait": "true",
        "pci.0.9.0.device": "xhci",
        "pci.0.9.0.slot.1.device": "tablet",
    }


def test_argv_to_keys_to_file_to_keys_is_the_same_guest() -> None:
    found = config.split(parse_argv(ARGV))
    again = config.read(command.config_file(found.full), "web1")
    assert (again.full, again.section) == (found.full, found.section)


@pytest.mark.parametrize(
    ("argv", "keys"),
    [
        ("-c 4", {"cpus": "4"}),
        ("-c4", {"cpus": "4"}),
        ("-c cpus=8,sockets=2,cores=4", {"cpus": "8", "sockets": "2", "cores": "4"}),
        ("-c sockets=1,threads=2", {"sockets": "1", "threads": "2"}),
        ("-m 512", {"memory.size": "512"}),
        ("-xI -W", {"x86.x2apic": "true", "virtio_msix": "false"}),
        ("-x -a", {"x86.x2apic": "false"}),
        ("-CDS", {"memory.guest_in_core": "true", "destroy_on_poweroff": "true",
                  "memory.wired": "true"}),
        ("-A -- web1", {"acpi_tables": "true", "name": "web1"}),
        ("-s 3,ahci", {"pci.0.3.0.device": "ahci"}),
        ("-s 3,xhci", {"pci.0.3.0.device": "xhci"}),
        ("-Ye", {"x86.mptable": "false", "x86.strictio": "true"}),
        ("-K us_unix", {"keyboard.layout": "us_unix"}),
        ("-G 1234", {"gdb.port": "1234"}),
        ("-G w[::1]:9", {"gdb.wait": "true", "gdb.address": "[::1]", "gdb.port": "9"}),
        ("-p 0:3 -p 0:5 -p 1:4", {"vcpu.0.cpuset": "3,5", "vcpu.1.cpuset": "4"}),
        ("-o cpus=2 -o cpus=3", {"cpus": "3"}),
        ("-U X -o uuid=Y", {"uuid": "Y"}),
        ("-M", {"monitor": "true"}),
        ("-NM", {"monitor": "true"}),
        ("-r /x/a.save -A", {"acpi_tables": "true"}),
        ("-l COM2,stdio", {"lpc.com2.path": "stdio"}),
        ("-l bootrom,/a.fd", {"lpc.bootrom": "/a.fd"}),
        ("-l bootrom,/a.fd,fwcfg=qemu", {"lpc.bootrom": "/a.fd", "lpc.fwcfg": "qemu"}),
        ("-l bootrom,/a.fd,/v.fd,fwcfg=qemu",
         {"lpc.bootrom": "/a.fd", "lpc.bootvars": "/v.fd", "lpc.fwcfg": "qemu"}),
        ("-l tpm,passthru,/dev/tpm0",
         {"tpm.type": "passthru", "tpm.path": "/dev/tpm0", "tpm.version": "2.0"}),
        ("-l pc-testdev", {"lpc.pc-testdev": "true"}),
        ("-n id=1,size=2G,cpus=0-3,domain_policy=prefer:0",
         {"domains.1.size": "2G", "domains.1.cpus": "0-3", "domains.1.domain_policy": "prefer:0"}),
        ("-s 3,virtio-rnd", {"pci.0.3.0.device": "virtio-rnd"}),
        ("-s 3:1,virtio-rnd", {"pci.0.3.1.device": "virtio-rnd"}),
        ("-s 1:3:7,virtio-rnd", {"pci.1.3.7.device": "virtio-rnd"}),
        ("-s 31,lpc,fwcfg=qemu", {"pci.0.31.0.device": "lpc", "pci.0.31.0.fwcfg": "qemu"}),
        ("-s 0,amd_hostbridge",
         {"pci.0.0.0.device": "hostbridge", "pci.0.0.0.pcireg.vendor": "0x1022",
          "pci.0.0.0.pcireg.device": "0x7432", "pci.0.0.0.vendor": "0x1022",
          "pci.0.0.0.devid": "0x7432"}),
        ("-s 3,ahci-cd,/a.iso,ro,bootindex=1",
         {"pci.0.3.0.device": "ahci", "pci.0.3.0.port.0.type": "cd",
          "pci.0.3.0.port.0.path": "/a.iso", "pci.0.3.0.port.0.ro": "true",
          "pci.0.3.0.port.0.bootindex": "1"}),
        ("-s 3,ahci,hd:/a,nocache,cd:/b,hd:/c,ser=Z",
         {"pci.0.3.0.device": "ahci",
          "pci.0.3.0.port.0.type": "hd", "pci.0.3.0.port.0.path": "/a",
          "pci.0.3.0.port.0.nocache": "true",
          "pci.0.3.0.port.1.type": "cd", "pci.0.3.0.port.1.path": "/b",
          "pci.0.3.0.port.2.type": "hd", "pci.0.3.0.port.2.path": "/c",
          "pci.0.3.0.port.2.ser": "Z"}),
        ("-s 3,virtio-blk,/a,sectorsize=512/4096,ser=X",
         {"pci.0.3.0.device": "virtio-blk", "pci.0.3.0.path": "/a",
          "pci.0.3.0.sectorsize": "512/4096", "pci.0.3.0.ser": "X"}),
        ("-s 3,e1000,tap1,mac=58:9c:fc:00:00:01",
         {"pci.0.3.0.device": "e1000", "pci.0.3.0.backend": "tap1",
          "pci.0.3.0.mac": "58:9c:fc:00:00:01"}),
        ("-s 3,virtio-net,vale0:1,mtu=9000",
         {"pci.0.3.0.device": "virtio-net", "pci.0.3.0.backend": "vale0:1",
          "pci.0.3.0.mtu": "9000"}),
        ("-s 3,nvme,/a,maxq=4",
         {"pci.0.3.0.device": "nvme", "pci.0.3.0.path": "/a", "pci.0.3.0.maxq": "4"}),
        ("-s 3,nvme,ram=16", {"pci.0.3.0.device": "nvme", "pci.0.3.0.ram": "16"}),
        ("-s 3,virtio-console,org=/a.sock",
         {"pci.0.3.0.device": "virtio-console", "pci.0.3.0.port.0.name": "org",
          "pci.0.3.0.port.0.path": "/a.sock"}),
        ("-s 3,virtio-9p,share=/a,ro",
         {"pci.0.3.0.device": "virtio-9p", "pci.0.3.0.sharename": "share",
          "pci.0.3.0.path": "/a", "pci.0.3.0.ro": "true"}),
        ("-s 3,virtio-scsi,/dev/cam/ctl1.2,iid=3",
         {"pci.0.3.0.device": "virtio-scsi", "pci.0.3.0.dev": "/dev/cam/ctl1.2",
          "pci.0.3.0.iid": "3"}),
        ("-s 3,virtio-input,/dev/input/event4",
         {"pci.0.3.0.device": "virtio-input", "pci.0.3.0.path": "/dev/input/event4"}),
        ("-s 3,hda,play=/dev/dsp0",
         {"pci.0.3.0.device": "hda", "pci.0.3.0.play": "/dev/dsp0"}),
        ("-s 3,uart,/dev/nmdm0A", {"pci.0.3.0.device": "uart", "pci.0.3.0.path": "/dev/nmdm0A"}),
        ("-s 3,passthru,2/0/1,rom=/x",
         {"pci.0.3.0.device": "passthru", "pci.0.3.0.bus": "2", "pci.0.3.0.slot": "0",
          "pci.0.3.0.func": "1", "pci.0.3.0.rom": "/x"}),
        ("-s 3,passthru,ppt0", {"pci.0.3.0.device": "passthru", "pci.0.3.0.pptdev": "ppt0"}),
    ],
)  # fmt: skip
def test_each_option_sets_its_keys(argv: str, keys: dict[str, str]) -> None:
    assert parse_argv(argv.split()) == keys


def test_an_empty_topology_is_one_cpu() -> None:
    assert parse_argv(["-c", ""]) == dict.fromkeys(("cpus", "sockets", "cores", "threads"), "1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("-Z", "option -Z is not known"),
        ("-AQ", "option -Q is not known"),
        ("-m", "option -m: its argument is missing"),
        ("-f name=opt/x,file=/etc/passwd", "option -f: fw_cfg files"),
        ("-n size=1G", "option -n 'size=1G': its id is missing"),
        ("-n id=8,size=1G", "its id is missing, or beyond 7"),
        ("-n id=0,cpus=0,1", "option -n 'id=0,cpus=0,1': '1' is not known"),
        ("-n id=0,size=", "'size' is not known"),
        ("-h", "option -h"),
        ("-c 2,dies=2", "option -c '2,dies=2': 'dies=2' is not known"),
        ("-o cpus", "option -o 'cpus': say key=value"),
        ("-o =4", "option -o '=4': say key=value"),
        ("-c cpus=", "'cpus=' is not known"),
        ("-\x1b", r"option -'\\x1b' is not known"),
        ("-l tpm,,/dev/tpm0", "say tpm,type,path"),
        ("-s 3,fbuf,=1", "'=1' is no option"),
        ("-s 3,fbuf,a/b", "'a/b' is no option"),
        ("-s 3,ahci,hd", "say hd:PATH or cd:PATH"),
        ("-s 3,ahci,xd:/a", "say hd:PATH or cd:PATH"),
        ("-o cpus=", "option -o 'cpus=': say key=value"),
        ("-p 0-3", "option -p '0-3': say vcpu:hostcpu"),
        ("-l com5,/x", "the device 'com5' is not known"),
        ("-l com1", "its path is missing"),
        ("-l bootrom", "its path is missing"),
        ("-l tpm,passthru", "say tpm,type,path"),
        ("-s 3", "say slot"),
        ("-s 99,lpc", "no such slot"),
        ("-s 3:8,lpc", "say slot"),
        ("-s 300:1:0,lpc", "no such slot"),
        ("-s x,lpc", "say slot"),
        ("-s 3,virtio-gpu", "the device 'virtio-gpu' is not known"),
        ("-s 3,virtio-blk", "its path is missing"),
        ("-s 3,virtio-blk,,ro", "its path is missing"),
        ("-s 3,ahci,/a", "say hd:PATH or cd:PATH"),
        ("-s 3,passthru,x", "no device of the host"),
        ("-s 3,fbuf,w=", "'w=' is no option"),
        ("-s 3,lpc -s 3:0,lpc", "pci.0.3.0 is given twice"),
        ("web1 web2", "follows the guest's name: a second name"),
    ],
)
def test_what_bhyve_would_not_take_is_refused_by_name(argv: str, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        parse_argv(argv.split())


def test_a_configuration_file_is_read_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "web1.conf"
    path.write_text("cpus=8\nmemory.size=1G\n")
    keys = parse_argv(["-c", "2", "-k", str(path), "-m", "2G", "web1"])
    assert keys == {"cpus": "8", "memory.size": "2G", "name": "web1"}


def test_a_configuration_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((InputOutputError, AccessError), match="cannot read"):
        parse_argv(["-k", str(tmp_path / "none")])


def test_a_configuration_file_is_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"pci.0.3.0.path=/d\xff\xc3\xa0")
    keys = parse_argv(["-k", str(tmp_path / "x"), "web1"])
    assert os.fsencode(keys["pci.0.3.0.path"]) == b"/d\xff\xc3\xa0"
