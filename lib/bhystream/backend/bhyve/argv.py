"""bhyve's command line, turned into bhyve_config(5) keys.

This module serves guests whose manager recorded the argv of the last start.
Options are read as getopt(3) reads them: letters may stand together ("-AHPw"),
an argument may follow its letter without a space, and the first word without
"-" is the guest's name.  The later of two settings wins, also between -s, -o
and -k.

Source: usr.sbin/bhyve/amd64/bhyverun_machdep.c, bhyve_optparse(), and bhyverun.c,
bhyve_topology_parse(), bhyve_pincpu_parse(), bhyve_numa_parse(), FreeBSD 15.1;
-M and -N belong to FreeBSD 16.  Read, not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bhystream.backend.bhyve import config
from bhystream.backend.bhyve.keys import KEY, refuse, shown
from bhystream.backend.bhyve.legacy import lpc_option, slot_option
from bhystream.backend.refusals import Refusals
from bhystream.errors import from_oserror

_SWITCHES = {
    "a": ("x86.x2apic", "false"),
    "A": ("acpi_tables", "true"),
    "C": ("memory.guest_in_core", "true"),
    "D": ("destroy_on_poweroff", "true"),
    "e": ("x86.strictio", "true"),
    "H": ("x86.vmexit_on_hlt", "true"),
    "M": ("monitor", "true"),
    "P": ("x86.vmexit_on_pause", "true"),
    "S": ("memory.wired", "true"),
    "u": ("rtc.use_localtime", "false"),
    "w": ("x86.strictmsr", "false"),
    "W": ("virtio_msix", "false"),
    "x": ("x86.x2apic", "true"),
    "Y": ("x86.mptable", "false"),
}
_VALUES = {"m": "memory.size", "K": "keyboard.layout", "U": "uuid"}
_IGNORED = {"I", "N"}  # bhyve always has an I/O APIC (-I); -N changes only what -M does
_WITH_ARGUMENT = frozenset("cfGklmnopKrsU")
_REFUSED = {
    "f": "fw_cfg files name files of the host and are not in bhyve's snapshot",
    "h": "with it, bhyve starts no guest",
}


def parse_argv(words: Sequence[str], against: Refusals | None = None) -> dict[str, str]:
    """Return the keys that an argv sets, with the key "name" if the argv names the guest.

    words: the argv without the program.  Reads the files that -k names.  against: gets an
    error for each option that is wrong or refused; without it, raises IncompatibleError
    for these.  Raises IncompatibleError for an option that is unknown, and AccessError or
    InputOutputError if a file of -k cannot be read.
    """
    found = against or Refusals()
    reader = _Reader(found)
    rest = reader.run(words)
    if against is None:
        found.require_none()
    if len(rest) > 1:
        raise refuse("a word follows the guest's name: a second name")
    if rest:
        reader.keys["name"] = rest[0]
    return reader.keys


class _Reader:
    def __init__(self, against: Refusals) -> None:
        self.keys: dict[str, str] = {}
        self._against = against
        self._slots: set[str] = set()
        self._with_argument: dict[str, Callable[[str], None]] = {
            "c": self._on_topology,
            "G": self._on_gdb,
            "k": self._on_file,
            "l": lambda text: self.keys.update(lpc_option(text)),
            "n": self._on_domain,
            "o": self._on_setting,
            "p": self._on_pin,
            "r": lambda text: None,  # the snapshot of an earlier restore is no configuration
            "s": self._on_slot,
        }

    def run(self, words: Sequence[str]) -> list[str]:
        """Take all options; return the words that follow the options."""
        queue = iter(words)
        for word in queue:
            if word == "--":
                break
            if not word.startswith("-") or word == "-":
                return [word, *queue]
            self._letters(word[1:], queue)
        return list(queue)

    def _letters(self, text: str, queue: Iterator[str]) -> None:
        while text:
            letter, text = text[0], text[1:]
            if letter in _REFUSED:
                what = f"option -{letter}: {_REFUSED[letter]}"
                self._against.add(refuse(what, f"start it without -{letter}", f"-{letter}"))
            if letter in _WITH_ARGUMENT:
                value = text or next(queue, None)
                if value is None:
                    raise refuse(f"option -{letter}: its argument is missing")
                if letter not in _REFUSED:
                    with self._against.collecting():
                        self._take(letter, value)
                return
            if letter in _SWITCHES:
                key, value = _SWITCHES[letter]
                self.keys[key] = value
            elif letter not in _IGNORED and letter not in _REFUSED:
                plain = f"-{letter if letter.isalnum() else shown(letter)}"
                raise refuse(f"option {plain} is not known", f"start it without {plain}", plain)

    def _take(self, letter: str, value: str) -> None:
        if letter in _VALUES:
            self.keys[_VALUES[letter]] = value
        else:
            self._with_argument[letter](value)

    def _on_topology(self, text: str) -> None:
        """Take -c [[cpus=]N][,sockets=N][,cores=N][,threads=N]; an empty argument is one CPU."""
        if not text:
            self.keys |= dict.fromkeys(("cpus", "sockets", "cores", "threads"), "1")
            return
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals:
                key, value = "cpus", part
            if key not in ("cpus", "sockets", "cores", "threads") or not value:
                raise refuse(f"option -c {shown(text)}: {shown(part)} is not known")
            self.keys[key] = value

    def _on_domain(self, text: str) -> None:
        """Take -n id=N[,size=S][,cpus=LIST][,domain_policy=P]; a comma ends a list of CPUs."""
        pairs = dict(part.partition("=")[::2] for part in text.split(","))
        domain = pairs.pop("id", "")
        if not re.fullmatch(r"[0-7]", domain):
            raise refuse(f"option -n {shown(text)}: its id is missing, or beyond 7")
        for key, value in pairs.items():
            if key not in ("size", "cpus", "domain_policy") or not value:
                raise refuse(f"option -n {shown(text)}: {shown(key)} is not known")
            self.keys[f"domains.{domain}.{key}"] = value

    def _on_setting(self, text: str) -> None:
        key, _, value = text.partition("=")
        if not KEY.fullmatch(key) or not value:
            raise refuse(f"option -o {shown(text)}: say key=value")
        self.keys[key] = value

    def _on_file(self, text: str) -> None:
        try:
            with Path(text).open("rb") as file:
                data = file.read(config.MAX_FILE_BYTES + 1)
        except OSError as error:
            raise from_oserror(error, f"read {text}") from error
        self.keys |= config.parse(data.decode("utf-8", "surrogateescape"))

    def _on_slot(self, text: str) -> None:
        slot, pairs = slot_option(text)
        if str(slot) in self._slots:
            raise refuse(f"option -s {shown(text)}: {slot} is given twice")
        self._slots.add(str(slot))
        self.keys |= {f"{slot}.{key}": value for key, value in pairs.items()}

    def _on_pin(self, text: str) -> None:
        """Take -p vcpu:hostcpu; several options for one vCPU make one list."""
        found = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", text)
        if not found:
            raise refuse(f"option -p {shown(text)}: say vcpu:hostcpu")
        key = f"vcpu.{int(found[1])}.cpuset"
        before = f"{self.keys[key]}," if key in self.keys else ""
        self.keys[key] = before + found[2]

    def _on_gdb(self, text: str) -> None:
        """Take -G [w][address:]port."""
        if text.startswith("w"):
            self.keys["gdb.wait"] = "true"
            text = text[1:]
        address, colon, port = text.rpartition(":")
        if colon:
            self.keys["gdb.address"] = address
        self.keys["gdb.port"] = port
