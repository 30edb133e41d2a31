"""The methods of the field on tiny pipelines of all families, and in the sweep of pareto.py."""

import json
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from composed import generate, make
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from test_field import BLOCK, FIELD
from test_pareto import FIELDS, arguments
from tiny import tiny_wan
from tiny_joint import PIPELINES
from typer.testing import CliRunner

from dit_sparse import SeerAttention, available_methods, enable_sparse_attention
from dit_sparse.calibrate import ModeSearch, calibrate
from dit_sparse.cli import app
from dit_sparse.defaults import torch_defaults
from dit_sparse.distil import Distillation, distil
from dit_sparse.look import profile
from dit_sparse.patterns.left_out import LEFT_OUT

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("benchmarks", "samples")]

import pareto  # noqa: E402

CALL = {"num_inference_steps": 3, "output_type": "latent"}
WAN = {"prompt": "a red ball", "height": 96, "width": 96, "num_frames": 9}
SMALL_GRID = {"biformer": {"region": 1}, "misa": {"region": 1}}
WITHOUT_A_FILE = [
    name for name in available_methods() if name not in ("sparse-vdit", "seerattention")
]
SPARSE_AT_ALL = {"auto": {"dense_if_faster": False}, "sparge": {"similarity": -1}} | SMALL_GRID


@cache
def pipeline(family):
    """A pipeline and what it is called with."""
    if family == "Wan":
        return tiny_wan(), WAN | {"max_sequence_length": 16}
    make, call = PIPELINES[family]
    return make(), call(1, False)


@pytest.mark.parametrize("family", ["Wan", "HunyuanVideo", "CogVideoX", "Mochi"])
@pytest.mark.parametrize("method", FIELD)
@torch.no_grad()
def test_methods_run_on_all_families(method, family):
    pipe, call = pipeline(family)
    options = {"density": 0.4, "block_size": BLOCK, "search_at": (0.34,)}
    with enable_sparse_attention(pipe, method, **options, **SMALL_GRID.get(method, {})) as handle:
        assert pipe(**call, **CALL).frames.isfinite().all()
        report = handle.report()
    assert report.search_calls > 0 and report.dense_calls > 0
    assert 0 < report.density < 1 or method in ("sparge", "radial")
    assert 0 < report.peak_cache_bytes <= report.planned_cache_bytes
    reuse = [e["density"] for e in report.trace if e["kind"] == "reuse"]
    assert bool(reuse) != FIELD[method].every_step


@cache
def pipeline_and_its_latents(family):
    pipe = make(family)
    return pipe, generate(pipe, family, num_inference_steps=3)


@pytest.mark.parametrize("family", ["LTX-Video", "SkyReels-V2"])
@pytest.mark.parametrize("method", WITHOUT_A_FILE)
@torch.no_grad()
def test_methods_run_on_ltx_video_and_skyreels_and_are_undone(method, family):
    pipe, stock = pipeline_and_its_latents(family)
    options = {"density": 0.4, "block_size": BLOCK, "search_at": (0.34,)}
    options |= SPARSE_AT_ALL.get(method, {})
    with enable_sparse_attention(pipe, method, **options) as handle:
        sparse = generate(pipe, family, num_inference_steps=3)
        report = handle.report()
    assert 1e-4 < (sparse - stock).abs().max() / stock.abs().max() < 0.1
    a_step = 2 if family == "LTX-Video" else 4  # two layers; both branches in one call, or not
    kinds = [entry["kind"] for entry in report.trace]
    then = "search" if available_methods()[method].every_step else "reuse"
    assert kinds == [kind for kind in ("dense", "search", then) for _ in range(a_step)]
    assert 0 < report.density < 1 and 0 < report.peak_cache_bytes <= report.planned_cache_bytes
    assert generate(pipe, family, num_inference_steps=3).equal(stock)


@pytest.mark.parametrize("family", ["LTX-Video", "SkyReels-V2"])
@torch.no_grad()
def test_tables_gates_and_profiles_of_ltx_video_and_skyreels(family, tmp_path):
    pipe, stock = pipeline_and_its_latents(family)
    run = partial(generate, pipe, family, num_inference_steps=3)
    table, gate = tmp_path / "modes.json", tmp_path / "gates.safetensors"
    calibrate(pipe, run, ModeSearch(density=0.5, block_size=BLOCK)).save(table)
    distil(pipe, run, Distillation(block_size=BLOCK, updates=2)).save(gate)
    for method, file in (("sparse-vdit", {"table": str(table)}), ("seerattention", {"gate": gate})):
        options = {"density": 0.5, "block_size": BLOCK} | file
        with enable_sparse_attention(pipe, method, **options) as handle:
            assert run().isfinite().all() and 0 < handle.report().density <= 1
    found = profile(pipe, run, pipeline="tiny", call={}, environment={})
    assert {entry["layer"] for entry in found.entries} == {0, 1}
    assert run().equal(stock)


