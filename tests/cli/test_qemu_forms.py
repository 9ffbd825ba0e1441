"""A destination's QEMU that the operator describes or has started: bhyrecv uses or refuses it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from guest import Guest

from .kinds import QEMU, SMALL
from .pipeline import BHYRECV, report, run
from .qemu import QemuPlace, QemuTraveller, qemu
from .test_forms import refused
from .travel import Host, Traveller

pytestmark = pytest.mark.guest


@pytest.fixture(params=[QEMU])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ours(small: Traveller) -> QemuTraveller:
    return qemu(small)


def test_a_template_with_another_cpu_is_refused(host: Host, ours: QemuTraveller) -> None:
    to, template = ours.next(), host.directory / "template"
    words = waiting_argv(ours, to)
    words[words.index("-cpu") + 1] = "Nehalem"
    template.write_text(" ".join(f"'{word}'" for word in words))
    command = [*BHYRECV, "-o", f"template={template}", to.operand]
    refused(host, ours, command, "cpu", "Nehalem", "qemu64")
    to.assert_nothing_left()


def test_a_template_that_fits_is_used(host: Host, ours: QemuTraveller) -> None:
    to, template = ours.next(), host.directory / "template"
    template.write_text(" ".join(f"'{word}'" for word in waiting_argv(ours, to)))
    command = [*BHYRECV, "-o", f"template={template}", to.operand]
    ended = run(ours.send(), command, env=host.env)
    assert [one.status for one in ended] == [80, 0], report(*ended)
    ours.settle(host, to)
    ours.prove()


def waiting_argv(guest: QemuTraveller, to: QemuPlace) -> list[str]:
    """Return the operator's own command line for a guest, without the QMP socket."""
    words = guest.argv(to)
    at = words.index("-qmp")
    return words[:at] + words[at + 2 :]


def test_a_waiting_qemu_with_another_cpu_is_refused_and_left(
    host: Host, ours: QemuTraveller
) -> None:
    other = replace(SMALL, extra=("-cpu", "Nehalem"))
    with Guest(other, incoming=True) as waiting:
        command = [*BHYRECV, f"qemu:{waiting.qmp_path}"]
        refused(host, ours, command, "cpu", "Nehalem", "qemu64")
        assert waiting.status() == "inmigrate"


def test_an_extra_device_is_refused_and_named(host: Host, ours: QemuTraveller) -> None:
    other = replace(SMALL, extra=("-device", "virtio-rng-device"))
    with Guest(other, incoming=True) as waiting:
        refused(host, ours, [*BHYRECV, f"qemu:{waiting.qmp_path}"], "virtio-rng-device")
