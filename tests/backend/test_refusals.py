"""Reasons against a move, collected: each once, in order, and the first error gives the class."""

from __future__ import annotations

import pytest

from bhystream.backend.refusals import Refusals, refusal
from bhystream.errors import (
    AccessError,
    BhyError,
    GuestEndedError,
    GuestError,
    IncompatibleError,
    Reason,
)


def test_a_reason_is_its_line() -> None:
    reason = Reason("uuid: none", "set it", "uuid")
    assert reason == "uuid: none; set it"
    assert (reason.what, reason.cure, reason.about) == ("uuid: none", "set it", ("uuid",))
    assert Reason("uuid: none") == "uuid: none"


def test_an_error_states_its_text_and_its_hint_as_one_reason() -> None:
    [reason] = GuestError("guest web1: it is paused", "let it run\nor end it").reasons("guest web1")
    assert (reason.what, reason.cure) == ("it is paused", "let it run; or end it")


def test_nothing_found_is_no_error() -> None:
    found = Refusals("guest web1")
    assert found.merged() is None
    found.require_none()


def test_every_reason_stands_in_a_line_of_one_error() -> None:
    found = Refusals("guest web1")
    found.add(GuestError("guest web1: it is paused", "let it run"))
    with found.collecting():
        raise IncompatibleError("uuid: none", "set it")
    found.extend([Reason("nvme: not saved", "virtio-blk"), Reason("uuid: none", "set it")])
    error = found.merged()
    assert type(error) is GuestError and error.status == 69
    assert str(error) == "guest web1: it is paused; let it run"
    assert error.hint.splitlines() == [
        "guest web1: uuid: none; set it",
        "guest web1: nvme: not saved; virtio-blk",
    ]
    assert error.reasons() == (
        "it is paused; let it run",
        "uuid: none; set it",
        "nvme: not saved; virtio-blk",
    )


def test_an_error_that_was_merged_is_taken_whole() -> None:
    inner = Refusals()
    inner.extend([Reason("a", "b"), Reason("c", "d", "key")])
    outer = Refusals("guest web1")
    with outer.collecting():
        inner.require_none()
    assert outer.reasons == ["a; b", "c; d"]
    assert [one.about for one in outer.reasons] == [(), ("key",)]


def test_one_error_alone_is_raised_as_it_was() -> None:
    found = Refusals("guest web1")
    error = refusal(Reason("uuid: none", "set it"))
    found.add(error)
    with pytest.raises(IncompatibleError) as caught:
        found.require_none()
    assert caught.value is error
    assert (str(error), error.hint) == ("uuid: none", "set it")


def test_one_edit_is_named_once() -> None:
    found = Refusals()
    found.extend([Reason("a", "edit"), Reason("b", "other"), Reason("c", "edit")])
    found.keep_first("edit")
    assert found.reasons == ["a; edit", "b; other"]


@pytest.mark.parametrize(
    "error", [AccessError("no"), GuestError("no"), GuestEndedError("it has ended")]
)
def test_an_error_of_another_kind_ends_the_search(error: BhyError) -> None:
    found = Refusals("guest web1")
    with pytest.raises(type(error)), found.collecting():
        raise error
    assert found.reasons == []


def test_an_error_below_a_kind_ends_the_search_too() -> None:
    found = Refusals("guest web1")
    with found.collecting(GuestError):
        raise GuestError("it is paused")
    with pytest.raises(GuestEndedError), found.collecting(GuestError):
        raise GuestEndedError("it has ended")
    assert found.reasons == ["it is paused"]
