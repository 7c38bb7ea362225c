"""For your own tests: prove that a run of yours, killed at any instant, goes on as if nothing had happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.testing.certify import Certificate, Difference, NotExactError, certify_resume

__all__ = ["Certificate", "Difference", "NotExactError", "certify_resume"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainkit.testing import certify

    return getattr(certify, name)
