"""When a layer runs dense, searches for a mask, or reuses the one it has."""

from typing import Literal

Kind = Literal["dense", "search", "reuse"]


def search_steps(search_at: tuple[float, ...], num_steps: int, apart: int = 1) -> list[int]:
    """Absolute steps, 0-based, of fractions of `num_steps`; the last step at the latest.

    Those that come less than `apart` steps after the one before are left out.
    """
    found: list[int] = []
    for step in sorted({min(round(at * num_steps), num_steps - 1) for at in search_at}):
        if not found or step >= found[-1] + apart:
            found.append(step)
    return found


def step_kind(
    step: int,
    num_steps: int,
    search_at: tuple[float, ...],
    found_at: int | None,
    every_step: bool = False,
    apart: int = 1,
) -> Kind:
    """What to do at `step` (0-based) of `num_steps`.

    Judged from absolute steps, never from a count of calls: a step cache may skip layers or whole
    steps, and a second transformer starts in the middle of a run.

    Args:
        found_at: step at which the kept mask was found, None where there is none.
        every_step: search at every step from the first search on.
    """
    due = [s for s in search_steps(search_at, num_steps, apart) if s <= step]
    if not due:
        return "dense"
    latest = step if every_step else due[-1]
    return "search" if found_at is None or found_at < latest else "reuse"
