"""Corrections kept in host memory: the same bits, whatever is slow, and copied one layer ahead."""

import random
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from test_wan import generate
from tiny import tiny_wan
from tiny_joint import PIPELINES

from dit_sparse import Auto, Rettention, enable_sparse_attention, host_cache, state
from dit_sparse.api import make_config
from dit_sparse.host_cache import HostCache
from dit_sparse.method_spec import parse_method
from dit_sparse.patterns.correct import Correction, measure_residual

OPTIONS = {"density": 0.4, "block_size": 32, "search_at": (0.2, 0.7)}
METHODS = [("auto", {}), ("auto", {"residual": "model"}), ("rettention", {"pool": 3})]
KEYS = [(branch, layer) for branch in ("cond", "uncond") for layer in range(4)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SLOW = [pytest.param(part, marks=pytest.mark.gpu) for part in ("copies", "model")]
LONG = 20_000_000  # cycles of a GPU, some 10 ms: far more than any copy here


@pytest.fixture
def apart(monkeypatch):
    """A CPU is treated as if its memory were not the host's."""
    monkeypatch.setattr(state, "is_apart", lambda device: True)


def some_correction(device, tokens=3000):
    return measure_residual(*torch.randn(2, 1, tokens, 2, 64, device=device), fp8=True)


def same(found: Correction, expected: Correction) -> bool:
    bits = lambda x: x.view(torch.uint8)  # noqa: E731
    pairs = zip(found.tensors(), expected.tensors(), strict=True)
    return found.pool == expected.pool and all(bits(a).equal(bits(b)) for a, b in pairs)


def slow_copies(monkeypatch):
    copy = HostCache._copy

    def late(self, sources, targets):
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(LONG)
        return copy(self, sources, targets)

    monkeypatch.setattr(HostCache, "_copy", late)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slow", [None, *SLOW])
@pytest.mark.parametrize("piece", [1 << 24, 1000])
def test_what_is_fetched_is_what_was_stored_last(monkeypatch, device, slow, piece):
    monkeypatch.setattr(host_cache, "PIECE", piece)
    if slow == "copies":
        slow_copies(monkeypatch)
    cache = HostCache(torch.device(device))
    for _ in range(2):  # the second time over what the first left behind
        expected, found = {}, []
        for key in KEYS:
            correction = some_correction(device)
            expected[key] = correction.map(torch.clone)
            told = cache.store(key, correction)
            assert told.nbytes() == correction.nbytes() and told.residual.is_meta
            del correction
            rubbish = [some_correction(device).map(torch.zero_) for _ in range(3)]
            del rubbish
        for _ in range(3):
            for key in KEYS:
                correction = cache.fetch(key)
                if slow == "model":  # copies must wait for the model
                    torch.cuda._sleep(LONG)
                found.append((key, correction.map(torch.clone)))
        assert all(same(correction, expected[key]) for key, correction in found)
    if device == "cuda":
        assert all(piece.is_pinned() for pieces in cache._host.values() for piece in pieces)
    cache.drop()
    assert not cache._shapes and not cache._host


@pytest.mark.parametrize("device", DEVICES)
def test_layers_that_are_skipped_repeated_or_of_another_size(device):
    cache, expected = HostCache(torch.device(device)), {}
    for key in KEYS:  # each branch its own text, so its own length
        correction = some_correction(device, 300 if key[0] == "cond" else 200)
        expected[key] = correction.map(torch.clone)
        cache.store(key, correction)
    for number in (0, 2, 2, 7, 6, 0, 1, 4, 5, 3):
        assert same(cache.fetch(KEYS[number]), expected[KEYS[number]])
    other = some_correction(device, 100)
    cache.store(KEYS[4], other)  # which had been copied ahead
    assert same(cache.fetch(KEYS[4]), other)
    assert same(cache.fetch(KEYS[5]), expected[KEYS[5]])


def test_in_order_each_is_copied_once_and_before_it_is_asked_for(monkeypatch):
    cache = HostCache(torch.device("cpu"))
    for key in KEYS:
        cache.store(key, some_correction("cpu", 10))
    copies, copy = [], HostCache._copy
    monkeypatch.setattr(HostCache, "_copy", lambda *a: copies.append(1) or copy(*a))
    for number, key in enumerate(KEYS * 3):
        cache.fetch(key)
        assert len(copies) == number + 2
        assert KEYS[(number + 1) % len(KEYS)] in [buffer.key for buffer in cache._buffers]


def test_what_does_not_lie_in_one_piece_is_stored_as_well():
    cache, correction = HostCache(torch.device("cpu")), some_correction("cpu", 10)
    cache.store(("cond", 0), correction.map(lambda x: x.mT.contiguous().mT if x.ndim > 1 else x))
    assert same(cache.fetch(("cond", 0)), correction)


@pytest.mark.gpu
def test_two_corrections_are_on_the_gpu_and_memory_is_pinned_once():
    cache, device = HostCache(torch.device("cuda")), "cuda"
    before, size = torch.cuda.memory_allocated(), some_correction(device).nbytes()
    for key in KEYS:
        cache.store(key, some_correction(device))
    pinned = {id(piece) for pieces in cache._host.values() for piece in pieces}
    for key in KEYS:
        cache.store(key, some_correction(device))
    for key in KEYS * 2:
        cache.fetch(key)
    assert pinned == {id(piece) for pieces in cache._host.values() for piece in pieces}
    assert 2 * size <= torch.cuda.memory_allocated() - before < 3 * size
    cache.drop()
    assert torch.cuda.memory_allocated() == before


def test_memory_that_cannot_be_pinned_is_refused(monkeypatch):
    cache = HostCache(torch.device("cpu"))
    cache.store(("cond", 0), some_correction("cpu"))

    def fail(*args, **options):
        raise RuntimeError("CUDA error: out of memory")

    other = some_correction("cpu", 3000)
    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(MemoryError, match="could not pin 0.4 MiB.*cache_device='model'"):
        cache.store(("cond", 1), other)


# ------------------------------------------------------------------ streams that run at any pace


class LazyStream:
    """Stands for a CUDA stream: work waits in a queue, and `step` runs its first piece."""

    def __init__(self):
        self.queue = []

    def run(self, work):
        self.queue.append(lambda: (work(), True)[1])

    def record_event(self):
        done = []
        self.run(lambda: done.append(True))
        return done

    def wait_event(self, done):
        self.queue.append(lambda: bool(done))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def step(self):
        if self.queue and self.queue[0]():
            self.queue.pop(0)


@pytest.fixture
def streams(monkeypatch):
    """The model's stream and that of copies; each tensor copy goes to the current one."""
    model, copies, current = LazyStream(), LazyStream(), []
    copy = torch.Tensor.copy_

    @contextmanager
    def enter(stream):
        current.append(stream)
        yield
        current.pop()

    def lazy_copy(target, source, non_blocking):
        current[-1].run(lambda: copy(target, source))

    def unpinned(self, correction):
        return [x.new_empty(len(x)) for x in host_cache._pieces(correction)]

    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: model)
    monkeypatch.setattr(torch.Tensor, "copy_", lazy_copy)
    monkeypatch.setattr(HostCache, "_pinned", unpinned)
    return model, copies


