"""A stream that ends early is refused, wherever it ends."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bhystream.stream import format as fmt
from guest import Spec

from .pipeline import BHYRECV, BHYSEND, report, run
from .qemu import Firmware, QemuPlace
from .travel import Host


@dataclass(frozen=True)
class Section:
    """One section of a stream in a file.  end: the offset after the section's padding."""

    number: int
    offset: int
    end: int


def sections(raw: bytes) -> list[Section]:
    """Return the sections of a sound stream."""
    found = []
    offset = fmt.HEADER.size
    while offset < len(raw):
        _, _, length, number, _ = fmt.SECTION.unpack_from(raw, offset)
        end = offset + fmt.SECTION.size + length + fmt.padding_bytes(length)
        found.append(Section(number, offset, end))
        offset = end
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a whole stream of a small running guest that has only firmware."""
    directory = tmp_path_factory.mktemp("whole")
    host = Host(directory)
    with Firmware(Spec("microvm", memory_mib=16, name="cut")) as guest:
        [kept] = run([*BHYSEND, "-k", f"qemu:{guest.qmp_path}"], env=host.env)
    assert kept.status == 0, report(kept)
    return kept.output


@pytest.mark.guest
def test_a_stream_cut_in_any_section_is_refused(host: Host, whole: bytes) -> None:
    found = sections(whole)
    assert len(found) > 10
    path = host.directory / "cut.bhys"
    here = host.directory
    to = QemuPlace(here / "cut.qmp", here / "cut.serial", here / "ram")
    command = [*BHYRECV, "-o", f"serial0={to.serial.path}", to.operand]
    for section in found:
        path.write_bytes(whole[: (section.offset + section.end) // 2])
        with path.open("rb") as file:
            [ended] = run(command, env=host.env, stdin=file)
        assert ended.status == 65, report(ended)
        assert f"section {section.number} " in ended.stderr
        assert f"at offset 0x{section.offset:x}" in ended.stderr
        assert "nothing was started here" in ended.stderr
        to.assert_nothing_left()
    assert host.files("destination") == []
    # The whole stream does start the guest: nothing else was wrong with its bytes.
    path.write_bytes(whole)
    with path.open("rb") as file, to.reaped():
        [ended] = run(command, env=host.env, stdin=file)
        assert ended.status == 0, report(ended)
        assert to.runs()


@pytest.mark.guest
def test_a_stream_without_its_trailer_is_refused(host: Host, whole: bytes) -> None:
    last = sections(whole)[-1]
    path = host.directory / "cut.bhys"
    path.write_bytes(whole[: last.offset])
    with path.open("rb") as file:
        [ended] = run([*BHYRECV, f"qemu:{host.directory}/cut.qmp"], env=host.env, stdin=file)
    assert ended.status == 65, report(ended)
    assert f"section {last.number} at offset 0x{last.offset:x}" in ended.stderr
    assert "without an END" in ended.stderr
