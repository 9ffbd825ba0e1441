"""Configuration + resources -> the argv of the destination's QEMU.

The configuration has passed validate(): no value in it holds a comma, so no
value can add a property.  The paths are the operator's; their commas are doubled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bhystream.backend.qemu import allow
from bhystream.backend.qemu.options import escape
from bhystream.backend.qemu.resources import Resources

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def waiting(qmp_path: str) -> list[str]:
    """Return the options that make a QEMU wait for us; a template gets only these added."""
    return ["-S", "-incoming", "defer", "-qmp", f"unix:{escape(qmp_path)},server=on,wait=off"]


def build(
    config: Mapping[str, Any],
    resources: Resources,
    *,
    name: str,
    ram_path: str,
    qmp_path: str,
    sandbox: bool = True,
) -> list[str]:
    """Return the argv, without the program.

    config: as validate() returned it.  ram_path, qmp_path: absolute.
    name: the guest's name at this host.
    """
    memory = config["memory"]
    argv = ["-name", f"guest={name}", "-nodefaults", "-no-user-config", "-display", "none"]
    argv += waiting(qmp_path)
    if sandbox:
        argv += ["-sandbox", SANDBOX]
    argv += [
        "-object",
        f"memory-backend-file,id={memory['id']},size={memory['size_bytes']},"
        f"mem-path={escape(ram_path)},share=on,prealloc=off",
    ]
    machine = {"type": config["machine"]["type"]} | config["machine"]["props"]
    argv += ["-machine", _pairs(machine | {"memory-backend": memory["id"]})]
    argv += ["-accel", _pairs({"accel": config["accel"]["type"]} | config["accel"]["props"])]
    argv += ["-m", f"size={memory['size_bytes']}B", "-smp", _pairs(config["smp"])]
    if config["cpu"] is not None:
        argv += ["-cpu", ",".join([config["cpu"]["model"], *config["cpu"]["features"]])]
    argv += _switches(config)
    argv += _firmware(config, resources)
    argv += _host_parts(config, resources)
    for device in config["devices"]:
        argv += ["-device", _pairs({"driver": device["driver"]} | device["props"])]
    return argv


def _pairs(table: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in table.items())


def _switches(config: Mapping[str, Any]) -> list[str]:
    argv = ["-vga", config["vga"]]
    if config["uuid"]:
        argv += ["-uuid", config["uuid"]]
    for option in ("rtc", "boot", "action"):
        if config[option]:
            argv += [f"-{option}", _pairs(config[option])]
    for table in config["smbios"]:
        argv += ["-smbios", _pairs({"type": table["type"]} | table["props"])]
    for key, value in config["globals"].items():
        argv += ["-global", f"{key}={value}"]
    if config["watchdog_action"]:
        argv += ["-watchdog-action", config["watchdog_action"]]
    return argv + [f"-{flag}" for flag in config["flags"]]


def _firmware(config: Mapping[str, Any], resources: Resources) -> list[str]:
    argv = []
    for key in ("kernel", "initrd", "bios"):
        if config[key]:
            argv += [f"-{key}", resources.values[key]]
    if config["append"]:
        argv += ["-append", config["append"]]
    return argv


def _host_parts(config: Mapping[str, Any], resources: Resources) -> list[str]:
    argv = []
    for thing in config["objects"]:
        kind = "rng-builtin" if thing["type"] == "rng" else "iothread"
        argv += ["-object", f"{kind},id={thing['id']}"]
    for disk in config["disks"]:
        argv += ["-drive", _drive(disk, resources)]
    for net in config["nets"]:
        argv += _net(net, resources.values[net["key"]])
    for port in config["serials"]:
        argv += _serial(port, resources.get(port["key"]) or "null")
    return argv


def _drive(disk: Mapping[str, Any], resources: Resources) -> str:
    words = {"if": disk["if"]}
    if disk["id"]:
        words["id"] = disk["id"]
    words |= disk["props"]
    if not disk["empty"]:
        words["file"] = escape(resources.values[disk["key"]])
    return _pairs(words)


def _net(net: Mapping[str, Any], value: str) -> list[str]:
    if value.startswith("tap:"):
        backend = f"tap,ifname={value[4:]},script=no,downscript=no"
    elif value == "user":
        backend = "user"
    else:
        # A hub with one port is a net that leads nowhere.
        backend = f"hubport,hubid={net['key'][3:]}"
    if net["id"]:
        backend += f",id={net['id']}"
    elif backend.startswith("hubport"):
        backend += f",id={allow.RESERVED}-{net['key']}"
    if net["kind"] == "nic":
        return ["-nic", ",".join([backend, _pairs(net["props"])]).rstrip(",")]
    return ["-netdev", backend]


def _serial(port: Mapping[str, Any], value: str) -> list[str]:
    name = port["id"] or f"{allow.RESERVED}-{port['key']}"
    if value == "null":
        backend = "null"
    elif value.startswith("unix:"):
        backend = f"socket,path={escape(value[5:])},server=on,wait=off"
    else:
        backend = f"file,path={escape(value)},append=on"
    head, _, rest = backend.partition(",")
    argv = ["-chardev", ",".join(filter(None, [head, f"id={name}", rest]))]
    return argv + (["-serial", f"chardev:{name}"] if port["option"] else [])
