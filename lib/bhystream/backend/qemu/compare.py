"""The differences between two configurations.

QEMU loads a state without complaint into a machine with another -cpu, or with
an extra device, and the guest breaks later.  So the QEMU that waits at the
destination, or the operator's template, is compared with the stream word by word.

Not compared are the guest's name and what belongs to the host: the ids of drives,
nets and serial ports, and the files and interfaces behind them.  A reference is
compared as the key of the thing it names: drive=disk0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bhystream.backend.qemu import allow

_TABLES = {"disk": "disks", "net": "nets", "serial": "serials"}
# Unknown in a configuration that was made without QMP.
_MAY_BE_UNKNOWN = (".format", ".size_bytes")
# Each host's operator chooses these.
_HOST_DISK_PROPS = {"cache", "cache.direct", "cache.no-flush", "cache.writeback", "discard"}


def compare(stream: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return one line for each difference; [] means the same machine.

    stream, here: the configurations of the source and of this host, in the shape of
    validate()'s result.
    """
    left, right = dict(_flatten(stream)), dict(_flatten(here))
    lines = []
    for key in [*left, *(key for key in right if key not in left)]:
        a, b = left.get(key, "none"), right.get(key, "none")
        if a != b and not (key.endswith(_MAY_BE_UNKNOWN) and "none" in (a, b)):
            lines.append(f"{key}: the stream says {a}, here {b}")
    return lines


def _flatten(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "arch", config["arch"]
    yield "machine", config["machine"]["type"]
    yield from _table("machine", config["machine"]["props"])
    yield "accel", config["accel"]["type"]
    cpu = config["cpu"]
    if cpu is not None:
        yield "cpu", ",".join([cpu["model"], *cpu["features"]])
    yield from _table("smp", config["smp"])
    yield "memory", f"{config['memory']['size_bytes']} bytes"
    yield "memory id", config["memory"]["id"]
    yield from _devices(config)
    for kind in ("rtc", "boot", "action", "globals"):
        yield from _table(kind, config[kind])
    for number, table in enumerate(config["smbios"]):
        yield from _table(f"smbios {number}", {"type": table["type"]} | table["props"])
    for key in ("vga", "uuid", "append", "watchdog_action"):
        yield key, config[key] or "none"
    for key in ("kernel", "initrd", "bios"):
        yield key, "given" if config[key] else "none"
    for flag in config["flags"]:
        yield f"-{flag}", "given"


def _devices(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    names = {
        kind: {item["id"]: item["key"] for item in config[table] if item["id"]}
        for kind, table in _TABLES.items()
    }
    for number, device in enumerate(config["devices"]):
        yield f"device {number}", _device(device, names)
    for disk in config["disks"]:
        yield disk["key"], f"if={disk['if']}{' empty' if disk['empty'] else ''}"
        props = {k: v for k, v in disk["props"].items() if k not in _HOST_DISK_PROPS}
        yield from _table(disk["key"], props)
        if disk["size_bytes"]:
            yield f"{disk['key']}.size_bytes", str(disk["size_bytes"])
    for net in config["nets"]:
        yield net["key"], net["kind"]
        yield from _table(net["key"], net["props"])
    for port in config["serials"]:
        yield port["key"], "-serial" if port["option"] else "chardev"


def _table(prefix: str, table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in sorted(table.items()):
        yield f"{prefix}.{key}", str(value)


def _device(device: dict[str, Any], names: dict[str, dict[str, str]]) -> str:
    words = [device["driver"]]
    for prop, value in sorted(device["props"].items()):
        kind = allow.REFERENCES.get(prop, "")
        words.append(f"{prop}={names.get(kind, {}).get(value, value)}")
    return ",".join(words)
