"""The reasons why this host cannot take a guest, one line each.

Nothing here changes the host: the functions look at files, ask a QEMU that
waits, and run the QEMU program for its machine types and its version.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from bhystream.backend.qemu import facts, graph, host, migration
from bhystream.backend.qemu.compare import compare
from bhystream.backend.qemu.config import reduce_argv
from bhystream.backend.qemu.options import as_dict, split_keyval
from bhystream.backend.qemu.plugged import check_plugged
from bhystream.backend.qemu.process import read_argv
from bhystream.backend.qemu.qmp import Qmp
from bhystream.backend.qemu.resources import Resources
from bhystream.beneath import exchangeable
from bhystream.errors import BhyError, GuestError, IncompatibleError, ending
from bhystream.guest import Head

_MACHINE_LINE = re.compile(r"(\S+)\s+.*")
_ALIAS = re.compile(r"\(alias of (\S+)\)")


def host_reasons(head: Head, config: Mapping[str, Any]) -> list[str]:
    """Return the reasons why this host does not suit the guest's accelerator.

    config: validated.
    """
    if config["accel"]["type"] != "kvm":
        return []
    out = []
    if os.uname().machine != config["arch"]:
        out.append(f"arch: this host is {os.uname().machine}, the guest {config['arch']} under kvm")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        out.append("accel: the guest runs under kvm; /dev/kvm is not usable here")
    cpu, model = config["cpu"], str(head.host.get("hw.model", ""))
    if cpu is not None and cpu["model"] in ("host", "max") and model != host.cpu_model():
        out.append(f"hw.model: -cpu {cpu['model']} on {ascii(model)[:60]}, here {host.cpu_model()}")
    return out


def version_reasons(head: Head, here: str) -> list[str]:
    """Return a reason if this host's QEMU is older than the source's.

    here: "7.2.22".  QEMU does not promise that an older version reads a newer one's state.
    """
    theirs = str(head.host.get("hypervisor_version", ""))
    if _version(theirs) > _version(here):
        return [f"hypervisor_version: the source runs QEMU {ascii(theirs)[:40]}, here is {here}"]
    return []


def _version(text: str) -> tuple[int, ...]:
    """Return (7, 2) for "7.2.22": the numbers that matter to a state."""
    found = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", text)
    return (int(found[1]), int(found[2])) if found else ()


def machines(program: str) -> tuple[set[str], dict[str, str], str]:
    """Ask a QEMU program for (machine types, aliases, version).

    Without -machine, QEMU takes its default type, which the alias "pc" names.
    Raises GuestError if the program cannot be run, or fails.
    """
    known, aliases = set(), {}
    for line in _answer([program, "-machine", "help"]).splitlines()[1:]:
        found = _MACHINE_LINE.fullmatch(line)
        if found:
            known.add(found[1])
            alias = _ALIAS.search(line)
            if alias:
                aliases[found[1]] = alias[1]
    number = re.search(r"version (\S+)", _answer([program, "--version"]))
    return known, aliases, number[1] if number else ""


def _answer(command: list[str]) -> str:
    """Return what a QEMU program prints.  Raises GuestError."""
    try:
        run = subprocess.run(
            command, capture_output=True, timeout=30, encoding="utf-8",
            errors="replace", stdin=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GuestError(f"cannot run {command[0]}: {error}") from None
    if run.returncode:
        said = "".join(f": {line[:200]}" for line in run.stderr.splitlines()[-1:])
        raise GuestError(f"{' '.join(command)} {ending(run.returncode)}{said}")
    return run.stdout


def room_reasons(size_bytes: int, directory: str | None) -> list[str]:
    """Return the reasons if this host has not enough free memory for the guest.

    directory: where our memory file goes, or None if we make none.
    """
    out = []
    available = host.memory_available_bytes()
    if available is not None and size_bytes > available:
        out.append(f"memory: the guest needs {size_bytes} bytes, {available} are available")
    if directory is not None:
        try:
            found = os.statvfs(directory)
        except OSError as error:
            return [f"mem: {directory}: {error.strerror}; say -o mem=PATH"]
        free = found.f_bavail * found.f_frsize
        if size_bytes > free:
            out.append(
                f"mem: {directory} has {free} bytes free, the guest needs {size_bytes};"
                " say -o mem=PATH"
            )
    return out


def waiting_reasons(qmp: Qmp, config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Examine the QEMU that listens at the socket that is to be the guest's.

    Returns (reasons that -f does not overrule, differences that -f overrules).
    """
    state = facts.status(qmp)
    if state != "inmigrate":
        return [f"qmp: {qmp.path} is a QEMU that is '{state}', not an empty one"], []
    argv = read_argv(qmp.pid)[1:]
    try:
        if not waits_deferred(argv):
            return [f"qmp: {qmp.path} was not started with -incoming defer"], []
        migration.refuse_unusual(qmp, migration.capabilities(qmp))
        here = described(qmp, config["name"])
        backend = facts.memory_backend(qmp)
        check_plugged(qmp, here)
        graph.refuse_jobs(qmp)
    except BhyError as error:
        return [f"qmp: {error}"], []
    if (backend.ident, backend.size_bytes) != tuple(config["memory"].values()):
        return compare(config, here), []
    return [], compare(config, here)


