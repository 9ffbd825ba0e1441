"""The guests that the cells share."""

from cli.conftest import stable

__all__ = ["stable"]
