"""What diffusers users do beside sparse attention, on a GPU: offload, streams, Inductor, two GPUs.

Tiny pipelines in bfloat16 through the Triton kernels, on heads of 64. Frames must be the bits of
the same pipeline without the feature, unless a test says why they cannot be.
"""

import gc
from functools import cache, partial

import composed
import pytest
import torch
from changed_weights import (
    add_lora,
    int8_by_bitsandbytes,
    int8_by_torchao,
    nf4_by_bitsandbytes,
    q8_0_by_gguf,
)
from composed import FAMILIES, arguments, compile_blocks, first_block, tile_vae
from composed import SPARSE as SPARSE_ON_CPU
from tiny import tiny_wan
from tiny_joint import PIPELINES, SIZE, hunyuan_pipeline
from torch._dynamo.testing import CompileCounterWithBackend

from dit_sparse import enable_sparse_attention

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
SPARSE = SPARSE_ON_CPU | {"block_size": 64, "engine": "triton"}
ORDERS = pytest.mark.parametrize("order", ["before", "after"])
MAKE = {
    "Wan": partial(tiny_wan, head_dim=64),
    "HunyuanVideo": partial(hunyuan_pipeline, "HunyuanVideoPipeline", head_dim=64),
    "CogVideoX": PIPELINES["CogVideoX"][0],
}
STEPS = 5


def over_families(feature, *families, **marks):
    return composed.over_families(feature, *(families or FAMILIES), **marks)


def make(family, dtype=torch.bfloat16):
    return MAKE[family]().to(DEVICE, dtype)


def placed(value, dtype):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(DEVICE, dtype if value.is_floating_point() else None)


def generate(pipe, family, guided=True, **call):
    """Frames, on the CPU."""
    dtype = pipe.vae.dtype  # quantised transformers tell another one
    given = {name: placed(value, dtype) for name, value in arguments(family, guided).items()}
    if family == "Wan":
        given |= {"num_frames": 33, **SIZE}
    given |= {"num_inference_steps": STEPS, "output_type": "latent"} | call
    return pipe(**given, generator=torch.Generator().manual_seed(0)).frames.cpu()


def ran_sparse(handle):
    report = handle.report()
    return report.reuse_calls > 0 and report.engines == [SPARSE["engine"]]


def sparse(family, change=None, order="after", guided=True, dtype=torch.bfloat16):
    """Frames and handle of a run with sparse attention, with a change before or after enabling."""
    pipe = make(family, dtype)
    if change is not None and order == "before":
        change(pipe)
    handle = enable_sparse_attention(pipe, **SPARSE)
    if change is not None and order == "after":
        change(pipe)
    frames = generate(pipe, family, guided)
    assert frames.isfinite().all()
    return frames, handle


@cache
def plain_sparse(family, guided=True, dtype=torch.bfloat16):
    frames, handle = sparse(family, guided=guided, dtype=dtype)
    assert ran_sparse(handle)
    return frames


@cache
def plain_dense(family, guided=True):
    return generate(make(family), family, guided)


def distance(frames, others):
    """Root mean square of the difference over that of the others."""
    frames, others = frames.double(), others.double()
    return ((frames - others).norm() / others.norm()).item()


def check_bits(family, change, order):
    plain = plain_sparse(family)
    frames, handle = sparse(family, change, order)
    assert ran_sparse(handle) and frames.equal(plain)


def group_offload(kind, use_stream):
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=DEVICE,
        offload_device=CPU,
        offload_type=kind,
        use_stream=use_stream,
        **groups,
    )


@ORDERS
@over_families("group offload, blocks")
def test_group_offload_of_blocks(family, order):
    check_bits(family, group_offload("block_level", False), order)


@ORDERS
@over_families("group offload, blocks, with a stream")
def test_group_offload_of_blocks_with_a_stream(family, order):
    check_bits(family, group_offload("block_level", True), order)


@ORDERS
@over_families("group offload, leaves")
def test_group_offload_of_leaves(family, order):
    check_bits(family, group_offload("leaf_level", False), order)


@ORDERS
@over_families("group offload, leaves, with a stream")
def test_group_offload_of_leaves_with_a_stream(family, order):
    check_bits(family, group_offload("leaf_level", True), order)


