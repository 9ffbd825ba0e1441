"""Times, sizes and rates, as an operator types them."""

from __future__ import annotations

import pytest

from bhystream import units
from bhystream.errors import UsageError


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0s", 0),
        ("1ns", 1),
        ("3us", 3_000),
        ("300ms", 300_000_000),
        ("1.5s", 1_500_000_000),
        ("1.001s", 1_001_000_000),
        ("0.1ms", 100_000),
        ("10m", 600 * 10**9),
        ("2h", 7200 * 10**9),
        ("999999999999999h", 999_999_999_999_999 * 3600 * 10**9),
    ],
)
def test_times(text: str, ns: int) -> None:
    # A float has 53 bits: a longer number is exact to 1e-15.
    assert units.time_ns(text, "-d") == pytest.approx(ns, rel=1e-15, abs=0)


BAD_NUMBERS = [
    "",
    "s",
    "-1s",
    "+1s",
    "1e3s",
    "1..2s",
    ".5s",
    "5.s",
    "1 s",
    " 1s",
    "1s\n",
    "\u0661s",
]


@pytest.mark.parametrize(
    "text",
    [
        *BAD_NUMBERS,
        "\u0661s",
        "1",
        "300",
        "1S",
        "1Ms",
        "1d",
        "1sm",
        "nans",
        "infs",
        "9" * 400 + "s",
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a time with its unit") as caught:
        units.time_ns(text, "-d")
    assert str(caught.value).startswith(f"-d {text}: ")


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1", 1),
        ("100", 100),
        ("1K", 1024),
        ("100M", 100 << 20),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("8kbit", 1000),
        ("100Mbit", 12_500_000),
        ("10Gbit", 1_250_000_000),
        ("2.5Gbit", 312_500_000),
        ("0.5K", 512),
    ],
)
def test_rates(text: str, rate: int) -> None:
    assert units.rate_bytes(text, "-B") == rate


@pytest.mark.parametrize(
    "text",
    ["0", "0M", "0.5", "1kbits", "1Kbit", "1mbit", "1MB", "1MiB", "1k", "1bit", "K"]
    + [text.replace("s", "M") for text in BAD_NUMBERS]
    + ["9" * 400 + "T"],
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a rate, such as 100M or 10Gbit"):
        units.rate_bytes(text, "-B")
