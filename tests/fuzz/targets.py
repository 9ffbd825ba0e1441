"""The table of all targets."""

from __future__ import annotations

from fuzz import bhyve, host, qemu, streams
from fuzz.target import Target

TARGETS = (
    *(
        Target(name, call, 2 * streams.READ_BYTES, 16384, "stream")
        for name, call in (
            ("stream", streams.walk),
            ("stream-sealed", streams.sealed),
            ("receive", streams.receive),
            ("judge", streams.judge),
        )
    ),
    Target("json", host.strict_json),
    Target("answers", host.answers),
    Target("record", host.record),
    Target("over", host.over),
    Target("experience", host.experience),
    Target("meta", bhyve.meta, longest=8192),
    Target("nvlist", bhyve.nvlist_bytes),
    Target("nvlist-socket", bhyve.nvlist_socket),
    Target("bhyve-config", bhyve.config_text),
    Target("bhyve-argv", bhyve.argv),
    Target("bhyve-section", bhyve.section),
    Target("vm-bhyve", bhyve.vm_bhyve),
    Target("vm-bhyve-text", bhyve.vm_bhyve_text),
    Target("fpu", bhyve.fpu, longest=2048),
    Target("qemu-argv", qemu.argv),
    Target("qemu-option", qemu.keyval),
    Target("qemu-section", qemu.section),
    Target("qmp", qemu.qmp),
)
