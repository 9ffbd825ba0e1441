"""Write the first inputs of corpus/: sound streams, and small examples of each text.

    python -m fuzz.seeds

Inputs that fuzzing has found stand beside them, under the names that libFuzzer gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from backend.bhyve_samples import ARGV, CONF, log_of
from backend.snapshot_files import CONFIG, made, text_of
from backend.test_bhyve_hostile import GOOD
from backend.test_qemu_config import BASE, FULL, full
from bhystream.backend.bhyve import nvlist
from bhystream.handover.answers import Answer, pack
from support import streams
from support.streams import (
    ABORT,
    ANSWERED,
    DATA,
    GO,
    KEPT,
    NO_MEMORY,
    NONCE,
    OPTIONAL,
    PAD,
    PLAIN,
    REHEARSAL,
    ZERO,
    ZSTD,
    Maker,
    page,
)

CORPUS = Path(__file__).parent / "corpus"
ID = "0123456789abcdef" * 2
_FD = {"fd": nvlist.Descriptor(0)}
HELLO = Answer(ID, "HELLO", ("hv2/a1", "/var/db/bhysend"))


_RECORD = b'{"id": "' + ID.encode() + b'", "guest": "g", "operand": "g", "lock": "l", '
_RECORD += b'"phase": "started", "revive": {}, "time_ns": 1}'
# Inputs that have failed once; every run tries them again.
MENDED: dict[str, list[bytes]] = {
    "experience": [b'{"load": [1' + b"0" * 400 + b"]}"],
    "qemu-option": [b'{"a":' + b"[" * 4000, b'json:{"filename": "\\u0000"}', b'{"a": "\\u0000"}'],
    "qmp": [
        b'\3[[{"qdev": "/m/peripheral"}]]',
        b"\x0a[]",
        b"\1[7]",
        b"\3" + b'[[{"inserted": {"drv": "raw", "file": "/a\\u0000"}}]]',
    ],
    "record": [b"[" * 4000, _RECORD.replace(b'"time_ns": 1', b'"time_ns": "1"')],
    "vm-bhyve-text": [b'disk0_type="x"\ndisk0_name="\0"'],
}


def main() -> None:
    for target, inputs in MENDED.items():
        for number, raw in enumerate(inputs):
            (CORPUS / target).mkdir(parents=True, exist_ok=True)
            (CORPUS / target / f"mended-{number}").write_bytes(raw)
    for target, each in _all().items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(each):
            raw = data.encode() if isinstance(data, str) else data
            (CORPUS / target / f"seed-{number}").write_bytes(raw)


def _all() -> Mapping[str, Iterable[str | bytes]]:
    return {
        "stream": list(_streams()),
        "json": ['{"a": [1, -0, true, null, "\\u00e9\\ud83d\\ude00"], "b": {}}', "[" * 17, "1e9"],
        "answers": _answers(),
        "record": _records(),
        "over": [f"{ID} started\n{ID} dead\n", "0123456789abcdef"],
        "experience": ['{"load": [1.5, 2, 0.01], "x": [1e999]}'],
        "meta": [_meta(), _meta().replace(b"kern_structs", b"structs")],
        "nvlist": _lists(),
        "nvlist-socket": [b"\0" + _lists()[0], b"\1" + nvlist.pack(_FD)[0]],
        "bhyve-config": [_bhyve_config()],
        "bhyve-argv": ["\n".join(ARGV[:-1])],
        "bhyve-section": [json.dumps(GOOD), f"{json.dumps(CONFIG)}\f{_meta().decode()}"],
        "vm-bhyve": ["\f".join((CONF, log_of(), "hv1\n", "")), _STARTED],
        "vm-bhyve-text": [CONF, log_of(), _TEXTS],
        "fpu": ['{"fpu/0": "AAAA"}', bytes(520), b"\7" + bytes(520 + 575)],
        "qemu-argv": ["\n".join(BASE), "\n".join(FULL)],
        "qemu-option": ["a,b=c,,d,nox", '{"driver": "x", "addr": 9, "file": {"filename": "/a"}}',
                        'file=json:{"file": {"filename": "nbd:h:1"}},readonly=on', "1.5G", "0x10"],
        "qemu-section": [json.dumps(full(), sort_keys=True)],
        "qmp": _qmp(),
    }  # fmt: skip


def _streams() -> Iterable[bytes]:
    """Yield short sound streams: few pages, each form, each type of section."""
    small = Maker(PLAIN).head((b"ram", 0, 2)).memory(0, [(0, 1, DATA), (1, 1, ZERO)], [page(1)])
    yield small.round_end(0, 1, 1, flags=1).state(b"s", 0, b"x", flags=1).time().end().raw
    for form in (ANSWERED, KEPT):
        maker = Maker(form, ZSTD).head((b"a", 0, 1), (b"b", 1 << 32, 3))
        maker.zstd([(0, 1, DATA)], [page(0)]).zstd([(1, 2, DATA), (3, 1, ZERO)], [page(7)] * 2)
        maker.round_end(0, 3, 1).memory(1, [(2, 1, ZERO)]).add(PAD, b"x")
        maker.round_end(1, 0, 1, flags=1).state(b"s", 0, b"1").state_zeros(b"s", 1, 9)
        maker.state(b"s", 2, b"2", flags=1).state_optional(b"fpu/0", 0, b"", flags=1)
        maker.add(OPTIONAL, b"new", flags=9).time().end()
        yield maker.raw
        if form == ANSWERED:
            yield maker.add(PAD, b"").add(GO, NONCE).raw
    yield Maker(ANSWERED, NO_MEMORY).head().end().add(PAD).raw
    yield Maker().head().add(ABORT, streams.abort(b"gave up")).raw
    yield Maker().head((b"ram", 0, 2**36)).add(REHEARSAL, b"{}").memory(0, [(0, 2**31, ZERO)]).raw
    samples = [(0, 65536, 1), (1 << 20, 512, 2)]
    two = streams.disks((b"disk0", 1 << 30, samples), (b"pci.0.3.0.path", 1 << 20, samples[:1]))
    yield streams.before(streams.DISKS, PLAIN).add(streams.DISKS, two).end().raw
    maker = Maker(ANSWERED).head((b"a", 0, 2), (b"b", 1 << 32, 2)).memory(0, [(0, 2, ZERO)])
    maker.memory(0, [(2, 1, DATA), (3, 1, ZERO)], [page(7)]).round_end(0, 1, 3, flags=1)
    maker.hashes([(0, 1, ZERO), (1, 1, DATA)], [page(0)]).hashes([(2, 2, DATA)], [page(7), page(0)])
    yield maker.time().end().raw
    yield _of_bhyve()
    golden = Path(__file__).parents[1] / "data"
    for name in ("dry-run", "aborted", "answered", "zstd"):
        yield (golden / f"{name}.bhys").read_bytes()


def _of_bhyve() -> bytes:
    """Return a stream of a guest of bhyve whose contents obey bhystream(5)."""
    value, _ = made()
    text = text_of(value)
    host = {"hypervisor": "bhyve", "program": "t", "hw.machine": "amd64", "hw.pagesize": 4096}
    names = json.dumps([each["device"] for each in value["devices"]]).encode()
    maker = Maker().add(streams.HOST, json.dumps(host | {"cpu.vendor": "amd"}).encode())
    maker.layout((b"lowmem", 0, 4096)).add(streams.CONFIG, json.dumps(CONFIG).encode())
    maker.add(streams.DEVICES, names).add(streams.HEAD_END).add(REHEARSAL, text)
    maker.memory(0, [(0, 4096, ZERO)]).round_end(0, 0, 4096, flags=1)
    maker.state(b"meta", 0, text, flags=1)
    for key, kind in (("kern_structs", "kern"), ("devices", "dev")):
        for each in value[key]:
            name = f"{kind}/{each['device']}".encode()
            maker.state(name, 0, bytes(each["size"]), flags=1)
    return maker.time().end().raw


def _answers() -> list[bytes]:
    words: list[tuple[str, ...]] = [
        ("SEEN", "7"),
        ("ACCEPT",),
        ("READY", NONCE.hex()),
        ("RUNNING",),
    ]
    whole = b"".join(pack(Answer(ID, one[0], one[1:])) for one in words)
    ends = [pack(Answer(ID, word, ("no: é%",))) for word in ("REFUSED", "FAILED")]
    return [pack(HELLO) + whole, *(b"motd\nx" + pack(HELLO) * 2 + end for end in ends)]


def _records() -> list[str]:
    fields: dict[str, object] = {"id": ID, "guest": "web1", "operand": "web1", "lock": "bhyve-web1"}
    fields |= {"phase": "started", "revive": {"hypervisor": "qemu"}, "time_ns": 1, "keeper": 7}
    process = {"pid": 1, "start_ticks": 2, "boot_id": "b"}
    kept: dict[str, object] = {
        "hypervisor": "bhyve",
        "vmm_dir": "",
        "name": "web1",
        "manager": "",
        "node": "7:8",
    }
    kept |= {"process": process}
    revived: list[object] = [
        {"hypervisor": "qemu", "name": "web1", "qmp": "/q", "announce": False, **process}
        | {"restore": {"capabilities": {"x": True}, "parameters": {"y": 1}}},
        kept | {"role": "source", "directory": "/d", "full_bytes": 65536},
        kept
        | {"role": "destination", "staging": "/s", "kept": "/k/l", "keys": {"cpus": "1"}}
        | {"memory_bytes": 4096},
    ]
    records = [fields, fields | {"ask": ["ssh", "hv2", "bhyrecv"]}]
    records += [fields | {"revive": each} for each in revived]
    return [json.dumps(each) for each in records]


def _meta() -> bytes:
    return json.dumps(made()[0]).encode()


def _lists() -> list[bytes]:
    pairs: dict[str, nvlist.Value] = {
        "cmd": "checkpoint",
        "n": 7,
        "yes": True,
        "none": None,
        "raw": b"\0\1",
    }
    return [nvlist.pack(pairs)[0], nvlist.pack({})[0]]


def _bhyve_config() -> str:
    keys = GOOD["keys"] | {"pci.0.3.0.path": "/dev/zvol/%(name)", "pci.0.5.0.backend": "tap0"}
    return "# web1\n" + "".join(f"{key}={value}\n" for key, value in keys.items())


_STARTED = "\f".join((CONF, "", "hv1\nbhysend\n", f"# process 1 1 x\n{_bhyve_config()}"))
_TEXTS = """Device 1K-blocks Used Avail Capacity
/dev/ada0p3 4194304 12 4194292 0%
zroot/vm\t/zroot/vm zfs rw 0 0
datastore_list="default other"
path_other="zfs:zroot/vm"
"""


def _qmp() -> list[bytes]:
    """Return one sound conversation for each question of the target, in its order."""
    file = {"drv": "qcow2", "node-name": "n", "image": {"virtual-size": 9}, "file": "/a"}
    block = {"device": "d0", "qdev": "/machine/peripheral/vd0/x", "inserted": file}
    memdev = {"id": "ram0", "size": 4096, "share": True}
    child = {"name": "vd0", "type": "child<virtio-blk-pci>"}
    words = [
        ["q35-machine", {"enabled": True}, {"arch": "x86_64"}, [block]],
        [[memdev], "/objects/ram0", {"base-memory": 4096}, 0],
        [{"status": "running"}],
        [[block, {"inserted": {"drv": "file", "file": 'json:{"file": {"filename": "/a"}}'}}]],
        [[{"id": "j", "type": "mirror", "status": "concluded"}], [{"id": "e", "type": "nbd"}]],
        [[child], "05.0", [child], [{}]],
        [[{"capability": "x-ignore-shared", "state": False}], {"status": "active"}],
        [{"status": "failed", "error-desc": "x"}],
        [{"status": "active"}, None, {}, {"status": "paused"}, None, {"status": "running"}],
    ]
    return [bytes([at]) + json.dumps(each).encode() for at, each in enumerate(words)]


if __name__ == "__main__":
    main()
