"""Two processes that share a transformer's calls by Ulysses, against one."""

from functools import partial

import pytest
import torch
from diffusers import ContextParallelConfig
from test_joint_pipelines import PIPELINES as JOINT
from test_joint_pipelines import apart, build
from test_joint_pipelines import latents as generate_joint
from tiny_ltx_video import ltx_call, ltx_pipeline
from tiny_wan_family import PIPELINES as WAN
from tiny_wan_family import generate as generate_wan
from two_processes import on_two

from dit_sparse import enable_sparse_attention

SPARSE = {"density": 0.4, "block_size": 32, "search_at": (0.25, 0.5)}
DENSE = {"density": 1.0, "block_size": 32}
SLOW = pytest.mark.slow


def make(name):
    """A pipeline, and how to generate latents with it."""
    torch.manual_seed(0)
    if name == "LTX-Video":
        pipe = ltx_pipeline("LTXPipeline")
        return pipe, partial(generate_joint, pipe, ltx_call(1, True))
    if name in JOINT:
        pipe, call = build(name)
        return pipe, partial(generate_joint, pipe, call)
    pipe, call = WAN[name][0]()
    return pipe, partial(generate_wan, pipe, call)


def outcome(handle, generate):
    """Latents, the last masks of all layers and branches, and the report."""
    states = [installed.state for installed in handle._installed]
    for state in states:
        state.masks = {}
    torch.manual_seed(1)
    latents = generate()
    masks = [
        mask.to_dense() for state in states for _, (_, mask) in sorted(state.masks.items())
    ]
    return latents, masks, handle.report()


def one(name, method="adaspa", **options):
    pipe, generate = make(name)
    with enable_sparse_attention(pipe, method, **options) as handle:
        return outcome(handle, generate)


def transformers(pipe):
    return [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part]


def parallelise(pipe, **plan):
    for transformer in transformers(pipe):
        config = ContextParallelConfig(ulysses_degree=2)
        transformer.enable_parallelism(config=config, **plan)


def shared(rank, name, first, method="adaspa", **options):
    """`first` is what is enabled first, "parallel" or "sparse"."""
    pipe, generate = make(name)
    if first == "parallel":
        parallelise(pipe, **{} if pipe.transformer._cp_plan else {"cp_plan": {}})
    handle = enable_sparse_attention(pipe, method, **options)
    if first == "sparse":
        parallelise(pipe)
    return outcome(handle, generate)


def assert_same(alone, together):
    """Latents within rounding; the masks of all heads, and what is told of them, alike."""
    latents, masks, report = alone
    for other, _, told in together:
        assert apart(other, latents) < 1e-4
        assert other.equal(together[0][0])
        assert told.effective_cost == pytest.approx(report.effective_cost)
        assert told.kept_mass == pytest.approx(report.kept_mass, abs=1e-5)
        assert told.planned_cache_bytes == report.planned_cache_bytes
        assert told.peak_cache_bytes == report.peak_cache_bytes
        for mine, theirs in zip(told.trace, report.trace, strict=True):
            assert mine["kind"] == theirs["kind"]
            assert mine["density"] == pytest.approx(theirs["density"])
    for number, mask in enumerate(masks):
        parts = [other[1][number] for other in together]
        assert torch.cat(parts, 1).equal(mask) if mask.shape[1] > 1 else parts[0].equal(mask)


@pytest.mark.parametrize("first", ["parallel", "sparse"])
@pytest.mark.parametrize("name", ["T2V", "HunyuanVideo", "CogVideoX"])
def test_two_processes_find_the_masks_and_latents_of_one(tmp_path, name, first):
    alone = one(name, **SPARSE)
    assert alone[2].search_calls and alone[2].reuse_calls and alone[2].effective_cost < 1
    assert_same(alone, on_two(tmp_path, partial(shared, name=name, first=first, **SPARSE)))