@pytest.mark.parametrize("method", FIELD)
def test_pareto_sweeps_as_many_settings_of_each(method):
    grid = {"densities": (0.1, 0.2, 0.3, 0.4), "warm_ups": (0.0, 0.2), "searches": (1, 3)}
    grid["spacings"] = 1.0, 1.5  # which a single search has not
    configs = list(pareto.settings(None, method, FIELD[method], grid))
    each = 2 * (4 if FIELD[method].every_step else 3)
    assert len(configs) == len(set(configs)) == 4 * each


@pytest.mark.slow
def test_pareto_records_every_method(tmp_path):
    out = tmp_path / "pareto.json"
    methods = {*FIELD, "seerattention"}
    pareto.main([*arguments(out, *methods), "--budgets", "5"])  # so few tokens: all are sampled
    records = json.loads(out.read_text())["records"]
    assert {record["method"] for record in records} == methods
    assert all(FIELDS <= set(record) for record in records)


@pytest.mark.parametrize("cache", ["first block", "broadcast"])
@torch.no_grad()
def test_caches_of_diffusers_run_beside_sparse_attention(cache):
    """What DeepCache is in a transformer: whole steps, or attention outputs, are reused."""
    pipe = tiny_wan()
    branches = 2 if cache == "first block" else 1  # broadcast serves one call a step
    steps = CALL | {"num_inference_steps": 6, "guidance_scale": float(branches)}
    _, call = pipeline("Wan")
    stock = pipe(**call, **steps, generator=torch.Generator().manual_seed(0)).frames
    config = FirstBlockCacheConfig(threshold=0.5)
    if cache == "broadcast":
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    pipe.transformer.enable_cache(config)
    with enable_sparse_attention(pipe, "svg", density=0.5, block_size=BLOCK) as handle:
        assert pipe(**call, **steps).frames.isfinite().all()
        report = handle.report()
    assert 0 < report.search_calls and len(report.trace) < 6 * 2 * branches
    assert report.effective_cost < (report.dense_calls + 2 * report.search_calls) / (12 * branches)
    pipe.transformer.disable_cache()
    again = pipe(**call, **steps, generator=torch.Generator().manual_seed(0)).frames
    assert again.equal(stock)


NAMED = """
MInference MMInference FlexPrefill AnchorAttention SparseD HiP LLSA Double·Sparsity MoA S2-Attention
Scatterbrain LycheeDecode BiFormer MISA RTPurbo SeerAttention DeepCache A-SDM Sparse·VideoGen·1
Sparse·VideoGen·2 SpargeAttn Radial Sliding·Tile XAttention Framepack Animate·2
"""


def test_the_page_names_every_method_and_the_reason_of_those_without_a_row():
    page = (Path(__file__).parents[1] / "docs/field.md").read_text()
    for name in NAMED.split():
        assert name.replace("·", " ") in page
    for name, config in {**FIELD, "seerattention": SeerAttention}.items():
        file = sys.modules[config.__module__].__file__
        rows = [line for line in page.splitlines() if f"(`{name}`) |" in line]
        assert len(rows) == 1 and f"| `{Path(file).name}` |" in rows[0]
        assert f"| {config().order if config is not SeerAttention else 'curve'} |" in rows[0]
    text = CliRunner().invoke(app, ["methods"]).stdout
    for name, reason in LEFT_OUT.items():
        assert f"**{name}**: {reason}." in " ".join(page.split())
        assert f"    {name}: {reason}" in text


def other_defaults(transformer):
    """Of torch, while the transformer runs."""

    def enter(*_):
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")

    def leave(*_):
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)

    transformer.register_forward_pre_hook(enter, prepend=True)
    transformer.register_forward_hook(leave, always_call=True)


@pytest.mark.parametrize("method", WITHOUT_A_FILE)
@torch.no_grad()
def test_the_defaults_of_torch_change_nothing(method):
    options = {"density": 0.4, "block_size": BLOCK, "search_at": (0.34,)}
    call = WAN | CALL | {"max_sequence_length": 16, "height": 112}  # a grid of its own
    found = []
    for change in (other_defaults, lambda transformer: None):
        pipe = tiny_wan()
        change(pipe.transformer)
        enable_sparse_attention(pipe, method, **options | SMALL_GRID.get(method, {}))
        found.append(pipe(**call, generator=torch.Generator().manual_seed(0)).frames)
    assert found[0].equal(found[1])


def test_threads_that_overlap_leave_the_dtype_of_the_user():
    torch.set_default_dtype(torch.bfloat16)
    try:
        one, other = torch_defaults(), torch_defaults()
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        other.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
