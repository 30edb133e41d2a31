"""Guidance branches that use one mask, or one mask and one residual."""

import pytest
import torch
from composed import arguments, make
from test_wan import generate
from tiny import tiny_wan
from tiny_ltx_video import ltx_call, ltx_pipeline

from dit_sparse import Auto, enable_sparse_attention
from dit_sparse.block_mask import BlockMask
from dit_sparse.grid import VideoGrid
from dit_sparse.state import Call, Kept, State

OPTIONS = {"density": 0.5, "block_size": 32, "search_at": (0.3, 0.8)}  # of 6 steps: 2, 5


def run(**options):
    pipe = tiny_wan()
    handle = enable_sparse_attention(pipe, "auto", **OPTIONS, **options)
    kept = {}
    pipe.transformer.register_forward_hook(lambda *a: kept.update(handle._installed[0].state.kept))
    latents = generate(pipe)
    assert latents.isfinite().all()
    return handle.report(), kept


@pytest.mark.parametrize("residual", ["fp8", None])
def test_the_second_branch_uses_what_the_first_found(residual):
    (own, _), (shared, kept) = (run(residual=residual, share_guidance=of) for of in (None, "all"))
    assert {branch for branch, _ in kept} == {"cond"}
    assert shared.peak_cache_bytes == own.peak_cache_bytes / 2 == shared.planned_cache_bytes
    searched = [entry for entry in shared.trace if entry["kind"] == "search"]
    assert {entry["branch"] for entry in searched} == {"cond"} and searched[0]["step"] == 2
    second = [e for e in shared.trace if e["branch"] == "uncond" and e["step"] in (2, 5)]
    assert second and all(entry["kind"] == "reuse" and entry["density"] for entry in second)
    assert shared.search_calls == own.search_calls / 2
    assert shared.effective_cost < own.effective_cost


@pytest.mark.parametrize("residual", ["fp8", None])
def test_a_mask_alone_is_shared_and_each_keeps_its_own_residual(residual):
    own, _ = run(residual=residual, share_guidance=None)
    shared, kept = run(residual=residual)
    assert {branch for branch, _ in kept} == {"cond", "uncond"}
    for layer in {layer for _, layer in kept}:
        one, other = kept["cond", layer], kept["uncond", layer]
        assert one.mask is other.mask and one.found_at == other.found_at == 5
        assert residual is None or one.correction is not other.correction
    assert shared.search_calls == own.search_calls
    assert shared.effective_cost < own.effective_cost


@pytest.mark.parametrize("value", [True, "residual", 1])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match='share_guidance must be "mask", "all" or None'):
        Auto(share_guidance=value)


def call(branch, frames=2, lengths=None, step=3):
    grid = VideoGrid(frames, 8, 8)
    return Call(grid, step, 10, branch, torch.device("cpu"), torch.float32, lengths)


@pytest.mark.parametrize("other", [call("uncond", frames=3), call("uncond", lengths=(100,))])
def test_branches_of_another_shape_keep_their_own(other):
    for second, place, owners in ((call("uncond"), "cond", 1), (other, "uncond", 2)):
        state = State(shares="all")
        state.begin(call("cond"))
        state.begin(second)
        assert state.place(4) == (place, 4) and state.owners() == owners


def test_a_mask_of_another_step_shape_or_batch_is_not_used():
    mask = BlockMask.from_dense(torch.ones(2, 1, 2, 2) > 0, 128, 128, (64, 64))
    for second, found_at, batch, found in (
        (call("uncond"), 3, 2, True),
        (call("uncond"), 2, 2, False),
        (call("uncond"), 3, 4, False),
        (call("uncond", frames=3), 3, 2, False),
    ):
        state = State(shares="mask")
        state.begin(call("cond"))
        state.keep(0, Kept(mask, None, None, found_at))
        assert state.mask_of_other_branch(0, 2) is None  # it is the first
        state.begin(second)
        assert (state.mask_of_other_branch(0, batch) is mask) == found


def test_whoever_comes_first_in_a_step_searches():
    """A cache may have skipped the first branch."""
    state, mask = (
        State(shares="all"),
        BlockMask.from_dense(torch.ones(1, 1, 2, 2) > 0, 128, 128, (64, 64)),
    )
    for step, branch in ((0, "cond"), (0, "uncond"), (5, "uncond")):
        state.begin(call(branch, step=step))
    state.keep(0, Kept(mask, None, None, 5))
    assert state.kept["cond", 0].found_at == 5


def test_hunyuan_video_with_two_prompts_of_different_length_runs():
    pipe = make("HunyuanVideo")
    enable_sparse_attention(pipe, "auto", density=0.5, block_size=32, share_guidance="all")
    given = arguments("HunyuanVideo", guided=True)
    frames = pipe(**given, num_inference_steps=6, output_type="latent").frames
    assert frames.isfinite().all()


