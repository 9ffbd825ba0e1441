"""A plugin of pytest: how each test has ended, for the planter, a line of JSON for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Where the lines go.
VARIABLE = "PLANTED_OUTCOMES"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    """Write a line for each end: the test, its phase, the outcome, the exception and its text.

    Of the exception, the names of its class and of all the classes that it is made of.
    """
    result = yield
    report: pytest.TestReport = result.get_result()  # type: ignore[attr-defined]
    kinds, text = [], ""
    if call.excinfo is not None:
        kinds = [each.__name__ for each in call.excinfo.type.__mro__]
        text = str(call.excinfo.value)
    line = json.dumps([report.nodeid, report.when, report.outcome, kinds, text[:200]])
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(line + "\n")
