"""Every word of a QEMU configuration that may travel, and every word that stays.

Both ends use these lists: the source refuses an option, a driver or a property
that is not here before anything is sent, and the destination refuses a stream
that holds such a word, whatever wrote the stream.  Every word here must be
harmless even in a hostile stream: the word describes the guest's hardware and
names no file, program, address or descriptor of the host.

Before you add a word, find out what QEMU does with a hostile value.  Never add
a property that takes a path, or the id of an object that takes a path.
"""

from __future__ import annotations

import re

# A value: no comma (QEMU's separator), no slash, no white space, no quote.
VALUE = re.compile(r"[A-Za-z0-9._:+-]{0,128}")
WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Ids that bhyrecv makes itself begin with RESERVED.
IDENT = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
RESERVED = "bhyrecv"
# LAYOUT allows a segment name 31 bytes.
RAM_IDENT = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}")
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MACHINE = re.compile(r"pc-(q35|i440fx)-[a-z0-9][a-z0-9.-]{0,39}|microvm")
CPU_FEATURE = re.compile(r"[+-]?[A-Za-z][A-Za-z0-9._-]{0,63}(=[A-Za-z0-9._:+ -]{0,64})?")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# The guest's own kernel command line, and SMBIOS strings: text, not words.
APPEND = re.compile(r"[\x20-\x7e]{0,4095}")
SMBIOS_TEXT = re.compile(r"[A-Za-z0-9._:+() -]{0,128}")


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


ARCHES = _words("x86_64")
ACCELS = _words("tcg kvm")
ACCEL_PROPS = _words("thread kernel-irqchip")
ACCEL_HOST_PROPS = _words("tb-size split-wx one-insn-per-tb dirty-ring-size")

MACHINE_PROPS = _words(
    "smm sata smbus vmport i8042 hpet acpi pit pic rtc isa-serial pcie auto-kernel-cmdline",
    "x-option-roms ioapic2 usb graphics dump-guest-core mem-merge kernel-irqchip",
    "suppress-vmdesc max-fw-size max-ram-below-4g fd-bootchk smbios-entry-point-type",
    "default-bus-bypass-iommu nvdimm hmat",
)
SMP_KEYS = _words("cpus maxcpus sockets dies clusters cores threads")
BOOT_KEYS = _words("order menu strict reboot-timeout splash-time")
BOOT_HOST_KEYS = _words("once")  # the guest's first boot has used it up
RTC_KEYS = _words("base clock driftfix")
ACTION_KEYS = _words("reboot shutdown panic watchdog")
SMBIOS_KEYS = _words(
    "vendor version date release uefi manufacturer product serial uuid sku family asset",
    "location sock_pfx part loc_pfx bank",
)
FLAGS = _words("no-reboot no-shutdown no-hpet no-acpi no-fd-bootchk usb")
VGAS = _words("none std cirrus")

_VIRTIO = _words("virtio-blk virtio-net virtio-rng virtio-balloon virtio-scsi virtio-serial")
_VIRTIO_BUSES = _words("pci pci-transitional pci-non-transitional device")
DRIVERS = _words(
    *(f"{kind}-{bus}" for kind in _VIRTIO for bus in _VIRTIO_BUSES),
    "scsi-hd scsi-cd ide-hd ide-cd usb-storage",
    "e1000 e1000e rtl8139",
    "VGA bochs-display cirrus-vga",
    "isa-serial virtserialport virtconsole",
    "pcie-root-port pcie-pci-bridge pci-bridge ich9-ahci",
    "qemu-xhci piix3-usb-uhci usb-ehci usb-tablet usb-kbd usb-mouse",
    "vmcoreinfo pvpanic pvpanic-pci isa-debug-exit i6300esb",
)