def wrong_fetches(streams, seed):
    """Two refreshes and three steps after each, streams running at random; what came out wrong."""
    model, copies = streams
    draw, wrong, cache = random.Random(seed), [], HostCache(torch.device("cpu"))
    cache.stream = copies
    pace = draw.choice([(1, 1), (50, 1), (1, 50)])

    def run_some(steps):
        for _ in range(steps):
            draw.choices(streams, pace)[0].step()

    def check(found, expected):
        if not (found == expected).all():
            wrong.append(expected)

    keys = KEYS[: draw.randint(1, 8)]
    for refresh in range(2):
        sent: list = []
        for number, key in enumerate(keys):
            residual, value = torch.empty(1, draw.choice([8, 8, 5]), 1, 4), refresh * 100 + number
            model.run(partial(residual.fill_, value))
            cache.store(key, Correction(residual))
            for left in sent:  # its memory is free for the model's next kernel
                model.run(partial(left.fill_, -1))
            sent = [residual]
            run_some(draw.randrange(10))
        for _ in range(3):
            in_order = draw.random() < 0.7
            for key in keys if in_order else draw.choices(keys, k=len(keys)):
                found = cache.fetch(key).residual
                model.run(partial(check, found, refresh * 100 + keys.index(key)))
                run_some(draw.randrange(10))
    while model.queue or copies.queue:
        run_some(1)
    return wrong


@pytest.mark.parametrize("seed", range(60))
def test_no_pace_of_copies_and_kernels_changes_what_is_fetched(streams, seed):
    assert not wrong_fetches(streams, seed)


