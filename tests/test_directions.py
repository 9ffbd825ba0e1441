"""Imports point one way: which module may import which, checked for every import of each module.

An import inside a function counts like any other, and so does an import for types only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parents[1] / "lib"
ROOT = "bhystream"

# Each part of the package, and the parts that it may import besides itself.  A part is a module or
# a package; a module with its own row does not belong to the row of its package.  A row names only
# parts above it, so no module can import one below it.
PARTS: dict[str, str] = {
    "": "",  # the package itself: its version, which every part may import
    "errors": "",
    "units": "errors",
    "guest": "",
    "beneath": "",
    "threads": "",
    "urgent": "",
    "strict_json": "errors",
    "durable": "errors strict_json",
    "handlers": "",
    "signals": "errors handlers",
    "inherited": "errors signals",
    "commandline": "errors",
    "report": "errors units guest",
    "start": "errors signals report",
    "memory": "errors guest",
    "stream": "errors guest strict_json threads memory",
    # These are not backends: engine and backends agree on base, and find processes by process.
    "backend.base": "errors guest memory",
    "backend.process_freebsd": "errors",
    "backend.process": "errors backend.process_freebsd",
    "backend": (
        "errors units guest beneath strict_json durable inherited memory"
        " backend.process backend.process_freebsd"
    ),
    "backend.qemu": (
        "errors units guest beneath threads strict_json durable memory"
        " backend backend.base backend.process backend.process_freebsd"
    ),
    "backend.bhyve": (
        "errors units guest beneath strict_json durable inherited memory"
        " backend backend.base backend.process backend.process_freebsd"
    ),
    # The stand-in plays the other side: STANDIN names what it shares with bhyve's backend.
    "standin": "errors guest inherited backend.bhyve",
    "hypervisors": "errors guest stream backend.base backend.bhyve backend.qemu standin",
    "handover": (
        "errors units guest beneath commandline durable signals report stream backend.base"
        " hypervisors"
    ),
    "send": (
        "errors units guest commandline strict_json durable inherited signals threads urgent report"
        " start memory"
        " stream backend.base backend.process hypervisors handover"
    ),
    "recv": (
        "errors units guest commandline durable inherited signals threads urgent report start"
        " memory stream"
        " backend.base backend.process hypervisors handover"
    ),
    "demo": "errors units signals inherited standin",
}

# Modules that only declare what both sides have, and do nothing.
STANDIN = frozenset({"backend.bhyve.host", "backend.bhyve.nvlist", "backend.bhyve.registers"})

# The modules of ours that a loop may import: the look-up of XXH3, and the loops before it.
LOOPS = frozenset({"memory.xxh3", "memory.page"})


# The module that an import names, and the names imported from it; () for a plain import.
Import = tuple[str, tuple[str, ...]]


@cache
def _imports(source: str) -> tuple[Import, ...]:
    """Return every import of a module; a relative one begins with its dots."""
    found: list[Import] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(each.name, ()) for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(each.name for each in node.names)
            found.append(("." * node.level + (node.module or ""), names))
    return tuple(found)


@cache
def _loop_imports(source: str) -> tuple[Import, ...]:
    """Return the imports of a loop, also its cimports.  Names in parentheses are left out."""
    found: list[Import] = []
    for line in source.splitlines():
        if match := re.match(r"\s*from\s+(\S+)\s+c?import\s+(.*)", line):
            found.append((match[1], tuple(re.findall(r"\w+", match[2]))))
        elif match := re.match(r"\s*c?import\s+(\S+)", line):
            found.append((match[1], ()))
    return tuple(found)


def read() -> dict[str, str]:
    """Return the source of every file, by module; the name of a loop ends with its suffix."""
    found = {}
    for path in sorted(LIB.glob(f"{ROOT}/**/*.p*")):
        parts = list(path.relative_to(LIB).with_suffix("").parts)[1:]
        if path.suffix in (".py", ".pyi", ".pyx", ".pxd"):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name + (path.suffix if path.suffix != ".py" else "")] = path.read_text()
    return found


def part_of(module: str) -> str | None:
    """Return the row that a module belongs to, None if there is none."""
    names = module.split(".")
    for count in range(len(names), 0, -1):
        if (name := ".".join(names[:count])) in PARTS:
            return name
    return "" if not module else None


def _absolute(module: str, name: str, sources: Mapping[str, str]) -> str:
    """Return the module of ours that an import names, "" for the package."""
    rest = name.lstrip(".")
    if rest == name:
        return name.partition(".")[2]
    is_package = any(each.startswith(f"{module}.") for each in sources)
    parts = module.split(".")
    kept = parts[: len(parts) - (len(name) - len(rest)) + is_package]
    return ".".join([*kept, rest] if rest else kept)


def edges(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the modules of ours that each module of ours imports, without the names in them.

    Raises ValueError if an imported module or name does not exist.
    """
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        is_loop = module.endswith((".pyx", ".pxd"))
        found[module] = set()
        for name, names in (_loop_imports if is_loop else _imports)(source):
            if not name.startswith((".", f"{ROOT}.")) and name != ROOT:
                continue
            inner = _absolute(module, name, sources)
            for path in [f"{inner}.{each}".strip(".") for each in names] or [inner]:
                if path in sources or f"{path}.pyx" in sources:
                    found[module].add(path)
                elif path.rpartition(".")[2] in "".join(
                    sources.get(inner + suffix, "") for suffix in ("", ".pyx", ".pxd")
                ):
                    found[module].add(inner)
                else:
                    raise ValueError(f"{module}: there is no {path}")
    return found


