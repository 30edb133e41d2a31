"""When a layer runs dense, searches, or reuses."""

import pytest

from dit_sparse import AdaSpa, Auto, DraftAttention, Rettention, SolAttn, Window
from dit_sparse.schedule import search_steps, step_kind

AT = (0.2, 0.6)


def run(num_steps, skipped=()):
    found, kinds = None, []
    for step in range(num_steps):
        if step in skipped:
            continue
        kind = step_kind(step, num_steps, AT, found)
        found = step if kind == "search" else found
        kinds.append(kind)
    return kinds


def test_published_schedule():
    assert search_steps(AT, 50) == [10, 30]
    kinds = run(50)
    assert kinds[:10] == ["dense"] * 10
    assert [i for i, kind in enumerate(kinds) if kind == "search"] == [10, 30]
    assert kinds.count("reuse") == 38


def test_few_steps():
    assert run(4) == ["dense", "search", "search", "reuse"]
    assert run(1) == ["search"]


def test_a_search_that_a_cache_skipped_is_made_up_for():
    assert run(25, skipped=(15, 16)).count("search") == 2
    assert step_kind(17, 25, AT, found_at=5) == "search"


@pytest.mark.parametrize(
    ("config", "num_steps", "corrected", "cost"),
    [
        (AdaSpa(density=0.2), 50, 0, (10 + 1.5 + 0.7 + 38 * 0.2) / 50),
        (AdaSpa(density=0.2), 2, 0, (1.5 + 0.7) / 2),
        (Rettention(density=0.1, search_at=(0.3, 0.5)), 10, 1, (3 + 2 * 1.1 + 5 * 0.1) / 10),
        (Window(density=0.3), 5, 0, (1 + 4 * 0.3) / 5),
        (DraftAttention(density=0.25), 8, 0, (2 + 6 * 0.25) / 8),
        (Auto(density=0.1, search_at=(0.2, 0.8)), 5, 1, (1 + 2 * 1.225 + 0.2 + 4 / 64) / 5),
        (Auto(density=0.1, search_at=(0.2, 0.8)), 5, 0.5, (1 + 2 * 0.725 + 0.2 + 4 / 64) / 5),
        (SolAttn(density=0.1, search_at=(0.2, 0.8)), 5, 0, (1 + 4 * (0.1 + 1 / 64)) / 5),
    ],
)
def test_planned_cost(config, num_steps, corrected, cost):
    planned = config.planned_cost(num_steps, config.density, corrected)
    assert planned == pytest.approx(cost)


def test_a_transformer_that_starts_in_the_middle_searches_first():
    assert step_kind(12, 25, AT, found_at=None) == "search"


def test_the_last_step_searches_where_a_fraction_rounds_to_the_end():
    assert search_steps((0.5, 0.96), 10) == [5, 9]
    assert step_kind(9, 10, (0.96,), found_at=None) == "search"


def test_every_step_searches_from_the_first_search_on():
    kinds = [step_kind(s, 5, (0.4,), None if s < 3 else s - 1, every_step=True) for s in range(5)]
    assert kinds == ["dense", "dense", "search", "search", "search"]
    assert step_kind(3, 5, (0.4,), found_at=3, every_step=True) == "reuse"  # at its second call


def test_searches_too_near_to_another_are_left_out():
    assert search_steps((0.24, 0.49, 0.75), 4, apart=2) == [1, 3]
    assert search_steps((0.24, 0.49, 0.75), 8, apart=2) == [2, 4, 6]
    assert search_steps((0.24, 0.49, 0.75), 8, apart=3) == [2, 6]
    assert search_steps((0.1, 0.2, 0.3), 10) == [1, 2, 3]
    kinds, found = [], None
    for step in range(8):
        kinds.append(step_kind(step, 8, Auto().search_at, found, apart=Auto.apart))
        found = step if kinds[-1] == "search" else found
    assert "".join(kind[0] for kind in kinds) == "dsrsrrsr"  # 1, 2, 3, 6
    cost = (2 * 1.125 + 4 * (0.1 + 1 / 64)) / 4  # searches at 0 and 2
    assert Auto(density=0.1).planned_cost(4, 0.1, 1) == pytest.approx(cost)