@pytest.mark.parametrize("owner, name", [(HostCache, "_wait"), (LazyStream, "wait_stream")])
def test_a_wait_that_is_left_out_is_seen(monkeypatch, streams, owner, name):
    monkeypatch.setattr(owner, name, lambda *_: None)
    assert any(wrong_fetches(streams, seed) for seed in range(20))


# ----------------------------------------------------------------------------------- in a pipeline


def latents(pipe, device="cpu", **options):
    call = {"prompt": "a red ball", "num_frames": 9, "guidance_scale": 3.0}
    call |= {"height": 96, "width": 96, "max_sequence_length": 16}
    if "Hunyuan" in type(pipe).__name__:
        torch.manual_seed(1)
        call = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x
            for name, x in PIPELINES["HunyuanVideo"][1](1, True).items()
        }
    fixed = {"num_inference_steps": 8, "output_type": "latent"}
    return pipe(**call, **fixed, **options, generator=torch.Generator().manual_seed(0)).frames


def both(pipe, method, options, device="cpu"):
    """Latents and reports with corrections on the model's device and on the CPU."""
    for where in ("model", "cpu"):
        more = OPTIONS | options | {"cache_device": where}
        if method == "auto":
            more["dense_if_faster"] = False
        with enable_sparse_attention(pipe, method, **more) as handle:
            yield latents(pipe, device), handle.report(), handle._installed[0].state


@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("make", [tiny_wan, PIPELINES["HunyuanVideo"][0]])
def test_latents_and_reports_are_the_same(apart, method, options, make):
    (plain, report, _), (found, told, of) = both(make(), method, options)
    assert found.equal(plain)
    assert told.peak_cache_bytes == report.peak_cache_bytes > 0
    assert "corrections on the CPU" in str(told) and "CPU" not in str(report)
    (cache,) = of.hosts.values()
    assert not of.kept and not cache._shapes and not cache._host  # freed at the end


@pytest.mark.gpu
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("make", [tiny_wan, PIPELINES["HunyuanVideo"][0]])
def test_latents_are_the_same_on_a_gpu(monkeypatch, slow, method, options, make):
    if slow:
        slow_copies(monkeypatch)
    (plain, _, _), (found, _, of) = both(make().to("cuda"), method, options, "cuda")
    assert found.equal(plain) and len(of.hosts) == 1


def test_only_leading_layers_where_memory_is_short(apart):
    short = 2 * 2 * 8 + 2 * 108 * 2 * 24  # masks, and of two layers the residuals of one
    runs = both(tiny_wan(), "auto", {"max_cache_bytes": short})
    (plain, report, _), (found, told, _) = runs
    assert found.equal(plain) and told.peak_cache_bytes == report.peak_cache_bytes == short


def test_compiled_blocks(apart):
    pipe = tiny_wan()
    enable_sparse_attention(pipe, "auto", cache_device="cpu", **OPTIONS)
    plain = latents(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert latents(pipe).equal(plain)


def test_a_cpu_model_keeps_its_corrections_where_they_are():
    *_, (_, _, of) = both(tiny_wan(), "auto", {})
    assert of.hosts == {}


def test_a_run_that_fails_frees_it_and_the_next_is_right(apart):
    pipe = tiny_wan()
    handle = enable_sparse_attention(pipe, "auto", cache_device="cpu", **OPTIONS)
    expected, calls = generate(pipe, steps=8), iter(range(100))

    def fail(module, args):
        if next(calls) == 7:  # in the middle of a step that reuses
            raise ZeroDivisionError

    hook = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, steps=8)
    hook.remove()
    (cache,) = handle._installed[0].state.hosts.values()
    assert not cache._host
    assert generate(pipe, steps=8).equal(expected)
    fresh = tiny_wan()
    enable_sparse_attention(fresh, "auto", **OPTIONS)
    assert generate(pipe, size=128).equal(generate(fresh, size=128))
    assert generate(pipe, prompt=["a", "b"]).equal(generate(fresh, prompt=["a", "b"]))


def test_the_option_is_checked_and_may_be_typed():
    for method in (Auto, Rettention):
        with pytest.raises(ValueError, match="cache_device must be one of model, cpu, got 'cuda'"):
            method(cache_device="cuda")
    spec = parse_method("auto:cache_device=cpu,max_cache_bytes=none")
    assert make_config(spec.name, spec.options)[0] == Auto(cache_device="cpu", max_cache_bytes=None)
    with pytest.raises(TypeError, match="adaspa has no option 'cache_device'"):
        parse_method("adaspa:cache_device=cpu")
