"""Targets that read what QEMU says: its command line, its answers, and CONFIG of its guests."""

from __future__ import annotations

import json
import os
from functools import partial

from bhystream.backend.qemu import facts, graph, migration, options, plugged
from bhystream.backend.qemu.command import build
from bhystream.backend.qemu.config import guest_name, reduce_argv
from bhystream.backend.qemu.contents import QemuContents
from bhystream.backend.qemu.facts import Facts
from bhystream.backend.qemu.resources import Resources
from bhystream.backend.qemu.validate import validate
from bhystream.errors import BhyError
from bhystream.guest import PAGE_BYTES, Layout, Segment
from bhystream.strict_json import pack_json, unpack_json
from fuzz.bhyve import text_of
from fuzz.target import attempt, fail
from support.qmp_answers import Answers

FACTS = Facts(machine="pc-q35-7.2", accel="tcg")


def argv(data: bytes) -> None:
    """Reduce a command line, one word for each line: what can travel passes the check."""
    words = text_of(data).replace("\0", "").split("\n")
    guest_name(words)
    config = reduce_argv(words, FACTS)
    again = unpack_json(pack_json(config))
    if validate(again) != again:
        fail("validate() has changed what reduce_argv() made")


def keyval(data: bytes) -> None:
    """Take one option apart, and read its words as numbers, sizes and names."""
    text = text_of(data).replace("\0", "")
    try:
        pairs = options.split_keyval(text, "implied")
        options.json_address(text)
    except BhyError:
        pairs = [("", text)]
    for _, value in pairs:
        for read in (
            lambda it: options.parse_number(it, "x"),
            lambda it: options.parse_size(it, 1 << 20),
            lambda it: options.is_on(it, "x"),
            options.told,
            graph.file_of,
            lambda it: graph.local_path(it, "/"),
            lambda it: graph.is_open(it, "/srv", os.getpid(), frozenset()),
        ):
            attempt(partial(read, value))


def section(data: bytes) -> None:
    """Check a CONFIG section of a stream: what passes makes a command line of its own words."""
    contents = QemuContents()
    made = unpack_json(data)
    contents.config(made)
    config = validate(made)
    memory = config["memory"]
    contents.layout(Layout((Segment(memory["id"], None, memory["size_bytes"] // PAGE_BYTES),)))
    keys = [each["key"] for kind in ("disks", "nets", "serials") for each in config[kind]]
    lent = Resources(dict.fromkeys([*keys, "kernel", "initrd", "bios"], "/lent"))
    words = build(config, lent, name="web1", ram_path="/ram", qmp_path="/qmp")
    if any("\0" in word for word in words):
        fail("a word holds a NUL")


_CONFIG = {"devices": [{"driver": "virtio-blk-pci", "props": {"id": "vd0", "addr": "5"}}]} | {
    "disks": [], "smp": {"cpus": 1}}  # fmt: skip
_QUESTIONS = (
    facts.gather,
    facts.memory_backend,
    facts.status,
    lambda qmp: graph.drives(qmp, "/srv"),
    graph.refuse_jobs,
    lambda qmp: plugged.check_plugged(qmp, _CONFIG),
    lambda qmp: migration.refuse_unusual(qmp, migration.capabilities(qmp)),
    migration.progress,
    migration.let_run,
)


def qmp(data: bytes) -> None:
    """Ask one question, chosen by the first byte; QEMU answers with the values of a JSON list."""
    try:
        values = json.loads(data[1:])
    except (ValueError, RecursionError):
        return
    if isinstance(values, list):
        _QUESTIONS[data[0] % len(_QUESTIONS)](Answers(values))
