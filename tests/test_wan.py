"""Wan end to end on random weights: exactness, state, undo, compile."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from PIL import Image
from tiny import tiny_wan

from dit_sparse import disable_sparse_attention, enable_sparse_attention

SPARSE = {"density": 0.5, "block_size": 32}
ALL_KEPT = {"density": 0.99, "block_size": 32}  # sparse code path, nothing left out


def generate(pipe, seed=0, size=96, steps=6, guidance=3.0, prompt="a red ball", **call):
    return pipe(
        prompt=prompt,
        height=size,
        width=size,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **call,
    ).frames


@pytest.fixture
def pipe():
    return tiny_wan()


def leftovers(module):
    """Everything that a hook or a patch could have left on a module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [hook for m in module.modules() for kind in kinds for hook in getattr(m, kind).values()]
    names = {"cache_context", "_reset_stateful_cache", "forward", "_dit_sparse_handle"}
    names |= {"fuse_qkv_projections", "unfuse_qkv_projections"}
    return hooks, names & set(vars(module))


def test_density_one_equals_stock_bit_for_bit_through_our_processors(pipe):
    stock = generate(pipe)
    handle = enable_sparse_attention(pipe, "adaspa", density=1.0)
    assert generate(pipe).equal(stock)
    report = handle.report()
    layers = len(pipe.transformer.blocks)
    assert report.dense_calls == layers * 2 * 6 and report.effective_cost == 1


@torch.no_grad()
def test_a_float64_model_under_autocast_equals_stock(pipe):
    transformer = pipe.transformer.double()
    latents, text = torch.randn(1, 16, 3, 8, 8).double(), torch.randn(1, 16, 32).double()
    with torch.autocast("cpu", torch.bfloat16):
        stock = transformer(latents, torch.tensor([900.0]), text).sample
        enable_sparse_attention(transformer, density=1.0, num_steps=1)
        assert transformer(latents, torch.tensor([900.0]), text).sample.equal(stock)


@pytest.mark.parametrize("method", ["adaspa", "random", "window"])
@pytest.mark.parametrize("order", ["raster", "tile", "curve"])
def test_all_blocks_kept_equals_dense_within_rounding(pipe, method, order):
    stock = generate(pipe)
    handle = enable_sparse_attention(pipe, method, order=order, **ALL_KEPT)
    assert (generate(pipe) - stock).abs().max() < 1e-5
    assert handle.report().reuse_calls > 0


def test_disable_restores_everything(pipe):
    untouched = tiny_wan()
    generate(untouched)
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    generate(pipe)
    handle.disable()
    handle.disable()
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before
    assert leftovers(pipe.transformer) == ([], set())
    assert generate(pipe).equal(generate(untouched))


def test_same_seed_gives_the_same_frames(pipe):
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    first = generate(pipe)
    assert generate(pipe).equal(first)
    assert not generate(pipe, seed=1).equal(first)