@ORDERS
@over_families("sequential CPU offload")
def test_sequential_cpu_offload(family, order):
    check_bits(family, lambda pipe: pipe.enable_sequential_cpu_offload(), order)


@ORDERS
@over_families("model CPU offload")
def test_model_cpu_offload(family, order):
    check_bits(family, lambda pipe: pipe.enable_model_cpu_offload(), order)


@over_families("VAE tiling")
def test_vae_tiling(family):
    """The decoder's bits, and sparse steps before it."""
    pipe = make(family)
    tile_vae(pipe, family)
    stock = generate(pipe, family, output_type="pt")
    enable_sparse_attention(pipe, density=1.0, keep_padding=True)
    assert generate(pipe, family, output_type="pt").equal(stock)
    handle = enable_sparse_attention(pipe, **SPARSE)
    assert generate(pipe, family, output_type="pt").isfinite().all() and ran_sparse(handle)
    assert generate(pipe, family).equal(plain_sparse(family))


def check_weights(family, change):
    """At density 1 the changed model's own bits. Sparse frames move with the weights as dense ones
    do; twice as far at most, for the masks follow them."""
    plain, plain_frames = plain_dense(family), plain_sparse(family)
    pipe = make(family)
    change(pipe)
    dense = generate(pipe, family)
    enable_sparse_attention(pipe, density=1.0, keep_padding=True)
    assert generate(pipe, family).equal(dense)
    handle = enable_sparse_attention(pipe, **SPARSE)
    frames = generate(pipe, family)
    assert ran_sparse(handle)
    moved = distance(dense, plain)
    assert moved > 0 and distance(frames, plain_frames) <= 2 * moved
    return frames


@over_families("layerwise casting to fp8")
def test_weights_in_fp8(family):
    def cast(pipe):
        pipe.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )

    check_weights(family, cast)


@over_families("torchao, int8 weights")
def test_int8_weights_by_torchao(family):
    check_weights(family, int8_by_torchao)


@over_families("GGUF, Q8_0 weights")
def test_q8_0_weights_by_gguf(family):
    check_weights(family, q8_0_by_gguf)


@over_families("bitsandbytes, int8 weights")
def test_int8_weights_by_bitsandbytes(family):
    check_weights(family, int8_by_bitsandbytes)


@over_families("bitsandbytes, nf4 weights")
def test_nf4_weights_by_bitsandbytes(family):
    check_weights(family, nf4_by_bitsandbytes)


@over_families("LoRA")
def test_lora_loaded_swapped_fused_and_unloaded_while_enabled(family):
    """Each state equals a pipeline that was put into it before sparse attention was enabled."""
    pytest.importorskip("peft")

    def load(*names, active=None, fuse=False):
        def change(pipe):
            for name in names:
                add_lora(pipe.transformer, name, seed=len(name))
            if active is not None:
                pipe.transformer.set_adapter(active)
            if fuse:
                pipe.transformer.fuse_lora()

        return change

    pipe = make(family)
    handle = enable_sparse_attention(pipe, **SPARSE)
    add_lora(pipe.transformer, "a", 1)
    loaded = generate(pipe, family)
    assert ran_sparse(handle) and not loaded.equal(plain_sparse(family))
    assert loaded.equal(sparse(family, load("a"), "before")[0])
    add_lora(pipe.transformer, "bb", 2)
    pipe.transformer.set_adapter("bb")
    swapped = generate(pipe, family)
    assert swapped.equal(sparse(family, load("a", "bb", active="bb"), "before")[0])
    assert not swapped.equal(loaded)
    pipe.transformer.unload_lora()
    assert generate(pipe, family).equal(plain_sparse(family))
    add_lora(pipe.transformer, "a", 1)
    pipe.transformer.fuse_lora()
    assert generate(pipe, family).equal(check_weights(family, load("a", fuse=True)))


@ORDERS
@over_families("FirstBlockCache")
def test_first_block_cache(family, order):
    """One that skips nothing changes nothing; one that skips all it can leaves the first layer."""
    check_bits(family, first_block(0.0), order)
    _, handle = sparse(family, first_block(1e9), order)
    trace = handle.report().trace
    assert ran_sparse(handle)
    assert {entry["step"] for entry in trace if entry["layer"] > 0} == {0}
    assert {entry["step"] for entry in trace if entry["layer"] == 0} == set(range(STEPS))


