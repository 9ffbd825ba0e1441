"""A message names the key or the option that holds a secret, and never shows the secret."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bhystream.backend.bhyve import command, config
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.backend.bhyve.resources import Wishes
from bhystream.backend.bhyve.validate import validate
from bhystream.backend.qemu.config import reduce_argv
from bhystream.backend.qemu.facts import Facts
from bhystream.backend.qemu.resources import Resources
from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import BhyError, GuestError
from bhystream.recv.options import parse_options

from .qemu_rig import Rig
from .test_qemu_config import BASE

SECRET = "hunter2"
KEY = "pci.0.6.0.password"
SECTION = {
    "cpus": "1",
    "uuid": "4ca2e2b7-6f0b-11ef-8a6a-0cc47a8c1a2e",
    "pci.0.6.0.device": "fbuf",
    "pci.0.6.0.tcp": "0.0.0.0:5900",
}


def of_config(value: str) -> Callable[[], object]:
    return lambda: config.split({**SECTION, "memory.size": "1g", KEY: value}, "web1")


def of_text(text: str) -> Callable[[], object]:
    return lambda: config.read(text, "web1")


def of_argv(*words: str) -> Callable[[], object]:
    return lambda: config.split(parse_argv(words), "web1")


def of_wish(value: str) -> Callable[[], object]:
    return lambda: Wishes.parse({KEY: value})


def of_stream(value: str) -> Callable[[], object]:
    section = config.split({**SECTION, "memory.size": "1g"}, "web1").section
    return lambda: validate({**section, "keys": {**section["keys"], KEY: value}})


def of_file(value: str) -> Callable[[], object]:
    return lambda: command.config_file({KEY: value})


def of_qemu(*words: str) -> Callable[[], object]:
    return lambda: reduce_argv([*BASE, *words], Facts())


def of_lent(**values: str) -> Callable[[], object]:
    return lambda: Resources.parse(values)


FBUF = "0:6:0,fbuf,tcp=0.0.0.0:5900"


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (of_config(f"{SECRET}%off"), KEY),
        (of_config(f"50%({SECRET})"), KEY),
        (of_config(f"{SECRET}\x01"), KEY),
        (of_config(SECRET * 200), KEY),
        (of_text(f"{KEY} {SECRET}"), "line 1"),
        (of_text(f"{KEY}:={SECRET}"), "line 1"),
        (of_text(f" {KEY}={SECRET}"), "line 1"),
        (of_argv("-s", f"{FBUF},password={SECRET}%"), KEY),
        (of_argv("-s", f"0:99:0,fbuf,password={SECRET}"), "option -s"),
        (of_argv("-s", f"0:6:0,fbug,password={SECRET}"), "option -s"),
        (of_argv("-s", FBUF, "-s", f"{FBUF},password={SECRET}"), "option -s"),
        (of_argv("-s", f"{FBUF},password={SECRET},=x"), "option -s"),
        (of_argv("-o", f"{KEY}x y={SECRET}"), "option -o"),
        (of_argv("-s", f"{FBUF},password=my", SECRET, SECRET), "a second name"),
        (of_wish(f"{SECRET}%"), KEY),
        (of_stream(f"{SECRET}%"), KEY),
        (of_stream(SECRET), KEY),
        (of_file(f"{SECRET}%"), KEY),
        (of_qemu(f"nbd://user:{SECRET}@host/x"), "nbd:..."),
        (of_qemu("-object", f'{{"qom-type":"secret","data":"{SECRET}"'), "JSON of an option"),
        (of_qemu("-object", f"secret,id=s,data={SECRET}"), "object secret"),
        (of_qemu("-drive", f"file=/x,if=virtio,file.password-secret={SECRET}"), "password-secret"),
        (of_qemu("-iscsi", f"password={SECRET}"), "option -iscsi"),
        (of_qemu("-smbios", f"type=11,value={SECRET}"), "option -smbios"),
        (of_qemu("-fw_cfg", f"name=opt/x,string={SECRET}"), "option -fw_cfg"),
        (of_lent(disk0=f"null-co:{SECRET}"), "-o disk0"),
        (of_lent(disk0=f"nbd+unix://u:{SECRET}@/x?socket=n"), "-o disk0"),
        (lambda: parse_options(["-o", f"{KEY}={SECRET}", "-o", f"{KEY}={SECRET}"]), f"-o {KEY}:"),
    ],
)  # fmt: skip
def test_a_secret_is_not_shown(act: Callable[[], object], named: str) -> None:
    with pytest.raises(BhyError) as caught:
        act()
    shown = f"{caught.value} {caught.value.hint}"
    assert named in shown
    assert SECRET not in shown


@pytest.mark.guest
@pytest.mark.parametrize("name", [f"nbd://user:{SECRET}@[::1]:1/x", f"rbd:p/a:key={SECRET},x"])
def test_qemus_last_words_do_not_show_it(rig: Rig, name: str) -> None:
    image = rig.path("disk")
    with open(image, "wb") as file:
        file.truncate(1 << 20)
    source = QemuSource(rig.start("here", "-drive", f"if=virtio,format=raw,file={image}"))
    sink = rig.sink("there", disk0=name)
    assert sink.check(source.head()) == []
    with pytest.raises(GuestError, match="cannot start QEMU") as caught:
        sink.open(b"")
    sink.abort()
    source.close()
    assert SECRET not in str(caught.value)