def described(qmp: Qmp, name: str) -> dict[str, Any]:
    """Return the configuration of a QEMU that waits.  name: the guest's.

    Raises IncompatibleError, GuestError or AccessError.
    """
    return reduce_argv(read_argv(qmp.pid)[1:], facts.gather(qmp), name)


def disk_differences(qmp: Qmp, config: dict[str, Any]) -> list[str]:
    """Say how the disks that a QEMU has opened differ from the stream's, one line each.

    Only QEMU knows what it has found behind a name that is no path.  Raises as
    described() does.
    """
    lines = compare(config, described(qmp, config["name"]))
    return [line for line in lines if line.startswith("disk")]


def waits_deferred(argv: list[str]) -> bool:
    """Say whether an argv holds -incoming defer."""
    return any(
        word in ("-incoming", "--incoming") and after == "defer" for word, after in pairwise(argv)
    )


def template_config(words: list[str], aliases: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return the configuration of the operator's command line, without its program.

    words: arguments only.  Raises IncompatibleError for an option that bhyrecv
    adds itself, or does not know.
    """
    for word in words:
        if word.lstrip("-") in ("incoming", "daemonize") and word.startswith("-"):
            raise IncompatibleError(f"template: remove {word}")
    known = {"pc": aliases.get("pc", "pc")} | dict(aliases)
    return reduce_argv(words, facts.Facts(aliases=known), name)


def template_ram_path(words: list[str]) -> str | None:
    """Return the mem-path of the operator's command line, if it has one."""
    for word, after in pairwise(words):
        if word.lstrip("-") == "object" and "memory-backend-file" in after:
            return as_dict(split_keyval(after, "qom-type"), "-object").get("mem-path")
    return None


def resource_reasons(resources: Resources, config: dict[str, Any]) -> list[str]:
    """Return the reasons against the operator's keys if we start QEMU ourselves."""
    out = resources.reasons(config)
    path = resources.get("mem")
    if why := exchangeable(os.path.join(ram_directory(resources), "bhyrecv")):
        out.append(f"mem: another user could exchange the memory file: {why}")
    if path is not None and not os.path.isdir(path):
        if os.path.lexists(path):
            out.append(f"mem: {path} exists; remove it or name another")
        elif not os.access(os.path.dirname(path), os.W_OK):
            out.append(f"mem: cannot write to {os.path.dirname(path)}")
    return out


def ram_directory(resources: Resources) -> str:
    """Return the directory of the memory file that open() will make."""
    path = resources.get("mem") or "/dev/shm"
    return path if os.path.isdir(path) else os.path.dirname(path)
