"""What bhyrecv's operator wants for a stream's guest, and the reasons against it.

This file judges the -o keys and a QEMU that waits, if there is one; it makes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bhystream.backend.qemu import host, scope, verdict
from bhystream.backend.qemu.compare import compare
from bhystream.backend.qemu.qmp import NobodyListensError, Qmp
from bhystream.backend.qemu.resources import Resources
from bhystream.errors import IncompatibleError
from bhystream.guest import Head


@dataclass(frozen=True)
class Wanted:
    """One guest, as the operator wants it at this host.

    resources: the -o keys.  given_path: the QMP socket's, None for NAME.qmp in
    state_dir.  given_name: the guest's name here, None for the stream's.
    """

    resources: Resources
    given_path: str | None
    given_name: str | None
    state_dir: str

    def name(self, config: dict[str, Any]) -> str:
        """Return the guest's name at this host.  config: the stream's, validated."""
        return self.given_name or str(config["name"])

    def path(self, config: dict[str, Any]) -> str:
        """Return the path of the guest's QMP socket at this host."""
        return self.given_path or os.path.join(self.state_dir, f"{self.name(config)}.qmp")

    def judge(
        self, head: Head, config: dict[str, Any], connect: Callable[[str], Qmp | None]
    ) -> tuple[list[str], list[str]]:
        """Return (reasons that -f does not overrule, reasons that -f overrules).

        connect: returns the connection to the QEMU that waits at a path, or None.
        Raises UsageError, IncompatibleError or GuestError for further reasons.
        """
        hard: list[str] = []
        soft = verdict.host_reasons(head, config)
        path = self.path(config)
        directory: str | None = None
        if qmp := connect(path):
            stands, differences = verdict.waiting_reasons(qmp, config)
            hard += stands + [
                f"{key}: the QEMU that waits at {path} has its own; remove -o {key}="
                for key in self.resources.values
                if key != "qmp"
            ]
            soft += differences + verdict.version_reasons(head, qmp.version)
        elif self.resources.get("template"):
            differences = self._judge_template(head, config)
            soft += differences
        else:
            known, _, version = verdict.machines(host.program(config["arch"]))
            if config["machine"]["type"] not in known:
                hard.append(f"machine: this QEMU does not know {config['machine']['type']}")
            hard += verdict.resource_reasons(self.resources, config)
            soft += verdict.version_reasons(head, version)
            directory = verdict.ram_directory(self.resources)
        if qmp is None:
            stands, doubts = scope.reasons()
            hard += stands
            soft += doubts
        soft += verdict.room_reasons(config["memory"]["size_bytes"], directory)
        return hard, soft

    def _judge_template(self, head: Head, config: dict[str, Any]) -> list[str]:
        program, words = self.template(config)
        _, aliases, version = verdict.machines(program)
        here = verdict.template_config(words, aliases, config["name"])
        if here["memory"] != config["memory"]:
            raise IncompatibleError("; ".join(compare(config, here)))
        return compare(config, here) + verdict.version_reasons(head, version)

    def template(self, config: dict[str, Any]) -> tuple[str, list[str]]:
        """Return the template's (program, arguments).  Raises UsageError or GuestError."""
        words = self.resources.template()
        if words[0].startswith("-"):
            return host.program(config["arch"]), words
        return words[0], words[1:]


def connect(path: str, who: str, on_wait: Callable[[], None]) -> Qmp | None:
    """Return a connection to the QEMU that waits at a socket; None if none waits.

    on_wait: as in Qmp.  Raises IncompatibleError if the path is no socket, because a QEMU
    that is told to listen at a path unlinks the file there.  Raises GuestError as Qmp() does.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    if not stat.S_ISSOCK(mode):
        raise IncompatibleError(f"qmp: {path} exists and is not a socket")
    try:
        return Qmp(path, who, on_wait)
    except NobodyListensError:
        return None  # the socket's QEMU has ended; a QEMU of ours replaces the socket
