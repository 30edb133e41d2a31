"""benchmarks/step.py at tiny shapes: every kind of row, their arithmetic, the clock of regions."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_sparse import BlockMask, state

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import step as benchmark  # noqa: E402
from full_size import MODELS, build, tiny  # noqa: E402
from regions import Clock  # noqa: E402

ROW = {"model", "tokens", "kind", "compiled", "density", "seconds", "peak_bytes", "cost"}
ROW |= {"attention_s", "search_s", "selection_s", "reorder_s", "rest_s", "measured_seconds"}
SCHEDULE = {"model", "density", "effective_cost", "seconds_50", "dense_seconds_50", "speedup"}
SCHEDULE |= {"overhead_share", "overhead_share_by_difference", "effective_time"}
SPLIT = [f"{region}_s" for region in benchmark.REGIONS]


def run(out, model, *options):
    options = ["--tiny", "--block-size", "32", "--repeats", "1", *options]
    benchmark.main(["--model", model, "--out", str(out), *options])
    return json.loads(out.read_text())


@pytest.mark.parametrize("model", [name for name in MODELS if name != "wan-14b-720p"])
def test_every_kind_of_forward_and_schedule(tmp_path, model):
    backend = "_native_math" if model.startswith("wan") else "native"
    modes = ["--modes", "eager", "compiled", "--compile-backend", "eager"]
    modes += ["--dense-backend", backend, "--densities", "0.4", "--whole", "sparse"]
    result = run(tmp_path / "step.json", model, *modes)
    rows = {(row["kind"], row["compiled"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 12 and result["dense_backend"] == backend
    for (kind, _), row in rows.items():
        assert ROW <= set(row)
        assert sum(row[name] for name in SPLIT) == pytest.approx(row["seconds"])
        assert row["attention_s"] > 0
        assert row["rest_s"] > 0 or "attention_from" in row  # two forwards, in noise
        assert row["measured_seconds"] < row["seconds"]  # two layers of four are built
        assert (row["search_s"] > 0) == kind.startswith("search")
        assert (row["reorder_s"] > 0) == (kind != "dense")
        assert 0 <= row["unpack_s"] <= row["selection_s"]
    density = rows["reuse", False]["cost"]
    assert rows["search", False]["cost"] == 1.5 and 0.35 < density < 0.7
    assert rows["search again", False]["cost"] == pytest.approx(density + 0.5)
    schedules = result["schedules"]
    assert len(schedules) == 2 * len(benchmark.SCHEDULES)
    assert all(SCHEDULE <= set(schedule) for schedule in schedules)
    assert schedules[0]["effective_cost"] == pytest.approx((10 + 1.5 + 0.5 + 39 * density) / 50)
    counts = {"warm-up": 10, "search": 1, "first reuse": 1, "search again": 1, "reuse": 37}
    seconds = sum(count * rows[kind, False]["seconds"] for kind, count in counts.items())
    branches = len(result["branches"])
    assert schedules[0]["seconds_50"] == pytest.approx(branches * seconds)
    assert schedules[0]["dense_seconds_50"] == pytest.approx(
        branches * 50 * rows["dense", False]["seconds"]
    )
    assert len(result["whole"]) == 2 and result["left_out"] == []


@pytest.mark.parametrize("model", ["wan-1.3b-480p", "cogvideox-5b-480p"])
def test_installed_flash_attn_4_is_reached_through_diffusers(tmp_path, monkeypatch, model):
    calls = []

    def flash_attn_func(query, key, value):
        calls.append(query.shape)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        logits = query @ key.mT * query.shape[-1] ** -0.5
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    fake = SimpleNamespace(flash_attn_func=flash_attn_func)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, fake)
    if not benchmark.install_fa4():
        pytest.skip("this diffusers does not know flash-attn-4")
    monkeypatch.setattr(benchmark, "candidates", lambda device: ["native", benchmark.FA4])
    options = ["--dense-backend", benchmark.FA4, "--compile-backend", "eager"]
    result = run(tmp_path / "step.json", model, *options, "--densities", "0.4")
    assert [row["attention"] for row in result["rows"] if row["kind"] == "warm-up"] == [
        benchmark.FA4
    ] * 2
    tokens = [shape[1] for shape in calls].count(result["tokens"])
    eager, compiled, alone = 2 * 2, 2 * 2, 4  # two layers; a call to warm up, and one timed
    assert tokens >= eager + compiled + alone


def test_masks_near_and_recorded_and_no_time_left(tmp_path):
    options = "wan-1.3b-480p", "--modes", "eager", "--densities", "0.4"
    near = run(tmp_path / "near.json", *options, "--masks", "near")
    assert 0.35 < near["schedules"][0]["effective_cost"] < 0.7
    mask = torch.rand(3, 2, 10, 10) < 0.5
    bits = BlockMask.from_dense(mask | torch.eye(10, dtype=torch.bool), 315, 315, (32, 32)).bits
    np.savez(tmp_path / "masks.npz", bits=bits.numpy())
    recorded = run(tmp_path / "r.json", *options, "--masks", str(tmp_path / "masks.npz"))
    (reuse,) = (row for row in recorded["rows"] if row["kind"] == "reuse")
    assert 0.4 < reuse["cost"] < 0.7
    late = run(tmp_path / "late.json", *options, "--seconds", "0")
    assert late["rows"] == late["schedules"] == []
    assert late["left_out"] == ["dense, eager", "eager, density 0.4"]


def test_residuals_on_the_host_are_timed_and_counted_there(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "is_apart", lambda device: True)
    options = "--modes", "eager", "--densities", "0.4", "--method", "auto", "--cache-device"
    found = {}
    for where in ("model", "cpu"):
        result = run(tmp_path / f"{where}.json", "wan-1.3b-480p", *options, where)
        (found[where],) = (row for row in result["rows"] if row["kind"] == "reuse")
    there, here = found["model"], found["cpu"]
    assert there["stream_s"] == there["host_bytes"] == 0 < here["stream_s"] <= here["selection_s"]
    # beside what was built, which a CPU does not tell: of two branches with four layers, two layers
    assert there["peak_bytes"] - here["peak_bytes"] == here["host_bytes"] * 6 / 8 > 0


def test_schedules_count_each_kind():
    assert benchmark.counts_of((0.2, 0.6)) == {
        "warm-up": 10, "search": 1, "first reuse": 1, "reuse": 37, "search again": 1
    }  # fmt: skip
    assert benchmark.counts_of((0.0,)) == {"search": 1, "first reuse": 1, "reuse": 48}


def test_regions_exclude_those_inside_and_add_up():
    clock = Clock(torch.device("cpu"))

    def call():
        time.sleep(0.02)
        with clock.region("outer"):
            clock.enter_blocks("blocks")
            clock.wrap(time.sleep, "inner")(0.03)
            clock.enter_blocks(None)

    times = clock.measure(call)
    assert times["blocks", "inner"] >= 0.03 and times[None, "rest"] >= 0.02
    assert times[None, "outer"] + times["blocks", "outer"] < 0.02
    call()  # outside of a measurement nothing is kept
    assert clock.marks is None


def test_models_have_their_published_numbers_of_parameters():
    for name, billions in [("wan-1.3b-480p", 1.42), ("hunyuanvideo-720p", 12.82)]:
        model = MODELS[name]
        layers = tuple(number for _, _, number in model.layers)
        with torch.device("meta"):
            options = dict(zip([option for _, option, _ in model.layers], layers))
            transformer = model.cls(**model.config, **options)
        parameters = sum(parameter.numel() for parameter in transformer.parameters())
        assert parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_precision_of_the_parameters():
    model = tiny(MODELS["wan-1.3b-480p"])
    transformer = build(model, (1,), torch.device("cpu"), torch.bfloat16)
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32
    assert not any(parameter.is_meta for parameter in transformer.parameters())