# Property -> the kind of thing it must name.  A reference outside the configuration is refused.
REFERENCES = {
    "drive": "disk",
    "netdev": "net",
    "chardev": "serial",
    "rng": "rng",
    "iothread": "iothread",
}
DEVICE_PROPS = _words(
    *REFERENCES,
    # every device
    "id bus addr multifunction rombar romfile bootindex acpi-index",
    # virtio
    "disable-legacy disable-modern packed event_idx indirect_desc ats vectors ioeventfd",
    "page-per-vq modern-pio-notify notify_on_empty any_layout iommu_platform",
    # disks
    "serial num-queues queue-size write-cache discard write-zeroes logical_block_size",
    "physical_block_size min_io_size opt_io_size discard_granularity config-wce share-rw",
    "rerror werror cyls heads secs max-discard-sectors max-write-zeroes-sectors seg-max-adjust",
    "request-merging report-discard-granularity channel scsi-id lun vendor product wwn",
    "device_id rotation_rate ver model unit removable num_queues virtqueue_size max_sectors",
    "cmd_per_lun",
    # network
    "mac csum guest_csum gso guest_tso4 guest_tso6 guest_ecn guest_ufo guest_announce",
    "host_tso4 host_tso6 host_ecn host_ufo mrg_rxbuf status ctrl_vq ctrl_rx ctrl_vlan",
    "ctrl_rx_extra ctrl_mac_addr ctrl_guest_offloads host_mtu speed duplex rx_queue_size",
    "tx_queue_size tx x-txtimer x-txburst mitigation extra_mac_registers",
    # others
    "max-bytes period deflate-on-oom free-page-reporting free-page-hint index iobase iosize",
    "irq nr name max_ports port chassis slot chassis_nr hotplug io-reserve mem-reserve",
    "pref64-reserve bus-reserve vgamem_mb xres yres xmax ymax edid vgamem p2 p3 usb_version",
    "events",
)

# What -global may set as DRIVER.PROPERTY, besides the properties of the devices above.
GLOBALS = _words(
    "ICH9-LPC.disable_s3 ICH9-LPC.disable_s4 ICH9-LPC.noreboot",
    "ICH9-LPC.acpi-pci-hotplug-with-bridge-support PIIX4_PM.disable_s3 PIIX4_PM.disable_s4",
    "kvm-pit.lost_tick_policy mc146818rtc.lost_tick_policy i440FX-pcihost.pci-hole64-size",
    "q35-pcihost.pci-hole64-size virtio-mmio.force-legacy kvm-apic.vapic",
)
_NOT_GLOBAL = frozenset(REFERENCES) | _words("id bus addr romfile mac serial")

DISK_INTERFACES = _words("none virtio ide pflash")
DISK_FORMATS = _words("raw qcow2")
DISK_PROPS = _words(
    "format readonly media index bus unit cache discard detect-zeroes werror rerror",
    "cache.direct cache.no-flush cache.writeback",
)
# Properties of the source's host; the destination sets its own.
DISK_HOST_PROPS = _words(
    "file file.filename file.driver file.locking file.aio aio auto-read-only node-name"
)
# Properties that a drive may name only to switch them off.
DISK_OFF_PROPS = _words("snapshot copy-on-read force-share")
NET_BACKENDS = _words("tap user bridge socket stream dgram hubport vde")
NIC_PROPS = _words("model mac addr")
NIC_MODELS = _words("virtio-net-pci virtio e1000 e1000e rtl8139")

# Options that do not travel, because they describe the source's host, or how
# its operator runs QEMU.  True: the option takes an argument.
IGNORED = {
    "pidfile": True,
    "daemonize": False,
    "D": True,
    "d": True,
    "dfilter": True,
    "qmp": True,
    "qmp-pretty": True,
    "monitor": True,
    "mon": True,
    "S": False,
    "incoming": True,
    "sandbox": True,
    "msg": True,
    "display": True,
    "nographic": False,
    "vnc": True,
    "k": True,
    "no-user-config": False,
    "only-migratable": False,
    "overcommit": True,
    "runas": True,
    "seed": True,
    "trace": True,
    "gdb": True,
    "s": False,
    "echr": True,
    "L": True,
    "enable-sync-profile": False,
    "no-quit": False,
}


def global_allowed(name: str) -> bool:
    """Say whether -global may set "DRIVER.PROPERTY"."""
    if name in GLOBALS:
        return True
    driver, _, prop = name.partition(".")
    return driver in DRIVERS and prop in DEVICE_PROPS and prop not in _NOT_GLOBAL