def _fault(module: str, to: str) -> str:
    """Return the rule that an import breaks, "" if none."""
    if module.endswith((".pyx", ".pxd")):
        return "" if to in LOOPS else "a loop imports nothing of ours"
    one, other = part_of(module), part_of(to)
    if one is None or other is None:
        return "it has no row"
    if one == "standin" and other == "backend.bhyve":
        return "" if to in STANDIN else "the stand-in plays the other side"
    return "" if other in ("", one, *PARTS[one].split()) else f"{one} may not import {other}"


def faults(sources: Mapping[str, str]) -> list[str]:
    """Return the imports that break a rule, one line each."""
    return [
        f"{module} imports {to}: {why}"
        for module, found in sorted(edges(sources).items())
        for to in sorted(found)
        if (why := _fault(module, to))
    ]


def cycle(sources: Mapping[str, str]) -> list[str]:
    """Return modules that import each other in a ring, [] if there are none."""
    graph, done = edges(sources), set[str]()

    def follow(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module not in done:
            for to in sorted(graph.get(module, ())):
                if found := follow(to, [*way, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := follow(module, []))), [])


SOURCES = read()


def test_a_row_names_only_what_stands_above_it() -> None:
    above: set[str] = set()
    for part, may in PARTS.items():
        assert set(may.split()) <= above, part
        above.add(part)


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    rows = {part_of(module.removesuffix(".pyx").removesuffix(".pxd")) for module in SOURCES}
    assert rows == set(PARTS)


def test_the_imports_keep_the_rules() -> None:
    assert faults(SOURCES) == []


def test_no_modules_import_each_other() -> None:
    assert cycle(SOURCES) == []


def test_a_package_imports_nothing_by_itself() -> None:
    """So a program that needs one module of a package loads only that module."""
    packages = {path.parent.name for path in LIB.glob(f"{ROOT}/*/__init__.py")}
    assert {package for package in packages if edges(SOURCES)[package]} == set()
    assert edges(SOURCES)[""] == set()


PLANTED = [
    ("errors", "from bhystream.units import NS", "errors may not import units"),
    ("guest", "from bhystream.stream.format import Type", "guest may not import stream"),
    ("memory.hole", "from bhystream.stream import format", "memory may not import stream"),
    ("stream.verify", "from bhystream.backend.base import Sink", "stream may not import backend"),
    ("stream.reader", "from bhystream import hypervisors", "stream may not import hypervisors"),
    (
        "handover.state",
        "def f():\n    import bhystream.send.outgoing",
        "handover may not import send",
    ),
    ("handover.verbs", "from bhystream.recv.query import run", "handover may not import recv"),
    ("send.outgoing", "from bhystream.recv import incoming", "send may not import recv"),
    ("recv.incoming", "from bhystream.send.precopy import Round", "recv may not import send"),
    ("send.keeper", "from bhystream.backend.bhyve import fifo", "send may not import backend"),
    ("recv.judge", "from bhystream.backend.qemu.sink import QemuSink", "recv may not import"),
    ("send.main", "from bhystream.standin import kernel", "send may not import standin"),
    (
        "backend.bhyve.restoredguest",
        "from bhystream.handover import state",
        "may not import handover",
    ),
    ("backend.bhyve.sink", "from bhystream.standin import kernel", "may not import standin"),
    ("backend.bhyve.sink", "from bhystream.backend.qemu import ram", "may not import backend.qemu"),
    ("backend.qemu.sink", "from bhystream.stream import format", "may not import stream"),
    ("backend.files", "from bhystream.report import Console", "backend may not import report"),
    ("backend.base", "from bhystream.backend.qemu import ram", "may not import backend.qemu"),
    ("standin.kernel", "from bhystream.hypervisors import open_host", "may not import hyperv"),
    ("standin.kernel", "from bhystream.backend.bhyve import sink", "plays the other side"),
    ("demo", "from bhystream.send.main import main", "demo may not import send"),
    ("memory.page.pyx", "from bhystream.errors import BhyError", "a loop imports nothing of ours"),
    ("memory.batch.pyx", "cimport bhystream.guest", "a loop imports nothing of ours"),
]


@pytest.mark.parametrize(("module", "line", "why"), PLANTED, ids=[each[0] for each in PLANTED])
def test_a_broken_rule_is_seen(module: str, line: str, why: str) -> None:
    [found] = faults({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"})
    assert found.startswith(f"{module} imports ") and why in found


def test_a_ring_is_seen() -> None:
    line = "def f():\n    from bhystream.stream.verify import Walk\n"
    found = cycle({**SOURCES, "stream.reader": SOURCES["stream.reader"] + line})
    assert set(found) == {"stream.reader", "stream.verify"}


def test_an_import_that_cannot_be_followed_is_refused() -> None:
    for line in ("from . import gone", "import bhystream.send.gone", "from .gone import x"):
        with pytest.raises(ValueError, match="gone"):
            faults({**SOURCES, "send.outgoing": f"{SOURCES['send.outgoing']}\n{line}\n"})
