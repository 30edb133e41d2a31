"""Every pipeline of HunyuanVideo, CogVideoX and Mochi end to end on random weights."""

import pytest
import torch
from test_wan import leftovers
from tiny_joint import PIPELINES, cogvideox_call, cogvideox_pipeline, set_guidance

from dit_sparse import enable_sparse_attention, supported_pipelines

STEPS = 4  # dense, search, search with the LSE of the first, reuse
SPARSE = {"density": 0.5, "block_size": 32, "search_at": (0.25, 0.5)}
ALL_KEPT = SPARSE | {"density": 0.99}
TWO_CALLS = {"HunyuanVideo", "HunyuanVideo-1.5", "HunyuanVideo-1.5 I2V"}  # in named contexts


@torch.no_grad()
def latents(pipe, call, **more):
    generator = torch.Generator().manual_seed(0)
    fixed = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
    return pipe(**fixed | call | more).frames


def apart(latents, stock):
    """Largest difference, in units of the largest latent: CogVideoX's reach 40 on these weights."""
    return (latents - stock).abs().max() / stock.abs().max()


def build(name, batch=1, guided=True):
    make, call = PIPELINES[name]
    pipe = make()
    set_guidance(pipe, guided)
    return pipe, call(batch, guided)


def expected_branches(name, guided):
    if name == "Mochi" or "CogVideoX" in name:
        return {"cond_uncond"}
    names = ("call_0", "call_1")
    if name in TWO_CALLS:
        names = ("pred_cond", "pred_uncond") if "1.5" in name else ("cond", "uncond")
    return set(names if guided else names[:1])


@pytest.mark.parametrize("name, first", [("HunyuanVideo", False), ("CogVideoX", True)])
def test_text_is_where_the_model_has_it(name, first):
    pipe, call = build(name)
    handle = enable_sparse_attention(pipe, "window", **SPARSE)
    latents(pipe, call)
    grid = handle._installed[0].state.call.grid
    assert grid.text_first == first and grid.text_tokens > 0


def test_cogvideox_refuses_a_mask():
    pipe, _ = build("CogVideoX")
    enable_sparse_attention(pipe)
    attention = pipe.transformer.transformer_blocks[0].attn1
    with pytest.raises(ValueError, match="attends without a mask"):
        attention.processor(attention, *torch.zeros(2, 1, 1, 1), attention_mask=torch.ones(1, 2))


def test_the_cases_are_all_that_we_claim():
    families = ("HunyuanVideo", "HunyuanVideo-1.5", "CogVideoX", "Mochi")
    claimed = {pipeline for name in families for pipeline in supported_pipelines()[name]}
    assert {type(build(name)[0]).__name__ for name in PIPELINES} == claimed


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", PIPELINES)
def test_exact_then_sparse_then_undone(name, guided):
    pipe, call = build(name, guided=guided)
    stock = latents(pipe, call)
    handle = enable_sparse_attention(pipe, "adaspa", density=1.0, keep_padding=True)
    assert latents(pipe, call).equal(stock)
    report = handle.report()
    branches = expected_branches(name, guided)
    layers = len(handle._installed[0].layers)
    assert report.dense_calls == layers * len(branches) * STEPS and report.effective_cost == 1

    enable_sparse_attention(pipe, "adaspa", density=1.0)  # padded text dropped
    assert apart(latents(pipe, call), stock) < 1e-5
    handle = enable_sparse_attention(pipe, "adaspa", **ALL_KEPT)  # in block order, nothing left out
    assert apart(latents(pipe, call), stock) < 1e-5
    assert handle.report().reuse_calls == layers * len(branches)

    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    sparse = latents(pipe, call)
    assert latents(pipe, call).equal(sparse) and sparse.isfinite().all()
    assert apart(sparse, stock) > 1e-4
    report = handle.report()
    assert report.steps == STEPS and report.density < 0.9
    assert {entry["branch"] for entry in report.trace} == branches
    grid = handle._installed[0].state.call.grid
    assert (grid.frames, grid.height, grid.width) == (5 if "X 1.5" in name else 9, 5, 7)
    assert grid.conditioning_frames == ("I2V" in name)

    handle.disable()
    assert leftovers(pipe.transformer) == ([], set())
    assert latents(pipe, call).equal(stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_two_prompts(name):
    pipe, call = build(name, batch=2)
    stock = latents(pipe, call)
    enable_sparse_attention(pipe, "adaspa", **ALL_KEPT)
    assert apart(latents(pipe, call), stock) < 1e-5
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    sparse = latents(pipe, call)
    assert len(sparse) == 2 and sparse.isfinite().all()


@pytest.mark.parametrize("name", ["HunyuanVideo", "HunyuanVideo-1.5 I2V", "CogVideoX"])
def test_two_videos_per_prompt(name):
    """Where diffusers itself can: the others fail without us, or make one video all the same."""
    pipe, call = build(name)
    stock = latents(pipe, call, num_videos_per_prompt=2)
    enable_sparse_attention(pipe, "adaspa", **ALL_KEPT)
    assert apart(latents(pipe, call, num_videos_per_prompt=2), stock) < 1e-5
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    assert latents(pipe, call, num_videos_per_prompt=2).isfinite().all()


def test_fusing_through_the_pipeline_keeps_sparsity():
    pipe = cogvideox_pipeline("CogVideoXPipeline")
    call = cogvideox_call(1, True)
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    sparse = latents(pipe, call)
    pipe.fuse_qkv_projections()
    assert apart(latents(pipe, call), sparse) < 1e-5 and handle.report().density < 0.9
    pipe.unfuse_qkv_projections()
    assert latents(pipe, call).equal(sparse) and handle.report().density < 0.9
