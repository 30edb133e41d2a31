"""The cost model behind `auto`: dense where sparse is expected to be slower, and it says so."""

import json
from pathlib import Path

import pytest
import torch
from test_wan import generate
from tiny import tiny_wan

from dit_sparse import cost_model, enable_sparse_attention, step
from dit_sparse.cost_model import KINDS, features_of, known_constants, predicted_speedup

CPU = torch.device("cpu")
SLOW = {"dense": [1e-6, 0, 0], "search": [3e-3, 0, 0, 0], "reuse": [2e-3, 0, 0]}
FAST = {"dense": [1e-3, 0, 0], "search": [1e-3, 0, 0, 0], "reuse": [1e-4, 0, 0]}


@pytest.fixture
def constants(monkeypatch):
    return lambda of: monkeypatch.setattr(cost_model, "constants_of", lambda device: of)


def test_seconds_of_a_run_are_those_of_its_calls(constants):
    constants(FAST)
    speedup = predicted_speedup((1, 640, 4, 64), 0.1, (0.2, 0.6), 10, 1, CPU)
    assert speedup == pytest.approx(10 * 1e-3 / (2 * 1e-3 + 2 * 1e-3 + 6 * 1e-4))
    speedup = predicted_speedup((1, 640, 4, 64), 0.1, (0.2, 0.3), 10, 2, CPU)  # one is left out
    assert speedup == pytest.approx(10 * 1e-3 / (2 * 1e-3 + 1e-3 + 7 * 1e-4))


def test_features_count_what_a_call_does():
    batch, tokens, heads, dim = 2, 100, 3, 8
    n = batch * heads
    pairs = n * tokens**2 * dim
    assert features_of("dense", (batch, tokens, heads, dim), 0.1) == [1, n * tokens * dim, pairs]
    search = [1, n * tokens * dim, n * tokens**2, pairs]
    assert features_of("search", (batch, tokens, heads, dim), 0.1) == search
    assert features_of("reuse", (batch, tokens, heads, dim), 0.1)[-1] == pytest.approx(pairs / 10)


def test_what_ships_is_positive_and_complete():
    for constants in known_constants().values():
        assert {kind: len(values) for kind, values in constants.items()} == {
            kind: len(names) for kind, names in KINDS.items()
        }
        assert all(value >= 0 for values in constants.values() for value in values)
        assert all(any(values) for values in constants.values())


def test_nothing_is_known_of_a_cpu():
    assert predicted_speedup((1, 640, 4, 64), 0.1, (0.2,), 10, 1, CPU) is None


def test_constants_are_those_of_the_architecture(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cost_model, "known_constants", lambda: {"sm_90": FAST, "sm_120": SLOW})
    for capability, known in (((9, 0), FAST), ((12, 0), SLOW), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert cost_model.constants_of.__wrapped__(torch.device("cuda")) is known
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD's numbers mean other GPUs
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert cost_model.constants_of.__wrapped__(torch.device("cuda", 0)) is None


def test_auto_stays_dense_where_sparse_would_be_slower(constants):
    pipe = tiny_wan()
    stock = generate(pipe)
    constants(SLOW)
    with enable_sparse_attention(pipe, density=0.3, block_size=32, order="raster") as handle:
        assert generate(pipe).equal(stock)
    report = handle.report()
    assert report.effective_cost == 1 and report.reuse_calls == report.search_calls == 0
    assert sum("every step runs dense" in note for note in report.notes) == 1
    assert report.peak_cache_bytes == report.planned_cache_bytes == 0
    with enable_sparse_attention(pipe, "adaspa", density=0.3, block_size=32) as handle:
        generate(pipe)
    assert handle.report().reuse_calls
    constants(FAST)
    with enable_sparse_attention(pipe, density=0.3, block_size=32) as handle:
        generate(pipe)
    assert handle.report().reuse_calls and not handle.report().notes


def test_the_tail_is_asked_for_with_the_kept_blocks(monkeypatch):
    asked = []
    monkeypatch.setattr(step, "predicted_speedup", lambda of, density, *more: asked.append(density))
    with enable_sparse_attention(pipe := tiny_wan(), density=0.5, block_size=32, tail_tokens=32):
        generate(pipe)
    assert asked == [0.5 + 1 / 32]


def test_constants_are_fitted_from_times(tmp_path, monkeypatch):

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import crossover

    rows = []
    for heads, tokens in ((2, 100), (8, 1000), (8, 10000)):
        shape = {"heads": heads, "tokens": tokens, "dim": 64}
        pairs = heads * tokens**2 * 64
        rows.append({**shape, "method": "dense", "kind": "dense", "seconds": 1e-5 + 2e-14 * pairs})
        more = {**shape, "method": "auto", "density": 0.1, "tail_share": 0.05}
        rows.append({**more, "kind": "search", "seconds": 1e-4 + 3e-14 * pairs})
        rows.append({**more, "kind": "reuse", "seconds": 5e-5 + 3e-14 * pairs * 0.15})
    out = tmp_path / "rows.json"
    out.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(crossover, "MODEL", tmp_path / "model.json")
    crossover.MODEL.write_text("{}")
    crossover.main(["--out", str(out), "--fit", "sm_90"])
    found = json.loads(crossover.MODEL.read_text())["sm_90"]
    assert found["dense"] == pytest.approx([1e-5, 0, 2e-14], rel=0.05, abs=1e-15)
    assert found["reuse"] == pytest.approx([5e-5, 0, 3e-14], rel=0.05, abs=1e-15)
    crossover.main(["--out", str(out), "--grids", "1", "--calls", "1", "--method", "auto"])
    assert {row["kind"] for row in json.loads(out.read_text())["rows"]} == set(KINDS)
