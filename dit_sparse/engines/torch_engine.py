"""The reference in plain torch: runs everywhere."""

from ..reference import sparse_attention as attend

__all__ = ["attend", "missing", "unfit"]


def missing(device) -> str | None:
    return None


def unfit(problem) -> str | None:
    return None