def test_two_call_guidance_keeps_two_states(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    kept = {}
    state = handle._installed[0].state

    def look(pipe, step, timestep, kwargs):
        kept.update(state.kept)
        return kwargs

    generate(pipe, callback_on_step_end=look)
    assert {branch for branch, _ in kept} == {"cond", "uncond"}
    assert not kept["cond", 1].lse.equal(kept["uncond", 1].lse)


def test_without_guidance_there_is_one_branch(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    generate(pipe, guidance=1.0)
    assert {entry["branch"] for entry in handle.report().trace} == {"cond"}


def test_nothing_is_kept_after_a_run(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    generate(pipe)
    state = handle._installed[0].state
    assert not state.kept and handle.report().peak_cache_bytes > 0


def test_changes_of_size_and_batch_between_calls(pipe):
    fresh = tiny_wan()
    enable_sparse_attention(fresh, "adaspa", **SPARSE)
    expected = generate(fresh, size=128)
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    generate(pipe)
    generate(pipe, prompt=["a", "b"])
    assert generate(pipe, size=128).equal(expected)


def test_batch_gives_each_sample_what_it_gets_alone(pipe):
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    latents = torch.randn(2, 16, 3, 12, 12)
    both = generate(pipe, prompt=["a red ball", "a dog"], latents=latents)
    alone = generate(pipe, prompt="a dog", latents=latents[1:])
    assert (both[1] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("failing_call", [1, 2, 8])  # in either branch, at either kind of step
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_exception_inside_a_run_does_not_poison_the_next(pipe, error, failing_call):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    expected = generate(pipe)
    calls = iter(range(1, 100))

    def fail(module, args):
        if next(calls) == failing_call:
            raise error

    hook = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        generate(pipe)
    hook.remove()
    assert not handle._installed[0].state.kept
    assert generate(pipe).equal(expected)


def test_two_transformers_each_with_a_state_of_its_own():
    stock = tiny_wan()
    second = WanTransformer3DModel.from_config(stock.transformer.config).eval()
    pipe = WanPipeline(**stock.components | {"transformer_2": second}, boundary_ratio=0.875)
    pipe.set_progress_bar_config(disable=True)
    dense = generate(pipe)
    handle = enable_sparse_attention(pipe, "adaspa", density=1.0)
    assert generate(pipe).equal(dense) and handle.report().effective_cost == 1
    handle = enable_sparse_attention(pipe, "adaspa", **ALL_KEPT)
    assert (generate(pipe) - dense).abs().max() < 1e-5
    report = handle.report()
    late = min(record.step for record in handle._installed[1].state.trace)
    kinds = {entry["kind"] for entry in report.trace if entry["step"] == late}
    assert late > 0 and "search" in kinds
    assert report.steps == 6


def test_timesteps_per_token_follow_the_token_order():
    """Wan 2.2 TI2V-5B passes one timestep for each token."""
    transformer = tiny_wan().transformer
    latents, text = torch.randn(1, 16, 3, 12, 12), torch.randn(1, 16, 32)
    timestep = torch.linspace(1, 900, 108).unsqueeze(0)
    with torch.no_grad():
        stock = transformer(latents, timestep, text).sample
        enable_sparse_attention(transformer, "adaspa", num_steps=1, **ALL_KEPT)
        assert (transformer(latents, timestep, text).sample - stock).abs().max() < 1e-5


def test_a_bare_transformer_needs_the_number_of_steps():
    transformer = tiny_wan().transformer
    enable_sparse_attention(transformer, "adaspa", **SPARSE)
    with pytest.raises(RuntimeError, match="num_steps="), torch.no_grad():
        transformer(torch.randn(1, 16, 3, 12, 12), torch.tensor([5.0]), torch.randn(1, 16, 32))


@pytest.mark.parametrize("failing_call", [1, 2, 5])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@torch.no_grad()
def test_an_error_inside_a_bare_transformer_does_not_poison_the_next_run(error, failing_call):
    transformer = tiny_wan().transformer

    def loop(latents, texts):
        for time in (900.0, 600.0, 300.0):
            for text in texts:
                latents = latents - transformer(latents, torch.tensor([time]), text).sample
        return latents

    calls, failed = iter(range(100)), torch.randn(1, 16, 3, 8, 8)
    latents, texts = torch.randn_like(failed), torch.randn(2, 1, 16, 32)
    options = SPARSE | {"num_steps": 3, "search_at": 0.0}
    with enable_sparse_attention(transformer, **options):
        expected = loop(latents, texts)

    def fail(*args):
        if next(calls) == failing_call:
            raise error

    enable_sparse_attention(transformer, **options)
    hook = transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        loop(failed, texts.flip(0))
    hook.remove()
    assert loop(latents, texts).equal(expected)


@torch.no_grad()
def test_an_error_in_a_loop_of_ones_own_beside_a_pipeline_does_not_poison_the_next_run(pipe):
    handle = enable_sparse_attention(pipe, "adaspa-sampled", num_steps=3, search_at=0.0, **SPARSE)
    latents, text = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 32)

    def loop():
        pipe.scheduler.set_timesteps(3)
        for time in pipe.scheduler.timesteps:
            output = pipe.transformer(latents, time.expand(1), text).sample
            pipe.scheduler.step(output, time, latents)

    def fail(*args):
        raise ZeroDivisionError

    hook = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loop()
    hook.remove()
    loop()
    assert {entry["branch"] for entry in handle.report().trace} == {"call_0"}


@torch.no_grad()
def test_a_refused_call_of_a_bare_transformer_is_no_call_of_guidance():
    transformer = tiny_wan().transformer
    handle = enable_sparse_attention(transformer, "adaspa-sampled", num_steps=2, **SPARSE)
    latents, text = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 32)
    with pytest.raises(ValueError, match="not enough values"):
        transformer(latents[0], torch.tensor([900.0]), text)
    transformer(latents, torch.tensor([900.0]), text)
    assert {entry["branch"] for entry in handle.report().trace} == {"call_0"}


def test_steps_and_branches_without_cache_contexts(pipe):
    """Wan video-to-video calls the transformer outside of any context."""
    handle = enable_sparse_attention(pipe.transformer, "adaspa", num_steps=5, **SPARSE)
    latents, text = torch.randn(1, 16, 3, 12, 12), torch.randn(1, 16, 32)
    for _ in range(2):
        for time in torch.linspace(900, 100, 5):
            timestep = time.expand(1)
            for _branch in range(2):
                with torch.no_grad():
                    pipe.transformer(latents, timestep, text)
        report = handle.report()
        assert report.steps == 5
        assert {entry["branch"] for entry in report.trace} == {"call_0", "call_1"}
        assert report.dense_calls == 2 * 2  # one warm-up step


def test_video_to_video_runs_the_last_steps_of_a_schedule(pipe):
    wanted = WanVideoToVideoPipeline._get_signature_types()
    pipe = WanVideoToVideoPipeline(**{k: v for k, v in pipe.components.items() if k in wanted})
    pipe.set_progress_bar_config(disable=True)
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    pipe(
        video=[Image.new("RGB", (96, 96), (20 * i, 0, 0)) for i in range(9)],
        prompt_embeds=torch.randn(1, 16, 32),
        negative_prompt_embeds=torch.randn(1, 16, 32),
        height=96,
        width=96,
        num_inference_steps=8,
        strength=0.8,
        output_type="latent",
    )
    kinds = dict.fromkeys((entry["step"], entry["kind"]) for entry in handle.report().trace)
    names = ["dense", "search", "reuse", "reuse", "search", "reuse"]
    assert list(kinds) == list(enumerate(names))


def test_enabling_again_replaces(pipe):
    stock = generate(pipe)
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    second = enable_sparse_attention(pipe, "window", **SPARSE)
    generate(pipe)
    assert second.report().method == "window"
    disable_sparse_attention(pipe)
    disable_sparse_attention(pipe)
    assert leftovers(pipe.transformer) == ([], set()) and generate(pipe).equal(stock)


def test_a_second_pipeline_on_the_same_transformer_replaces_and_says_so(pipe, caplog):
    first = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    second = enable_sparse_attention(WanPipeline(**pipe.components), "window", **SPARSE)
    assert not first.enabled and second.enabled
    assert any("shared" in note for note in first.report().notes)
    assert any("shared" in message for message in caplog.messages)
    first.disable()
    assert second.enabled
    second.disable()
    assert leftovers(pipe.transformer) == ([], set())


def test_one_transformer_in_two_places_is_enabled_once(pipe):
    both = WanPipeline(
        **pipe.components | {"transformer_2": pipe.transformer}, boundary_ratio=0.875
    )
    both.set_progress_bar_config(disable=True)
    stock = generate(both)
    with enable_sparse_attention(both, "adaspa", density=1.0) as handle:
        assert generate(both).equal(stock)
    assert handle.report().effective_cost == 1
    assert leftovers(pipe.transformer) == ([], set()) and generate(both).equal(stock)


def test_a_failure_while_enabling_leaves_every_transformer_as_it_was(pipe):
    second = WanTransformer3DModel.from_config(pipe.transformer.config).eval()
    pipe = WanPipeline(**pipe.components | {"transformer_2": second}, boundary_ratio=0.875)
    before = [block.attn1.processor for t in (pipe.transformer, second) for block in t.blocks]
    norm_out = second.norm_out
    second.norm_out = None  # the last hook of the second transformer finds nothing to hang on
    with pytest.raises(AttributeError):
        enable_sparse_attention(pipe, "adaspa", **SPARSE)
    second.norm_out = norm_out
    after = [block.attn1.processor for t in (pipe.transformer, second) for block in t.blocks]
    assert after == before
    assert leftovers(pipe.transformer) == leftovers(second) == ([], set())


def test_an_enabled_transformer_cannot_be_copied(pipe):
    with enable_sparse_attention(pipe), pytest.raises(RuntimeError, match="disable it before"):
        copy.deepcopy(pipe.transformer)
    copy.deepcopy(pipe.transformer)


def test_two_pipelines_with_different_configs(pipe):
    other = tiny_wan(seed=1)
    alone = enable_sparse_attention(pipe, "adaspa", **SPARSE) and generate(pipe)
    enable_sparse_attention(other, "random", density=0.3, block_size=32)
    generate(other)
    assert generate(pipe).equal(alone)


def test_context_manager_disables_after_an_error(pipe):
    stock = generate(pipe)
    with pytest.raises(ZeroDivisionError), enable_sparse_attention(pipe, "adaspa", **SPARSE):
        raise ZeroDivisionError
    assert generate(pipe).equal(stock)


def test_compiles_to_one_graph_per_block_kind():
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe = tiny_wan()
    pipe.transformer = WanTransformer3DModel.from_config(
        dict(pipe.transformer.config, num_layers=12)
    ).eval()
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    eager = generate(pipe)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert generate(pipe).equal(eager)
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["blocks", "in place", "wrapped"])
def test_compiled_first_is_refused(pipe, how):
    transformer = pipe.transformer
    if how == "blocks":
        transformer.compile_repeated_blocks(backend="eager")
    elif how == "in place":
        transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(transformer, backend="eager")
    with pytest.raises(RuntimeError, match="enable first, compile second"):
        enable_sparse_attention(pipe)
    assert leftovers(transformer) == ([], set())


def test_enabled_first_and_wrapped_by_compile_second_runs_and_can_be_undone(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    eager = generate(pipe)
    transformer = pipe.transformer
    pipe.transformer = torch.compile(transformer, backend="eager")
    assert (generate(pipe) - eager).abs().max() < 1e-5
    assert handle.report().reuse_calls > 0
    disable_sparse_attention(pipe)
    assert leftovers(transformer) == ([], set())


def test_fused_projections(pipe):
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    plain = generate(pipe)
    pipe.transformer.fuse_qkv_projections()
    assert (generate(pipe) - plain).abs().max() < 1e-5


def test_replaced_processors_are_reported(pipe, caplog):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    pipe.transformer.set_attn_processor(type(pipe.transformer.blocks[0].attn2.processor)())
    generate(pipe)
    assert any("replaced" in note for note in handle.report().notes)
    assert any("replaced" in message for message in caplog.messages)


def test_a_transformer_that_never_ran_is_reported(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    ours, pipe.transformer = pipe.transformer, tiny_wan().transformer
    generate(pipe)
    assert "has not run" in str(handle.report()) and "0.0%" not in str(handle.report())
    pipe.transformer = ours
    generate(pipe)
    assert not any("has not run" in note for note in handle.report().notes)


def test_layers_with_a_replaced_processor_count_as_dense(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    generate(pipe)
    cost = handle.report().effective_cost
    for layer, block in enumerate(pipe.transformer.blocks, 1):
        block.attn1.set_processor(WanAttnProcessor())
        generate(pipe)
        dense = layer / len(pipe.transformer.blocks)
        assert handle.report().effective_cost == pytest.approx(dense + (1 - dense) * cost)


class OwnProcessor(WanAttnProcessor):
    pass


def test_processors_of_the_user_are_put_aside_and_come_back(pipe):
    own = OwnProcessor()
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(own)
    with enable_sparse_attention(pipe, "adaspa", **SPARSE) as handle:
        assert any("OwnProcessor" in note for note in handle.report().notes)
    assert all(block.attn1.processor is own for block in pipe.transformer.blocks)


def test_the_users_backend_runs_the_dense_steps(pipe):
    pipe.transformer.set_attention_backend("_native_math")
    stock = generate(pipe)
    enable_sparse_attention(pipe, "adaspa", density=1.0)
    assert generate(pipe).equal(stock)
    pipe.transformer.reset_attention_backend()


def test_handle_and_pipeline_can_be_collected():
    pipe = tiny_wan()
    transformer = weakref.ref(pipe.transformer)
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    generate(pipe)
    del pipe
    gc.collect()
    assert transformer() is None


def test_measured_cost_and_mass(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", measure=True, **SPARSE)
    generate(pipe)
    report = handle.report()
    density = report.density
    assert 0.4 < density < 0.7 and 0 < report.kept_mass < 1
    # 25 tokens short of a block make densities uneven: sum the log by hand
    by_hand = [1.0 if e["density"] is None else sum(e["density"]) / 2 for e in report.trace]
    searches = [e for e in report.trace if e["kind"] == "search"]
    sampled = [e for e in report.trace if e["density"] is not None]
    rows = 64 / 108 * 0.5
    total = sum(by_hand) + 0.5 * len(searches) + rows * len(sampled)
    assert report.effective_cost == pytest.approx(total / len(report.trace))
    assert "effective cost" in str(report)
    assert report.engines == ["torch"]
    assert all((e["density"] is None) == (e["step"] <= 1) for e in report.trace)


def test_8_bits_are_told_and_near_full_precision(pipe):
    frames = {}
    for precision in ("full", "int8", "fp8"):
        with enable_sparse_attention(pipe, "adaspa", precision=precision, **SPARSE) as handle:
            frames[precision] = generate(pipe)
            assert handle.report().engines == [
                "torch" if precision == "full" else f"torch {precision}"
            ]
    off = {name: (frames["full"] - x).abs().mean() for name, x in frames.items()}
    assert 0 < off["int8"] < off["fp8"] < 0.05


def test_a_run_that_skips_a_transformer_does_not_report_its_last_run():
    stock = tiny_wan()
    second = WanTransformer3DModel.from_config(stock.transformer.config).eval()
    pipe = WanPipeline(**stock.components | {"transformer_2": second}, boundary_ratio=0.875)
    pipe.set_progress_bar_config(disable=True)
    handle = enable_sparse_attention(pipe, "adaspa", **ALL_KEPT)
    generate(pipe)
    both, second_trace = handle.report(), handle._installed[1].state.trace
    assert second_trace and both.steps == 6
    pipe.register_to_config(boundary_ratio=0.0)  # the first expert does it all
    generate(pipe)
    assert not handle._installed[1].state.trace
    assert handle.report().steps == 6 and len(handle.report().trace) == len(both.trace)


def test_a_run_that_failed_between_two_calls_is_not_in_the_report_of_the_next():
    stock = tiny_wan()
    second = WanTransformer3DModel.from_config(stock.transformer.config).eval()
    pipe = WanPipeline(**stock.components | {"transformer_2": second}, boundary_ratio=0.875)
    pipe.set_progress_bar_config(disable=True)
    handle = enable_sparse_attention(pipe, "adaspa", **ALL_KEPT)

    def fail(pipe, step, timestep, kwargs):  # where diffusers tells no transformer
        if step == 5:
            raise ZeroDivisionError
        return kwargs

    with pytest.raises(ZeroDivisionError):
        generate(pipe, callback_on_step_end=fail)
    assert handle._installed[1].state.trace
    pipe.register_to_config(boundary_ratio=0.0)
    generate(pipe)
    report = handle.report()
    assert not handle._installed[1].state.trace and len(report.trace) == 6 * 2 * 2


@pytest.mark.parametrize("between_calls", [False, True])
def test_another_pipeline_on_the_transformer_after_a_run_that_failed(pipe, between_calls):
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    expected = video_to_video(tiny_video_to_video(), SPARSE)

    def fail(*args):
        raise ZeroDivisionError

    hook = None if between_calls else pipe.transformer.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, callback_on_step_end=fail if between_calls else None)
    if hook is not None:
        hook.remove()
    with pytest.raises(RuntimeError, match="enable it on the pipeline that you call"):
        video_to_video(other)
    assert video_to_video(other, SPARSE).equal(expected)


@pytest.mark.parametrize("is_kept", [True, False])
def test_another_pipeline_on_the_transformer_of_one_that_never_ran(pipe, is_kept):
    first = WanPipeline(**pipe.components)
    enable_sparse_attention(first, "adaspa", **SPARSE)
    other = WanVideoToVideoPipeline.from_pipe(first)
    other.set_progress_bar_config(disable=True)
    if not is_kept:
        del first
    with pytest.raises(RuntimeError, match="enable it on the pipeline that you call"):
        video_to_video(other)


def tiny_video_to_video():
    pipe = WanVideoToVideoPipeline.from_pipe(tiny_wan())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video_to_video(pipe, options=None):
    if options is not None:
        enable_sparse_attention(pipe, "adaspa", **options)
    text = torch.ones(1, 16, 32)
    return pipe(
        video=[Image.new("RGB", (96, 96), (20 * i, 0, 0)) for i in range(9)],
        prompt_embeds=text,
        negative_prompt_embeds=-text,
        height=96,
        width=96,
        num_inference_steps=8,
        strength=0.8,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


def test_a_backend_set_while_enabled_stays_when_disabled(pipe):
    with enable_sparse_attention(pipe, "adaspa", **SPARSE):
        pipe.transformer.set_attention_backend("_native_math")
    backends = {b.attn1.processor._attention_backend.value for b in pipe.transformer.blocks}
    pipe.transformer.reset_attention_backend()
    assert backends == {"_native_math"}


def test_a_run_that_costs_more_than_dense_says_so(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", density=0.9, search_at=(0.0, 0.5))
    generate(pipe)
    report = handle.report()
    assert report.effective_cost >= 1
    assert any("times that of dense" in note for note in report.notes)


@pytest.mark.parametrize(("steps", "told"), [(1, True), (3, True), (6, False)])
def test_a_run_that_will_cost_more_than_dense_is_told_at_its_first_step(pipe, caplog, steps, told):
    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    first = []

    def look(pipe, step, timestep, kwargs):
        first.append("times that of dense" in caplog.text)
        return kwargs

    generate(pipe, steps=steps, callback_on_step_end=look)
    assert first[0] == told
    assert (handle.report().effective_cost >= 1) == told
    assert caplog.text.count("times that of dense") == told


def test_a_size_that_changes_in_a_run_is_in_its_report(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()

    def grow(pipe, step, timestep, kwargs):
        latents = kwargs["latents"]
        return {"latents": torch.cat([latents, latents], dim=-1) if step == 2 else latents}

    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    generate(pipe, callback_on_step_end=grow)
    report = handle.report()
    assert report.steps == 3 and "changed before step 3 (from 0)" in report.notes[0]
    generate(pipe)
    assert handle.report().steps == 6 and not handle.report().notes  # a run of another size


def test_runs_that_are_dense_on_purpose_are_not_called_costly(pipe, caplog):
    handle = enable_sparse_attention(pipe, "adaspa", density=1.0)
    generate(pipe, steps=2)
    assert handle.report().effective_cost == 1 and not handle.report().notes
    assert "times that of dense" not in caplog.text


def test_the_mass_of_an_old_log_sum_exp_is_not_reported(pipe):
    handle = enable_sparse_attention(pipe, "adaspa", density=0.3, search_at=(0.0, 0.5))
    generate(pipe)
    searches = [entry for entry in handle.report().trace if entry["kind"] == "search"]
    first, second = (
        [entry["kept_mass"] for entry in searches if (entry["step"] == 0) is early]
        for early in (True, False)
    )
    assert all(first) and second and not any(second)
