"""What speaks against the move of one guest, collected, so that the operator edits once.

A check raises an error or returns its reasons, and the checks behind it are made all
the same, unless they need its result.  In the end one error states everything.  Its
class, and so its exit status, is that of the first error found, as if nothing had been
collected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from bhystream.errors import BhyError, IncompatibleError, Reason


class Refusals:
    """The errors about one guest, in the order in which they were found.

    who: the guest as messages name it, "guest web1"; may be set later, when the name is known.
    reasons: what the errors state, each reason once.
    """

    def __init__(self, who: str = "") -> None:
        self.who = who
        self.reasons: list[Reason] = []
        self._errors: list[BhyError] = []

    def add(self, error: BhyError) -> None:
        """Take an error."""
        self._errors.append(error)
        self.reasons += [one for one in error.reasons(self.who) if one not in self.reasons]

    def extend(self, reasons: Iterable[Reason]) -> None:
        """Take reasons, each for an IncompatibleError."""
        for one in reasons:
            self.add(refusal(one))

    def keep_first(self, cure: str) -> None:
        """Drop all reasons with this cure but the first."""
        same = [one for one in self.reasons if one.cure == cure]
        self.reasons = [one for one in self.reasons if one not in same[1:]]

    @contextlib.contextmanager
    def collecting(self, *kinds: type[BhyError]) -> Iterator[None]:
        """Take the IncompatibleError that ends the with block, or an error of just these kinds.

        An error of a kind below them says that the hypervisor, or the way to it, has failed.
        """
        try:
            yield
        except BhyError as error:
            if type(error) not in (IncompatibleError, *kinds):
                raise
            self.add(error)

    def merged(self) -> BhyError | None:
        """Return one error that states every reason in a line; None if there is no reason."""
        if not self._errors:
            return None
        error = self._errors[0]
        lines = [f"{self.who}: {one}" if self.who else one for one in self.reasons]
        error.args, error.hint = (lines[0],), "\n".join(lines[1:])
        error.collected = tuple(self.reasons)
        return error

    def require_none(self) -> None:
        """Raise the one error that was taken, as it is, or else the merged() one, if any."""
        error = self._errors[0] if len(self._errors) == 1 else self.merged()
        if error is not None:
            raise error


def refusal(reason: Reason) -> IncompatibleError:
    """Return the error that states one reason."""
    error = IncompatibleError(reason.what, reason.cure)
    error.collected = (reason,)
    return error
