"""A dry run imports only what it uses: else the imports are most of what it costs.

bench/starts.py measures the cost.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backend.bhyve_rig import Two, two_hosts
from support.dry_run import loaded

pytestmark = pytest.mark.standin

# The modules of ours that a dry run of a guest of the stand-in uses.
USED = {
    "bhystream": (
        "beneath commandline durable errors guest handlers hypervisors inherited report signals"
        " strict_json units"
    ),
    "bhystream.handover": "prune standing state",
    "bhystream.send": (
        "dryrun experience head hostload main options precopy prediction stopwatch strides survey"
    ),
    "bhystream.stream": "format writer",
    "bhystream.memory": "extent mapping page xxh3",
    "bhystream.backend": "files process refusals supervisors",
    "bhystream.backend.bhyve": (
        "backing carriable checkpoint config datastore defaults host identity keys layout listening"
        " memory nvlist opened registers residency source supervisors verdict"
    ),
    "bhystream.standin": "cpu kernel node settings sysctl vm",
}

# Modules of Python that cost milliseconds, and that a dry run has no use for.  dataclasses loads
# inspect, ast and tokenize, and compiles code for each class.
UNUSED = (
    "argparse ast asyncio base64 calendar datetime dataclasses inspect locale logging platform"
    " queue random shutil subprocess tempfile threading tokenize traceback uuid"
)


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    with two_hosts() as made:
        made.start()
        yield made


@pytest.mark.parametrize("options", ["-n", "-nP"])
def test_a_dry_run_imports_what_it_uses_and_nothing_else(two: Two, options: str) -> None:
    used = {f"{package}.{name}" for package, names in USED.items() for name in names.split()}
    found = set(loaded(two.config(), options))
    ours = {name for name in found if name.partition(".")[0] == "bhystream"}
    assert ours == used | USED.keys()
    assert found & set(UNUSED.split()) == set()
