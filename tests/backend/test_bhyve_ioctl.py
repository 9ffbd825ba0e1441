"""ioctl numbers and structures, against what was read in FreeBSD's headers.

The structures that only these tests have prove the rule for the whole table: a
number contains the size of its structure.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p

import pytest

from bhystream.backend.bhyve import ioctl, registers
from bhystream.backend.bhyve.ioctl import IOC_IN, IOC_OUT, IOC_VOID, DirtyPageList, VmMemmap


def struct(*fields: object) -> type[ctypes.Structure]:
    """Make a structure of unnamed fields, laid out as a C compiler does on amd64."""
    named = tuple((f"f{index}", field) for index, field in enumerate(fields))
    return type("Struct", (ctypes.Structure,), {"_fields_": named})


INT = struct(c_int)
GPA_PMAP = struct(c_uint64, c_uint64 * 4, c_int)
MEMSEG_14 = struct(c_int, c_size_t, c_char * 16)
MEMSEG_12 = struct(c_int, c_size_t, c_char * 64)
MEMSEG_15 = struct(c_int, c_size_t, c_char * 16, c_void_p, c_size_t, c_int)
MUNMAP = struct(c_uint64, c_size_t)
SNAPSHOT = struct(c_void_p, c_void_p, c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_int)
SNAPSHOT_13 = struct(
    c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_int
)
VMMCTL = struct(c_char * 230, c_uint32, c_uint32 * 15)
PAGE = struct(c_uint64, c_void_p)
COPY_PAGES = struct(c_size_t, c_int, ioctl.Segment, ioctl.Segment, PAGE * 10)
TOPOLOGY = ioctl.VmCpuTopology
BOTH = IOC_IN | IOC_OUT

TABLE: dict[str, tuple[int, str, int, type[ctypes.Structure] | None, int]] = {
    "VM_RUN": (IOC_IN, "v", 1, ioctl.VmRun, 0x80207601),
    "VM_SET_REGISTER": (IOC_IN, "v", 20, ioctl.VmRegister, 0x80107614),
    "VM_GET_REGISTER": (BOTH, "v", 21, ioctl.VmRegister, 0xC0107615),
    "VM_SET_SEGMENT_DESCRIPTOR": (IOC_IN, "v", 22, ioctl.VmSegDesc, 0x80187616),
    "VM_GET_SEGMENT_DESCRIPTOR": (BOTH, "v", 23, ioctl.VmSegDesc, 0xC0187617),
    "VM_GET_REGISTER_SET": (BOTH, "v", 25, ioctl.VmRegisterSet, 0xC0187619),
    "VM_GET_INTINFO": (BOTH, "v", 28, ioctl.VmIntinfo, 0xC018761C),
    "VM_INJECT_NMI": (IOC_IN, "v", 32, ioctl.VmVcpu, 0x80047620),
    "VM_RTC_SETTIME": (IOC_IN, "v", 102, ioctl.VmRtcTime, 0x80087666),
    "VM_SUSPEND": (IOC_IN, "v", 4, INT, 0x80047604),
    "VM_REINIT": (IOC_VOID, "v", 5, None, 0x20007605),
    "VM_GET_GPA_PMAP": (BOTH, "v", 12, GPA_PMAP, 0xC030760C),
    "VM_ALLOC_MEMSEG": (IOC_IN, "v", 14, MEMSEG_14, 0x8020760E),
    "VM_ALLOC_MEMSEG of 12": (IOC_IN, "v", 14, MEMSEG_12, 0x8050760E),
    "VM_ALLOC_MEMSEG of 15": (IOC_IN, "v", 14, MEMSEG_15, 0x8038760E),
    "VM_GET_MEMSEG": (BOTH, "v", 15, MEMSEG_14, 0xC020760F),
    "VM_GET_MEMSEG of 12": (BOTH, "v", 15, MEMSEG_12, 0xC050760F),
    "VM_GET_MEMSEG of 15": (BOTH, "v", 15, MEMSEG_15, 0xC038760F),
    "VM_MMAP_MEMSEG": (IOC_IN, "v", 16, VmMemmap, 0x80287610),
    "VM_MMAP_GETNEXT": (BOTH, "v", 17, VmMemmap, 0xC0287611),
    "VM_MUNMAP_MEMSEG": (IOC_IN, "v", 19, MUNMAP, 0x80107613),
    "VM_SET_TOPOLOGY": (IOC_IN, "v", 63, TOPOLOGY, 0x8008763F),
    "VM_GET_TOPOLOGY": (IOC_OUT, "v", 64, TOPOLOGY, 0x40087640),
    "VM_ACTIVATE_CPU": (IOC_IN, "v", 90, INT, 0x8004765A),
    "VM_GET_CPUS": (IOC_IN, "v", 91, ioctl.VmCpuset, 0x8010765B),
    "VM_SUSPEND_CPU": (IOC_IN, "v", 92, ioctl.VmVcpu, 0x8004765C),
    "VM_RESUME_CPU": (IOC_IN, "v", 93, ioctl.VmVcpu, 0x8004765D),
    "VM_SNAPSHOT_REQ": (BOTH, "v", 113, SNAPSHOT, 0xC0407671),
    "VM_SNAPSHOT_REQ of 13": (BOTH, "v", 113, SNAPSHOT_13, 0xC0487671),
    "VM_RESTORE_TIME": (BOTH, "v", 115, INT, 0xC0047673),
    "VM_GET_DIRTY_PAGE_LIST": (BOTH, "v", 117, DirtyPageList, 0xC0307675),
    "VM_COPY_VMM_PAGES": (BOTH, "v", 118, COPY_PAGES, 0xC0D07676),
    "VMMCTL_VM_CREATE": (BOTH, "V", 0, VMMCTL, 0xC1285600),
    "VMMCTL_VM_DESTROY": (BOTH, "V", 1, VMMCTL, 0xC1285601),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_number_follows_from_its_structure(name: str) -> None:
    direction, group, nr, structure, expected = TABLE[name]
    size = ctypes.sizeof(structure) if structure else 0
    assert ioctl.number(direction, group, nr, size) == expected


def test_the_numbers_in_use_are_freebsd_s() -> None:
    assert ioctl.VM_MMAP_GETNEXT == 0xC0287611
    assert ioctl.VM_GET_TOPOLOGY == 0x40087640
    assert ioctl.VM_GET_DIRTY_PAGE_LIST == 0xC0307675
    for name in (
        *("VM_RUN", "VM_SET_REGISTER", "VM_SET_SEGMENT_DESCRIPTOR", "VM_GET_SEGMENT_DESCRIPTOR"),
        *("VM_GET_REGISTER_SET", "VM_GET_INTINFO", "VM_INJECT_NMI", "VM_GET_CPUS"),
        *("VM_SUSPEND_CPU", "VM_RESUME_CPU", "VM_RTC_SETTIME"),
    ):
        assert getattr(ioctl, name) == TABLE[name][-1], name


def test_a_length_above_the_field_does_not_reach_the_direction() -> None:
    assert ioctl.number(IOC_IN, "v", 1, 0x2001) == ioctl.number(IOC_IN, "v", 1, 1)


def offsets(structure: type[ctypes.Structure]) -> dict[str, int]:
    return {field[0]: getattr(structure, field[0]).offset for field in structure._fields_}


def test_a_memory_map_entry_is_laid_out_as_in_vmm_dev_h() -> None:
    assert ctypes.sizeof(VmMemmap) == 40
    assert offsets(VmMemmap) == {
        "gpa": 0,
        "segid": 8,
        "segoff": 16,
        "len": 24,
        "prot": 32,
        "flags": 36,
    }
    assert ctypes.sizeof(c_int64) == ctypes.sizeof(c_size_t) == 8


def test_a_topology_is_four_words() -> None:
    assert ctypes.sizeof(TOPOLOGY) == 4 * ctypes.sizeof(c_uint16)
    assert offsets(TOPOLOGY) == {"sockets": 0, "cores": 2, "threads": 4, "maxcpus": 6}


def test_a_vm_exit_fits_into_its_buffer() -> None:
    """A vm_exit has exitcode, inst_length, rip, and a union with members below 200 bytes.

    struct vm_inst_emul: 3 u64, int, vm_guest_paging (u64, 3 int), struct vie of 64 bytes.
    """
    paging = struct(c_uint64, c_int, c_int, c_int)
    emulated = struct(c_uint64, c_uint64, c_uint64, c_int, paging, c_char * 64)
    inout = struct(c_uint16, c_uint16, c_uint32)
    inout_str = struct(
        *(inout, paging, c_uint64, c_uint64, c_uint64, c_uint64, c_int, c_int),
        *(ioctl.SegDesc, c_int, c_uint64),
    )
    largest = max(ctypes.sizeof(emulated), ctypes.sizeof(inout_str))
    assert 16 + largest <= 256 < ioctl.VM_EXIT_BYTES
    assert ioctl.CPUSET_BYTES == 1024 // 8


def test_a_field_of_the_vmcs_is_a_negative_int() -> None:
    assert registers.VMCS_CR4_SHADOW & 0xFFFFFFFF == 0x80006006
    assert c_int(registers.VMCS_ENTRY_INTR_INFO).value == registers.VMCS_ENTRY_INTR_INFO < 0
    # On AMD the number would mean VMCB_ACCESS(offset, 0 bytes): vmcb_access() fails with EINVAL.
    fields = [value for name, value in vars(registers).items() if name.startswith("VMCS_")]
    assert len(fields) == 6 and all(value >> 16 & 0xF == 0 for value in fields)


def test_the_registers_have_vmm_h_s_numbers() -> None:
    assert (registers.RAX, registers.RBP, registers.CR0, registers.RFLAGS) == (0, 6, 15, 21)
    assert (registers.ES, registers.GDTR, registers.EFER, registers.CR2) == (22, 31, 32, 33)
    assert (registers.INTR_SHADOW, registers.LAST) == (38, 49)


def test_a_dirty_page_list_has_48_bytes() -> None:
    assert ctypes.sizeof(DirtyPageList) == 48
    assert offsets(DirtyPageList) == {"page_list": 0, "num_pages": 8, "lowmem": 16, "highmem": 32}


def test_the_other_structures_have_the_offsets_that_were_read() -> None:
    def at(structure: type[ctypes.Structure]) -> list[int]:
        return list(offsets(structure).values())

    assert at(MEMSEG_15) == [0, 8, 16, 32, 40, 48]
    assert at(ioctl.VmCpuset) == [0, 4, 8]
    assert at(ioctl.VmRun) == [0, 8, 16, 24]
    assert at(ioctl.VmRegister) == [0, 4, 8]
    assert at(ioctl.VmRegisterSet) == [0, 4, 8, 16]
    assert at(ioctl.SegDesc) == [0, 8, 12]
    assert at(ioctl.VmSegDesc) == [0, 4, 8]
    assert at(ioctl.VmIntinfo) == [0, 8, 16]
    assert at(SNAPSHOT) == [0, 8, 16, 24, 32, 40, 48, 56]
    assert at(VMMCTL)[1] == 232
    assert ctypes.sizeof(VMMCTL) == 296
