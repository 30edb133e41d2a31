"""When a layer runs dense, searches, or reuses."""

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


def test_a_transformer_that_starts_in_the_middle_searches_first():
    assert step_kind(12, 25, AT, found_at=None) == "search"
