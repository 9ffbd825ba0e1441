"""What is wanted of a stream's guest at this host, and whether it can be had.

The operator's words, and a QEMU that waits, if there is one; nothing is made.
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
    """One guest, as it is wanted here.

    resources: the -o keys.  given_path: of the QMP socket, None for NAME.qmp in
    state_dir.  given_name: of the guest here, None for the stream's.
    """

    resources: Resources
    given_path: str | None
    given_name: str | None
    state_dir: str

    def name(self, config: dict[str, Any]) -> str:
        """Return the guest's name here.  config: of the stream, validated."""
        return self.given_name or str(config["name"])

    def path(self, config: dict[str, Any]) -> str:
        """Return the path of its QMP socket here."""
        return self.given_path or os.path.join(self.state_dir, f"{self.name(config)}.qmp")

    def judge(
        self, head: Head, config: dict[str, Any], connect: Callable[[str], Qmp | None]
    ) -> tuple[list[str], list[str]]:
        """Return (reasons that stand, reasons that force overrules).

        connect: returns the connection to the QEMU that waits at a path, None for none.
        """
        hard: list[str] = []
        soft = verdict.host_reasons(head, config)
        path = self.path(config)
        directory: str | None = None
        if qmp := connect(path):
            stands, differences = verdict.waiting_reasons(qmp, config)
            hard += stands + [
                f"{key}: a QEMU with its own waits at {path}; remove -o {key}="
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
        """Return the operator's (program, arguments)."""
        words = self.resources.template()
        if words[0].startswith("-"):
            return host.program(config["arch"]), words
        return words[0], words[1:]


def connect(path: str, who: str) -> Qmp | None:
    """Connect to the QEMU that waits at a socket; None where nobody does.

    Refuses what is no socket: QEMU unlinks whatever lies at the path that it is
    told to listen on.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    if not stat.S_ISSOCK(mode):
        raise IncompatibleError(f"qmp: {path} exists and is not a socket")
    try:
        return Qmp(path, who)
    except NobodyListensError:
        return None  # its QEMU is gone; ours replaces the socket