@over_families("DIT_SPARSE=0")
def test_the_environment_turns_it_off(family, monkeypatch):
    dense = plain_dense(family)
    monkeypatch.setenv("DIT_SPARSE", "0")
    pipe = make(family)
    handle = enable_sparse_attention(pipe, **SPARSE)
    assert generate(pipe, family).equal(dense)
    assert not handle.enabled and handle.report().trace == []


def run_and_fail(pipe, family):
    """A run, and one that ends after its fourth step. Bytes in use then."""
    generate(pipe, family)
    used = []

    def look(pipe, step, timestep, kwargs):
        used.append(in_use())
        if step == 3:
            raise InterruptedError
        return kwargs

    with pytest.raises(InterruptedError):
        generate(pipe, family, callback_on_step_end=look)
    return used[-1]


def in_use():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@over_families("memory freed by disable()")
def test_memory_comes_back(family):
    """To the byte, after a run and after one that failed."""
    pipe = make(family)
    with enable_sparse_attention(pipe, **SPARSE):
        run_and_fail(pipe, family)  # what kernels and libraries take once
    during_dense = run_and_fail(pipe, family)
    before = in_use()
    handle = enable_sparse_attention(pipe, **SPARSE)
    assert run_and_fail(pipe, family) > during_dense
    assert ran_sparse(handle) and handle.report().peak_cache_bytes > 0
    assert in_use() > before  # what the failed run kept
    handle.disable()
    del handle  # has the report
    assert in_use() == before


@over_families("memory freed after each run under model CPU offload")
def test_memory_comes_back_from_model_cpu_offload(family):
    pipe = make(family)
    handle = enable_sparse_attention(pipe, **SPARSE)
    pipe.enable_model_cpu_offload()
    generate(pipe, family)
    before = in_use()
    generate(pipe, family)
    assert ran_sparse(handle) and in_use() == before


def compile_whole(pipe, counter):
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)


def check_compiled(family, compile_pipe):
    """Graphs of two steps serve all; HunyuanVideo's time step is float32 at the first alone.
    Inductor rounds elsewhere than eager: its frames are no further from eager ones than twice what
    those are from float32."""
    eager = plain_sparse(family, guided=False)
    rounding = distance(eager, plain_sparse(family, guided=False, dtype=torch.float32))
    torch._dynamo.reset()
    counter, pipe = CompileCounterWithBackend("inductor"), make(family)
    handle = enable_sparse_attention(pipe, **SPARSE)
    compile_pipe(pipe, counter)
    generate(pipe, family, guided=False, num_inference_steps=2)
    graphs = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        frames = generate(pipe, family, guided=False)
    assert counter.frame_count == graphs > 0 and ran_sparse(handle)
    assert distance(frames, eager) <= 2 * rounding


@over_families("compile_repeated_blocks, Inductor")
def test_compiled_blocks(family):
    check_compiled(family, compile_blocks)


@over_families("torch.compile, Inductor")
def test_the_whole_transformer_compiled(family):
    check_compiled(family, compile_whole)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@over_families("two GPUs, prompts shared, a worker killed", "Wan")
def test_two_gpus_share_prompts_and_go_on_where_a_worker_was_killed(family, tmp_path):
    """No finished video is made again, and none is lost."""
    pytest.importorskip("psutil")
    pytest.importorskip("av")
    from test_processes import finished, kill_a_worker, launch

    prompts = [f"--prompt=a {color} circle" for color in ("red", "blue", "green", "white")]
    seeds = [f"--seed={seed}" for seed in range(8)]
    options = ["-o", tmp_path, "--steps", "10", *prompts, *seeds]
    before = kill_a_worker(
        launch("generate", *options, pipeline="wan_tiny", method="adaspa"), tmp_path
    )
    assert 0 < len(before) < 32

    process = launch("generate", *options, pipeline="wan_tiny", method="adaspa")
    process.communicate(timeout=120)
    assert process.returncode == 0
    after = finished(tmp_path)
    assert before.items() <= after.items() and len(after) == 32
