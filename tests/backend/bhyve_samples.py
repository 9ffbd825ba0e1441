"""A vm-bhyve guest's files in the documented formats, for the tests of configurations."""

from __future__ import annotations

from pathlib import Path

UUID = "4ca2e2b7-6f0b-11ef-8a6a-0cc47a8c1a2e"
MAC = "58:9c:fc:0a:1b:2c"
DIRECTORY = "/zroot/vm/web1"
DEVICES = (
    "-s 0,hostbridge -s 31,lpc"
    f" -s 0:4:0,virtio-blk,{DIRECTORY}/disk0.img"
    f" -s 0:5:0,ahci-hd,{DIRECTORY}/disk1.img,ro"
    f" -s 0:6:0,virtio-net,tap0,mac={MAC}"
    " -s 0:7:0,virtio-rnd"
    " -s 0:8:0,fbuf,tcp=0.0.0.0:5900,w=1024,h=768,password=secret,wait"
    " -s 0:9:0,xhci,tablet"
)
OPTIONS = (
    "-c 2 -m 4G -AHPw"
    f" -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd,{DIRECTORY}/uefi-vars.fd"
    f" -U {UUID} -u"
)
CONSOLE = "-l com1,/dev/nmdm-web1.1A"
ARGV = [*DEVICES.split(), *OPTIONS.split(), *CONSOLE.split(), "web1"]
CONF = f"""loader="uefi"
uefi_vars="yes"
cpu=2
memory=4G
network0_type="virtio-net"
network0_switch="public"
disk0_type="virtio-blk"
disk0_name="disk0.img"
disk1_type="ahci-hd"
disk1_name="disk1.img"
disk1_opts="ro"
graphics="yes"
uuid="{UUID}"
network0_mac="{MAC}"
"""


def log_of(options: str = OPTIONS, devices: str = DEVICES, run: int = 1, iso: str = "") -> str:
    """Return the lines that one start leaves in vm-bhyve.log."""
    when = "2026-02-03T04:05:06+00:00: "
    lines = [
        "initialising",
        " [loader: uefi]",
        " [cpu: 2]",
        "initialising network device tap0",
        "booting",
        f" [bhyve options: {options}]",
        f" [bhyve devices: {devices}]",
        f" [bhyve console: {CONSOLE}]",
        *([f" [bhyve iso device: {iso}]"] if iso else []),
        f"starting bhyve (run {run})",
    ]
    return "".join(f"{when}{line}\n" for line in lines)


def make_guest(datastore: Path, log: str | None = None, conf: str = CONF) -> Path:
    """Make web1's directory in a datastore and return it."""
    directory = datastore / "web1"
    directory.mkdir(parents=True)
    (directory / "web1.conf").write_text(conf)
    (directory / "vm-bhyve.log").write_text(log_of() if log is None else log)
    return directory
