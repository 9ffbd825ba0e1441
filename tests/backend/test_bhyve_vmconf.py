"""vm-bhyve's files, read by vm-bhyve's own rules.

The expected values are those of config::load() and config::get() of freebsd/vm-bhyve@89c21d0e:
grep '^[a-z]' | awk -F# '{print $1}' | sed -e 's@ *$@@' | tr -d '"', and the first match.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bhystream.backend.bhyve.vmconf import changes, parse, shareable

# config::load() and config::get(), unchanged but for setvar, which only FreeBSD's sh(1) has.
VM_BHYVE = r"""
VM_CONFIG=$(grep '^[a-z]' "$1" 2>/dev/null | awk -F# '{print $1}' | sed -e 's@ *$@@' | tr -d '"')
IFS='
'
for _c_line in ${VM_CONFIG}; do
    if [ "$2" = "${_c_line%%=*}" ]; then
        printf %s "${_c_line#*=}"
        exit 0
    fi
done
exit 1
"""

LINES = [
    ('a="b"', "b"),
    ("a=b", "b"),
    ("a='b'", "'b'"),
    ("a=John's", "John's"),
    ("a=b\\", "b\\"),
    ('a="b # c"', "b"),
    ("a=b#c", "b"),
    ("a=b # c", "b"),
    ('a="b', "b"),
    ('a=b"c"d', "bcd"),
    ('a="b "', "b "),
    ("a=b  ", "b"),
    ("a=b\t", "b\t"),
    ("a=", ""),
    ("a=b=c", "b=c"),
    ("a", "a"),
    ("a = b", None),
    (" a=b", None),
    ("A=b", None),
    ("_a=b", None),
    ("1a=b", None),
    ("#a=b", None),
    ("export a=b", None),
    ("a=$(touch x)", "$(touch x)"),
    ("a=1\na=2", "1"),
    ("b=0\na=1\n\nc=2", "1"),
    ("a=1\r", "1\r"),
    ("x=1\x0ca=2", None),
    ("a=1\x0bb", "1\x0bb"),
    ("a=\u00fc", "\u00fc"),
    ("a=1\u2028a=2", "1\u2028a=2"),
]


@pytest.mark.parametrize(("text", "value"), LINES)
def test_a_line_is_what_vm_bhyve_makes_of_it(tmp_path: Path, text: str, value: str | None) -> None:
    assert parse(text).get("a") == value
    path = tmp_path / "g.conf"
    path.write_bytes(f"{text}\n".encode())
    theirs = subprocess.run(
        ["sh", "-c", VM_BHYVE, "sh", str(path), "a"], stdout=subprocess.PIPE, cwd=tmp_path
    )
    assert (theirs.stdout.decode() if theirs.returncode == 0 else None) == value
    assert [entry.name for entry in tmp_path.iterdir()] == ["g.conf"]


def test_a_nul_in_the_name_of_a_disk_is_dropped() -> None:
    """No path holds a NUL: os.path would raise ValueError."""
    conf = parse('disk0_type="virtio-blk"\ndisk0_name="di\0sk0.img"\n')
    assert conf["disk0_name"] == "disk0.img"
    assert changes(conf, Path("/vm/web1"), ["/vm/web1/disk0.img"], 0, (None, None)) == []


# What travels.


def test_the_plain_lines_of_a_conf_travel_in_their_order() -> None:
    text = 'loader="uefi"\ncpu=2\nmemory="1G"\nnetwork0_switch="public one"\n'
    assert list(shareable(parse(text)).items()) == [
        ("loader", "uefi"),
        ("cpu", "2"),
        ("memory", "1G"),
        ("network0_switch", "public one"),
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uuid", "$(reboot)"),
        ("uuid", "`id`"),
        ("uuid", "x\\"),
        ("uuid", 'x" ; reboot'),
        ("uuid", "it's"),
        ("uuid", "1\nreboot"),
        ("uuid", "\x1b[2J"),
        ("uuid", "caf\u00e9"),
        ("uuid", "x" * 301),
        ("uuid", "1 # 2"),
        ("uuid", 7),
        ("uuid", None),
        ("uuid", ["x"]),
        ("uuid\nreboot", "x"),
        ("UUID", "x"),
        ("", "x"),
        ("prestart", "/bin/sh /tmp/evil.sh"),
        ("bhyve_options", "-G 0.0.0.0:1234"),
        ("grub_run0", "x"),
        ("graphics_password", "x"),
        ("vncpw", "x"),
        ("disk0_dev", "custom"),
        ("disk0_dev", "iscsi"),
        ("disk0_name", "/dev/ada0"),
        ("disk0_name", ".."),
        ("disk0_name", "../web2/disk0.img"),
        ("disk0_opts", "password=x"),
    ],
)
def test_a_line_that_could_be_more_than_a_line_does_not(key: str, value: object) -> None:
    assert shareable({"cpu": "1", key: value, "memory": "1G"}) == {"cpu": "1", "memory": "1G"}


def test_a_conf_is_not_endless() -> None:
    assert len(shareable({f"network{n}_mac": "1" for n in range(1000)})) == 100
