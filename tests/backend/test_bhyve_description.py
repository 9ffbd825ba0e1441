"""bhyrecv -n shows NAME.conf of the source, if vm-bhyve here does not know the guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.pipeline import Ended, report
from standin.rig import Spec

from .bhyve_rig import UUID, Two, require_sink, two_hosts

CONF = f'''loader="uefi"
memory="64M"   # a comment
network0_switch="public"
uuid="{UUID}"
bhyve_options="-s 9,fbuf,password=secret"
'''
SHOWN = ['loader="uefi"', 'memory="64M"', 'network0_switch="public"', f'uuid="{UUID}"']


@pytest.fixture
def two() -> Iterator[Two]:
    require_sink()
    with two_hosts() as made, made.supervise(Spec(keys={"uuid": UUID})):
        made.hide_work()
        conf_of(made.here.directory).write_text(CONF)
        yield made


def conf_of(host: Path) -> Path:
    return host / "vm" / "g" / "g.conf"


def asked(two: Two, status: int = 0) -> Ended:
    """Ask both hosts; return what bhyrecv says.  status: bhyrecv's."""
    send = two.send("-n")
    if "-C" in send:
        del send[send.index("-C") : send.index("-C") + 2]
    sent, received = two.run(send, two.receive("-n"))
    assert (sent.status, received.status) == (0, status), report(sent, received)
    return received


def test_lines_to_copy_are_shown_where_the_guest_is_not_known(two: Two) -> None:
    received = asked(two)
    *_, header = received.stderr.split(SHOWN[0])[0].splitlines()
    assert "vm-bhyve does not know it here" in header
    assert str(conf_of(two.there.directory)) in header
    assert received.stderr.splitlines()[-len(SHOWN) :] == SHOWN
    assert "secret" not in received.stderr


def test_they_are_shown_too_where_the_guest_is_refused(two: Two) -> None:
    two.there.settings(can_snapshot=False)
    received = asked(two, 76)
    lines = received.stderr.splitlines()
    at = lines.index(SHOWN[0])
    assert lines[at : at + len(SHOWN)] == SHOWN
    assert "no snapshots" in "\n".join(lines[at:])


def test_nothing_is_shown_where_the_guest_is_known(two: Two) -> None:
    conf = conf_of(two.there.directory)
    conf.parent.mkdir()
    conf.write_text(f'uuid="{UUID}"\n')
    assert "loader=" not in asked(two).stderr


def test_nothing_is_shown_where_vm_bhyve_is_not(two: Two) -> None:
    (two.there.directory / "vm").rmdir()
    assert "loader=" not in asked(two).stderr