def joint(share, guided=True, **call):
    pipe = make("CogVideoX")
    handle = enable_sparse_attention(pipe, "auto", **OPTIONS, share_guidance=share)
    given = arguments("CogVideoX", guided=guided) | {"num_inference_steps": 6} | call
    frames = pipe(**given, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    assert frames.isfinite().all()
    return frames, handle.report()


def test_a_batch_of_both_branches_is_taken_in_two_parts():
    _, own = joint(None)
    _, shared = joint("all")
    assert {entry["branch"] for entry in own.trace} == {"cond_uncond"}
    assert {entry["branch"] for entry in shared.trace} == {"cond", "uncond"}
    searched = [entry for entry in shared.trace if entry["kind"] == "search"]
    assert {entry["branch"] for entry in searched} == {"cond"}
    assert shared.peak_cache_bytes == own.peak_cache_bytes / 2 == shared.planned_cache_bytes
    assert shared.effective_cost < own.effective_cost


@pytest.mark.parametrize(("density", "told"), [(0.3, False), (0.95, True)])
def test_the_cost_of_a_batch_of_both_branches_is_told_of_both_and_once(density, told, caplog):
    pipe = make("CogVideoX")
    handle = enable_sparse_attention(pipe, density=density, block_size=32, target="speed")
    pipe(**arguments("CogVideoX") | {"num_inference_steps": 3, "output_type": "latent"})
    assert (handle.report().effective_cost >= 1) == told
    assert caplog.text.count("times that of dense") == told


@pytest.mark.parametrize(
    ("density", "guidance", "told"),
    [(0.5, 3.0, False), (0.95, 3.0, True), (0.5, 1.0, True)],
)
def test_the_cost_of_two_calls_a_step_is_told_of_both_and_once(density, guidance, told, caplog):
    """Of 3 steps at density 0.5 the prompt costs 1.28 times dense, the negative prompt 0.53."""
    options = {"density": density, "search_at": (0.0, 0.5), "share_guidance": "all"}
    pipe = tiny_wan()
    handle = enable_sparse_attention(pipe, block_size=32, **options)
    generate(pipe, steps=3, guidance=guidance)
    assert (handle.report().effective_cost >= 1) == told
    assert caplog.text.count("times that of dense") == told


def test_in_a_batch_of_both_branches_the_mask_is_that_of_the_prompt():
    _, own = joint(None)
    _, shared = joint("mask")
    assert {entry["branch"] for entry in shared.trace} == {"cond_uncond"}
    assert shared.peak_cache_bytes < own.peak_cache_bytes  # one mask for both samples
    assert shared.effective_cost < own.effective_cost


def test_masks_of_a_larger_guided_batch_stand_for_both_halves():
    masks = torch.rand(2, 1, 2, 2) > 0.5
    twice = BlockMask.from_dense(masks, 128, 128, (64, 64)).twice()
    assert twice.to_dense().equal(torch.cat([masks, masks]))


def test_without_guidance_a_batch_stays_whole():
    plain, _ = joint(None, guided=False)
    frames, report = joint("all", guided=False)
    assert frames.equal(plain) and {entry["branch"] for entry in report.trace} == {"cond_uncond"}


def test_a_scale_that_changes_on_the_way_changes_nothing():
    _, report = joint("all", use_dynamic_cfg=True)
    assert {entry["branch"] for entry in report.trace} == {"cond", "uncond"}


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("share", ["mask", "all"])
def test_guidance_that_is_turned_off_on_the_way_leaves_the_prompts_alone(share, prompts):
    def turn_off(pipe, step, timestep, given):
        if step == 2:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[1]
        return given

    pipe, given = ltx_pipeline("LTXPipeline"), ltx_call(prompts, True)
    for prefix in ("", "negative_"):
        given[f"{prefix}prompt_attention_mask"].fill_(1)
    handle = enable_sparse_attention(pipe, "auto", **OPTIONS, share_guidance=share)
    given |= {"num_inference_steps": 6, "output_type": "latent"}
    watched = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    assert pipe(**given, callback_on_step_end=turn_off, **watched).frames.isfinite().all()
    report = handle.report()
    calls = {(entry["branch"], entry["step"] > 2) for entry in report.trace}
    before = {"cond", "uncond"} if share == "all" else {"cond_uncond"}
    assert calls == {*((branch, False) for branch in before), ("cond_uncond", True)}
    parts = 3 * len(before) + 3
    assert handle._installed[0].state.parts_in_all == parts == len(report.trace) / 2  # layers


def test_a_run_that_failed_says_nothing_of_the_guidance_of_the_next():
    def fail(pipe, step, timestep, given):
        raise InterruptedError

    def two_prompts(pipe):
        given = ltx_call(2, False) | {"num_inference_steps": 6, "output_type": "latent"}
        return pipe(**given, generator=torch.Generator().manual_seed(0)).frames

    frames = []
    for share in (None, "all"):
        pipe = ltx_pipeline("LTXPipeline")
        handle = enable_sparse_attention(pipe, "auto", **OPTIONS, share_guidance=share)
        with pytest.raises(InterruptedError):
            pipe(**ltx_call(1, True), num_inference_steps=6, callback_on_step_end=fail)
        torch.manual_seed(1)
        frames.append(two_prompts(pipe))
        assert {entry["branch"] for entry in handle.report().trace} == {"cond_uncond"}
    assert frames[0].equal(frames[1])
