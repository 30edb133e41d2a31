"""How long does one denoising step of a full-size model take, and what does sparsity save of 50?

    python benchmarks/step.py --model wan-1.3b-480p --out benchmarks/results/step_wan_1.3b.json
    python benchmarks/step.py --model hunyuanvideo-720p --layers 2 2 --modes eager --out x.json
    python benchmarks/step.py --model wan-1.3b-480p --tiny --compile-backend eager --out x.json

One forward of each kind: dense (the stock model under the fastest dense attention of this machine,
text without padding), and with sparse attention enabled its dense warm-up, the first search (whose
output is dense but with `--method adaspa-sampled`), the first reuse of that mask, later reuses, and
a later search. 50-step schedules are composed from them; `--whole` runs one to check the sum. Text
encoder and VAE are left out: they are the same on both sides.

What would mislead: weights and inputs are random, so the search is run for its time alone and the
mask is a given one: random blocks (the worst for the cache), the nearest in space and time, or
recorded ones (`--masks FILE`, an .npz whose `bits` (layers, H, N, ceil(N / 8)) uint8 are those of
`BlockMask`). So time is told as a function of the effective attention cost; which cost keeps the
quality is not the question here. Where fewer layers are built than the model has, the time inside
each list of blocks is multiplied up, and so are weights and masks in `peak_bytes`; `measured_*` is
what was seen. Times are CUDA events around regions (regions.py). Inside the compiled blocks of the
dense side there are none: `attention_s` there is that of the eager row, the same kernel.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from diffusers.models import attention_dispatch  # noqa: E402
from environment import environment  # noqa: E402
from full_size import MODELS, UnmaskedHunyuanVideo, build, tiny  # noqa: E402
from regions import Clock, Times, time_blocks, time_functions, time_hooks_added  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import dit_sparse.step  # noqa: E402
from dit_sparse import BlockMask, enable_sparse_attention  # noqa: E402
from dit_sparse.config import CACHE_DEVICES, SparseConfig  # noqa: E402
from dit_sparse.host_cache import HostCache  # noqa: E402
from dit_sparse.patterns import METHODS, adaspa, adaspa_sampled, auto  # noqa: E402
from dit_sparse.patterns.score import nearness  # noqa: E402
from dit_sparse.patterns.search import Found, Search  # noqa: E402
from dit_sparse.patterns.select import blocks_of, forced_blocks, top_k_rows  # noqa: E402
from dit_sparse.pipelines.family import family_of  # noqa: E402
from dit_sparse.schedule import step_kind  # noqa: E402

STEPS = 50
SEARCH_AT = (0.2, 0.6)  # steps 10 and 30 are those that are timed
SCHEDULES = (SEARCH_AT, (0.1, 0.5), (0.1, 0.4, 0.7), (0.0, 0.5), (0.0,))
WARM_UP, SEARCH, FIRST_REUSE, REUSE, SEARCH_AGAIN = 0, 10, 11, 12, 30  # steps
KIND_AT = {WARM_UP: "warm-up", SEARCH: "search", FIRST_REUSE: "first reuse", REUSE: "reuse"}
KIND_AT |= {SEARCH_AGAIN: "search again"}
REGIONS = ("attention", "search", "selection", "reorder", "rest")
SDPA = {"_native_cudnn": SDPBackend.CUDNN_ATTENTION, "_native_flash": SDPBackend.FLASH_ATTENTION}
SDPA["_native_math"] = SDPBackend.MATH
FA4 = "flash_4_hub"  # diffusers' name; it would load the kernel from the Hub


# --- dense attention -----------------------------------------------------------------------------


def candidates(device: torch.device) -> list[str]:
    """Names of diffusers' backends that may be the fastest here."""
    if device.type != "cuda":
        return ["native", "_native_math"]
    return ["native", "_native_cudnn", "_native_flash", *([FA4] if install_fa4() else [])]


def install_fa4() -> bool:
    """Let diffusers' dispatch find the installed flash-attn-4 instead of the Hub's."""
    if FA4 not in [backend.value for backend in attention_dispatch.AttentionBackendName]:
        return False  # diffusers is too old
    try:
        from flash_attn.cute.interface import flash_attn_func
    except ImportError:
        return False

    @torch.library.custom_op("dit_sparse_benchmark::fa4", mutates_args=())
    def fa4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = flash_attn_func(query, key, value)
        return output[0] if isinstance(output, tuple) else output

    @fa4.register_fake
    def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    def kernel(q, k, v, softmax_scale=None, causal=False):
        return fa4(q, k, v)

    name = attention_dispatch.AttentionBackendName(FA4)
    attention_dispatch._HUB_KERNELS_REGISTRY[name].kernel_fn = kernel
    return True


@contextmanager
def dense_backend(transformer: Any, name: str) -> Iterator[None]:
    """Run a transformer's dense attention under one of diffusers' backends.

    CogVideoX knows none and calls torch's attention, which is steered or replaced instead.
    """
    processors = [m.processor for m in transformer.modules() if hasattr(m, "processor")]
    processors = [p for p in processors if hasattr(p, "_attention_backend")]
    with ExitStack() as undo:
        for processor in processors:
            processor._attention_backend = attention_dispatch.AttentionBackendName(name)
            undo.callback(setattr, processor, "_attention_backend", None)
        if not processors and name in SDPA:
            undo.enter_context(sdpa_kernel(SDPA[name]))
        if not processors and name == FA4:
            undo.callback(
                setattr, F, "scaled_dot_product_attention", F.scaled_dot_product_attention
            )
            F.scaled_dot_product_attention = torch_call_of_fa4  # type: ignore[assignment]
        yield


def torch_call_of_fa4(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = attention_dispatch.dispatch_attention_fn(
        query, key, value, attn_mask, dropout_p, is_causal, backend=FA4
    )
    return output.transpose(1, 2)


def self_attention_alone(clock: Clock, function: Any) -> Any:
    """`function` in the region "attention" where it attends to its own tokens, not to a text."""
    timed = clock.wrap(function, "attention")

    def attend(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        own = query.shape == key.shape
        return (timed if own else function)(query, key, *args, **kwargs)

    return attend


@contextmanager
def time_dense_attention(transformer: Any, clock: Clock) -> Iterator[None]:
    """Not where blocks are compiled: their graph would hold the clock."""
    module: Any = import_module(type(transformer).__module__)
    owner, name = F, "scaled_dot_product_attention"
    if hasattr(module, "dispatch_attention_fn"):
        owner, name = module, "dispatch_attention_fn"
    original = getattr(owner, name)
    setattr(owner, name, self_attention_alone(clock, original))
    try:
        yield
    finally:
        setattr(owner, name, original)


# --- masks that are given ------------------------------------------------------------------------


class Masks:
    """Block masks (1, H, N, N) bool, the same in every layer but for the order of the heads.

    Args:
        source: "random", "near", or an .npz file, whose masks have the density that they have.
    """

    def __init__(self, source: str, clock: Clock):
        self.source, self.clock = source, clock
        self.made: dict[tuple, torch.Tensor] = {}

    def of(self, search: Search, config: SparseConfig) -> torch.Tensor:
        heads, device = search.heads, search.query.device
        blocks = search.grid.num_blocks(config.block_size)
        if self.source not in ("random", "near"):
            return self._recorded(search.layer, heads, blocks)[:, search.own_heads].to(device)
        place = config.density, config.block_size, search.grid
        if place not in self.made:
            self.made.clear()
            self.made[place] = self._make(search, config, heads, blocks, device)
        return self.made[place].roll(search.layer, dims=1)[:, search.own_heads]

    def _make(self, search, config, heads, blocks, device) -> torch.Tensor:
        forced = forced_blocks(search.grid, config.block_size, device, config.own_block)
        kept = blocks_of(torch.full((1, heads), config.density, device=device), blocks)
        if self.source == "near":
            scores = nearness(search.grid, config.order, config.block_size).to(device)
            return top_k_rows(scores.repeat(1, heads, 1, 1), kept, forced)
        generator = torch.Generator(device).manual_seed(0)
        scores = torch.rand(1, heads, blocks, blocks, device=device, generator=generator)
        return top_k_rows(scores, kept, forced)

    def _recorded(self, layer: int, heads: int, blocks: int) -> torch.Tensor:
        recorded = np.load(self.source)["bits"]
        mask = np.unpackbits(recorded[layer % len(recorded)], axis=-1, bitorder="little")
        mask = torch.from_numpy(mask[None, ..., :blocks].astype(bool))
        if tuple(mask.shape) != (1, heads, blocks, blocks):
            sys.exit(f"{self.source} holds masks {tuple(mask.shape)}, not {heads} x {blocks}^2")
        return mask


def with_given_masks(method: type[SparseConfig]) -> type[SparseConfig]:
    """The method, searching for the time it takes, that then keeps a mask that is given."""

    @dataclass(frozen=True)
    class GivenMasks(method):  # type: ignore[misc, valid-type]
        masks: Any = None  # where they come from; its time is not counted

        def find(self, search: Search) -> Found:
            cost = super().find(search).cost
            with self.masks.clock.region("given mask"):
                mask = self.masks.of(search, self).expand(search.query.shape[0], -1, -1, -1)
                return Found(mask, None, cost)

        def to_dict(self) -> dict:
            return {name: getattr(self, name) for name in method.options()}

    return GivenMasks


def our_regions() -> list[tuple[Any, str, str]]:
    """Functions of the library and the region that each is counted to."""
    layer = dit_sparse.step.LayerAttention
    unpacking = ("indices", "to_dense", "to_flex", "to_fa4")
    once = vars(BlockMask).get("work_order")  # a cached property
    return [
        (layer, "__call__", "selection"),  # what is left of it, our Python and packed bits
        (dit_sparse.step, "dense_attention_with_lse", "attention"),
        (dit_sparse.step, "sparse_attention", "attention"),
        (dit_sparse.step, "add_tail", "attention"),
        (auto, "measure_residual", "search"),
        (auto, "sampled_rows", "search"),
        (dit_sparse.step, "permute_video", "reorder"),
        (adaspa, "exact_mass", "search"),
        (adaspa_sampled, "sampled_rows", "search"),
        (HostCache, "store", "stream"),
        (HostCache, "fetch", "stream"),
        *((BlockMask, name, "unpack") for name in unpacking if hasattr(BlockMask, name)),
        *([(once, "func", "unpack")] if once is not None else []),
    ]


# --- measuring -----------------------------------------------------------------------------------


class Loop:
    """Stands for the pipeline: sparse attention reads from it where in the loop a call is."""

    def __init__(self, transformer: Any):
        self.components, self._num_timesteps = {"transformer": transformer}, STEPS
        self.scheduler = SimpleNamespace(step_index=0, timesteps=range(STEPS))


class Benchmark:
    """One model, and the rows found so far; the file is written after each."""

    regions: tuple[str, ...] = REGIONS

    def __init__(self, args: argparse.Namespace):
        self.started, self.args = time.perf_counter(), args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = tiny(MODELS[args.model]) if args.tiny else MODELS[args.model]
        of_all = tuple(number for _, _, number in self.model.layers)
        layers = args.layers or self.model.measured
        self.layers = of_all if args.all_layers else tuple(min(p) for p in zip(layers, of_all))
        if len(layers) != len(of_all):
            sys.exit(
                f"--layers takes {len(of_all)} numbers for {', '.join(self.model.block_lists)}"
            )
        self.times_more = {n: k / m for (n, _, k), m in zip(self.model.layers, self.layers)}
        self.result: dict[str, Any] = {"question": (__doc__ or "").split("\n")[0]}
        self.result |= {"environment": environment(args.commit), "options": vars(args) | {}}
        self.result["options"]["out"] = str(args.out)

        torch.manual_seed(0)
        self.transformer = build(self.model, self.layers, self.device, self.dtype)
        self.inputs = self.model.inputs(self.device, self.dtype)
        self.clock = Clock(self.device)
        time_blocks(self.transformer, self.model.block_lists, self.clock)
        self.loop = Loop(self.transformer)
        family = family_of(self.transformer)
        assert family is not None
        self.attentions = list(family.self_attentions(self.transformer))
        self.grid = family.prepare(self.transformer, self.inputs, False).grid
        built = dict(zip(self.model.block_lists, self.layers))
        self.result |= {
            "model": self.model.name + " (tiny)" * args.tiny,
            "tokens": self.grid.tokens,
            "branches": list(self.model.branches),
            "layers": {n: {"built": built[n], "of": k} for n, _, k in self.model.layers},
            "rows": [],
            "schedules": [],
            "left_out": [],
        }
        self.say(f"{self.result['model']}: {self.grid.tokens} tokens, layers {built} built")

    def layers_to_build(self) -> tuple[int, ...]:
        of_all = tuple(number for _, _, number in self.model.layers)
        if self.args.all_layers:
            return of_all
        layers = self.args.layers or self.model.measured
        if len(layers) != len(of_all):
            lists = ", ".join(self.model.block_lists)
            sys.exit(f"--layers takes {len(of_all)} numbers for this model, for {lists}")
        return tuple(min(pair) for pair in zip(layers, of_all))

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", flush=True)

    def write(self) -> None:
        self.result["seconds"] = time.perf_counter() - self.started
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def no_time_for(self, what: str) -> bool:
        late = time.perf_counter() - self.started > self.args.seconds
        if late:
            self.result["left_out"].append(what)
            self.say(f"no time left for: {what}")
        return late

    def forward(self, step: int, branch: str | None = None) -> torch.Tensor:
        self.loop.scheduler.step_index = step
        with torch.no_grad(), self.transformer.cache_context(branch or self.model.branches[0]):
            return self.transformer(**self.inputs, return_dict=False)[0]

    def warm_up(self, *steps: int) -> None:
        """Compiles what is to be compiled, and sees that the output is finite."""
        for step in steps:
            if not self.forward(step).isfinite().all():
                sys.exit(f"the output of step {step} is not finite: its time would mean nothing")

    def time_forward(self, step: int) -> tuple[Times, int]:
        """Times by region and the peak of memory."""
        if self.clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        times = self.clock.measure(lambda: self.forward(step))
        return times, torch.cuda.max_memory_allocated() if self.clock.cuda else 0

    def add_row(
        self, kind: str, found: list[tuple[Times, int]], masks_not_built: int = 0, **facts: Any
    ) -> dict:
        """A row of the median of each region, scaled to all layers."""
        seconds, measured = Counter[str](), 0.0
        for blocks, region in {place for times, _ in found for place in times}:
            if region == "given mask":
                continue
            median = statistics.median(times.get((blocks, region), 0.0) for times, _ in found)
            seconds[region] += median * self.times_more.get(blocks or "", 1.0)
            measured += median
        unpack = seconds.pop("unpack", 0.0)
        stream = seconds.pop("stream", 0.0)
        seconds["selection"] += unpack + stream
        peak = max(peak for _, peak in found)
        row = {
            "model": self.result["model"],
            "tokens": self.grid.tokens,
            "kind": kind,
            **facts,
            "seconds": sum(seconds.values()),
            **{f"{region}_s": seconds[region] for region in self.regions},
            "unpack_s": unpack,  # also in selection_s
            "stream_s": stream,  # waits for copies from and to the host, also in selection_s
            "peak_bytes": peak + self.weights_not_built() + masks_not_built,
            "measured_seconds": measured,
            "measured_peak_bytes": peak,
            "repeats": len(found),
        }
        self.result["rows"].append(row)
        parts = ", ".join(f"{r} {row[f'{r}_s']:.4g}" for r in self.regions if row[f"{r}_s"])
        mode = "compiled" if row["compiled"] else "eager"
        self.say(f"{mode} {kind} at density {row['density']}: {row['seconds']:.4g} s ({parts})")
        self.write()
        return row

    def weights_not_built(self) -> int:
        """Bytes of the layers that the model has beyond those built."""
        total = 0.0
        for name in self.model.block_lists:
            weights = getattr(self.transformer, name).parameters()
            total += sum(w.nbytes for w in weights) * (self.times_more[name] - 1)
        return round(total)

    # --- the dense side

    def choose_backend(self) -> str:
        """The fastest for one call at the model's own shape."""
        batch = self.inputs["hidden_states"].shape[0]
        config = self.transformer.config
        heads = config.num_attention_heads, config.attention_head_dim
        shape = batch, self.grid.tokens, *heads
        query, key, value = torch.randn(3, *shape, device=self.device, dtype=self.dtype)
        seconds: dict[str, float] = {}
        told: dict[str, Any] = {}
        for name in candidates(self.device):
            try:
                with dense_backend(self.transformer, name):
                    call = self.dense_call(name, query, key, value)
                    call()
                    seconds[name] = min(sum(self.clock.measure(call).values()) for _ in range(3))
            except Exception as error:  # whatever fails in a compiler or a driver: say so
                told[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        best = self.args.dense_backend or min(seconds, key=lambda name: seconds[name])
        if best not in seconds:
            sys.exit(f"dense attention by {best!r} does not run here: {seconds | told}")
        self.result["dense_backends"] = seconds | told
        self.result["dense_backend"] = best
        self.say(f"dense attention, seconds of one call: {seconds | told}; {best} is taken")
        return best

    def dense_call(self, name: str, query, key, value) -> Any:
        if any(hasattr(module.processor, "_attention_backend") for module in self.attentions):
            dispatch = attention_dispatch.dispatch_attention_fn
            return lambda: dispatch(query, key, value, backend=name)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return lambda: F.scaled_dot_product_attention(query, key, value)

    @contextmanager
    def without_text_mask(self) -> Iterator[None]:
        stock = [module.processor for module in self.attentions]
        for module, processor in zip(self.attentions, stock):
            if type(processor).__name__ == "HunyuanVideoAttnProcessor2_0":
                unmasked = UnmaskedHunyuanVideo()
                unmasked._attention_backend = processor._attention_backend
                module.set_processor(unmasked)
        try:
            yield
        finally:
            for module, processor in zip(self.attentions, stock):
                module.set_processor(processor)

    def dense(self, compiled: bool) -> None:
        if self.no_time_for(f"dense, {'compiled' if compiled else 'eager'}"):
            return
        backend = self.result["dense_backend"]
        with self.without_text_mask(), ExitStack() as undo:
            if compiled:
                undo.enter_context(self.compiled_blocks())
            else:
                undo.enter_context(time_dense_attention(self.transformer, self.clock))
            self.warm_up(0)
            found = [self.time_forward(0) for _ in range(self.args.repeats)]
            facts = {"compiled": compiled, "density": 1.0, "attention": backend, "cost": 1.0}
            row = self.add_row("dense", found, **facts)
            if compiled:
                self.split_compiled(row)
            if "dense" in self.args.whole:
                self.whole("dense", compiled, None)

    def split_compiled(self, row: dict) -> None:
        """Take the attention of a compiled dense forward from the eager one."""
        eager = self.find_row("dense", False, 1.0)
        one_call = self.result["dense_backends"][row["attention"]]
        layers = sum(number for _, _, number in self.model.layers)
        row["attention_s"] = eager["attention_s"] if eager else one_call * layers
        row["attention_from"] = "the eager row" if eager else "one call, times the layers"
        row["rest_s"] = row["seconds"] - row["attention_s"]
        self.write()

    @contextmanager
    def compiled_blocks(self) -> Iterator[None]:
        """The blocks compiled each, as `compile_repeated_blocks` does where a model has it."""
        options = {"fullgraph": True, "backend": self.args.compile_backend}
        torch._dynamo.reset()
        if getattr(self.transformer, "_repeated_blocks", None):
            self.transformer.compile_repeated_blocks(**options)
        else:
            for name in self.model.block_lists:
                for block in getattr(self.transformer, name):
                    block.compile(**options)
        try:
            yield
        finally:
            for module in self.transformer.modules():
                module._compiled_call_impl = None

    # --- the sparse side

    def sparse(self, compiled: bool) -> None:
        args, mode = self.args, "compiled" if compiled else "eager"
        masks = Masks(args.masks, self.clock)
        config = with_given_masks(METHODS[args.method])(
            density=args.densities[0],
            search_at=SEARCH_AT,
            order=args.order,
            block_size=args.block_size,
            engine=args.engine,
            masks=masks,
            **({"max_cache_bytes": None} if args.method == "auto" else {}),
            **({"cache_device": args.cache_device} if args.cache_device else {}),
        )
        with ExitStack() as undo:
            undo.enter_context(time_functions(self.clock, our_regions()))
            with time_hooks_added(self.transformer, self.clock, "reorder"):
                handle = undo.enter_context(enable_sparse_attention(self.loop, config))
            layers, self.state = handle._installed[0].layers, handle._installed[0].state
            for layer in layers:
                layer.dense = self.clock.wrap(layer.dense, "attention")
            if compiled:
                undo.enter_context(self.compiled_blocks())
            for density in args.densities:
                what = f"{mode}, density {density}"
                if self.no_time_for(what):
                    continue
                for layer in layers:  # enabling again would compile again
                    layer.config = replace(config, density=density)
                first = density == args.densities[0]
                if first:
                    self.warm_up(WARM_UP)
                    self.time_step(WARM_UP, compiled, None)
                    self.warm_up(SEARCH, FIRST_REUSE, SEARCH_AGAIN)
                else:  # a kernel may be compiled for another length of the lists
                    self.warm_up(SEARCH, FIRST_REUSE)
                for step in (SEARCH, FIRST_REUSE, REUSE, SEARCH_AGAIN):
                    self.time_step(step, compiled, density)
                if first and "sparse" in args.whole:
                    self.whole("sparse", compiled, density)
                self.compose()

    def time_step(self, step: int, compiled: bool, density: float | None) -> None:
        """The repeats of a reuse are steps in a row; a search and its first reuse come once."""
        times = self.args.repeats if step in (WARM_UP, REUSE) else 1
        found = [self.time_forward(step + i) for i in range(times)]
        records = [record for record in self.state.trace if record.step == step]
        costs = [
            float(record.extra_cost)
            + (1.0 if record.density is None else float(record.density.mean()))
            for record in records[-len(self.attentions) :]
        ]
        kept = sum(entry.nbytes() for entry in self.state.kept.values())
        on_host = sum(host.nbytes() for host in (self.state.hosts or {}).values())
        more = sum(k for _, _, k in self.model.layers) / len(self.attentions)
        in_all = more * len(self.model.branches)
        on_device = kept - on_host
        fused = step == SEARCH and METHODS[self.args.method].uses_lse
        dense = "dense with log-sum-exp" if fused else self.result["dense_backend"]
        self.add_row(
            KIND_AT[step],
            found,
            round(on_device * (in_all - 1)),
            host_bytes=round(on_host * in_all),
            compiled=compiled,
            density=density,
            attention=", ".join(sorted(self.state.engines)) or dense,
            cost=statistics.mean(costs),
        )

    def whole(self, side: str, compiled: bool, density: float | None) -> None:
        """All 50 steps with the layers that are built, against the sum of single forwards."""
        if self.no_time_for(f"whole {side} run"):
            return

        def run() -> None:
            for step in range(STEPS):
                for branch in self.model.branches:
                    self.forward(step, branch)

        times = self.clock.measure(run)
        seconds = sum(s for (_, region), s in times.items() if region != "given mask")
        counts = {"dense": STEPS} if side == "dense" else counts_of(SEARCH_AT)
        rows = {kind: self.kind_row(kind, compiled, density) for kind in counts}
        composed = sum(n * rows[kind]["measured_seconds"] for kind, n in counts.items())
        composed *= len(self.model.branches)
        found = {"side": side, "compiled": compiled, "density": density, "seconds": seconds}
        found |= {"composed_seconds": composed, "ratio": seconds / composed}
        self.result.setdefault("whole", []).append(found)
        self.say(f"whole {side} run {seconds:.4g} s, composed {composed:.4g} s")
        self.write()

    # --- the schedule

    def find_row(self, kind: str, compiled: bool, density: float | None) -> dict | None:
        wanted = kind, compiled, density
        found = (
            r for r in self.result["rows"] if (r["kind"], r["compiled"], r["density"]) == wanted
        )
        return next(found, None)

    def kind_row(self, kind: str, compiled: bool, density: float | None) -> Any:
        of_all = {"dense": 1.0, "warm-up": None}
        return self.find_row(kind, compiled, of_all.get(kind, density))

    def compose(self) -> None:
        """50 steps from the forwards, for every schedule of which all rows are there."""
        modes = [mode == "compiled" for mode in self.args.modes]
        self.result["schedules"] = [
            schedule
            for compiled in modes
            for density in self.args.densities
            for search_at in SCHEDULES
            if (schedule := self.schedule(search_at, compiled, density)) is not None
        ]
        self.write()

    def schedule(self, search_at: tuple, compiled: bool, density: float) -> dict | None:
        counts, branches = counts_of(search_at), len(self.model.branches)
        rows = {kind: self.kind_row(kind, compiled, density) for kind in [*counts, "dense"]}
        if None in rows.values():
            return None
        dense = rows["dense"]

        def total(field: str) -> float:
            return sum(count * rows[kind][field] for kind, count in counts.items())

        seconds, dense_attention = total("seconds"), STEPS * dense["attention_s"]
        beside = total("selection_s") + total("reorder_s")
        attention = total("attention_s") + total("search_s")
        return {
            "model": self.result["model"],
            "compiled": compiled,
            "density": density,
            "search_at": list(search_at),
            "steps": dict(counts),
            "effective_cost": total("cost") / STEPS,
            "seconds_50": seconds * branches,
            "dense_seconds_50": STEPS * dense["seconds"] * branches,
            "speedup": STEPS * dense["seconds"] / seconds,
            "effective_time": (attention + beside) / dense_attention,
            "search_share": total("search_s") / dense_attention,
            "overhead_share": beside / dense_attention,
            "overhead_share_by_difference": (seconds - attention - STEPS * dense["rest_s"])
            / dense_attention,
        }

    def run(self) -> None:
        backend = self.choose_backend()
        with dense_backend(self.transformer, backend):
            for mode in self.args.modes:
                self.dense(mode == "compiled")
                self.sparse(mode == "compiled")
        self.compose()
        print(
            f"{'':8} {'density':>7} {'cost':>6} {'seconds':>9} {'dense':>9} {'x':>5} {'beside':>6}"
        )
        for s in self.result["schedules"]:
            print(
                f"{'compiled' if s['compiled'] else 'eager':8} {s['density']:7}"
                f" {s['effective_cost']:6.3f} {s['seconds_50']:9.2f} {s['dense_seconds_50']:9.2f}"
                f" {s['speedup']:5.2f} {s['overhead_share']:6.3f}  search at {s['search_at']}"
            )
        self.say("done")


def counts_of(search_at: tuple[float, ...]) -> Counter[str]:
    """How many of the 50 steps are of each kind."""
    found_at, before, counts = None, "", Counter[str]()
    for step in range(STEPS):
        kind: str = step_kind(step, STEPS, search_at, found_at)
        if kind == "search":
            kind, found_at = "search" if found_at is None else "search again", step
        elif before == "search":
            kind = "first reuse"
        before = "warm-up" if kind == "dense" else kind
        counts[before] += 1
    return counts


def options() -> argparse.ArgumentParser:
    add = (
        parser := argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ).add_argument
    add("--model", choices=MODELS, required=True)
    add("--out", type=Path, required=True)
    add("--layers", type=int, nargs="+", help="layers built of each list of blocks")
    add("--all-layers", action="store_true")
    add("--densities", type=float, nargs="+", default=[0.2, 0.5, 0.1])
    add("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    add("--dense-backend", help="diffusers' name; the fastest by default")
    add("--method", choices=("adaspa", "adaspa-sampled", "auto"), default="adaspa")
    add("--cache-device", choices=CACHE_DEVICES, help="where auto keeps residuals")
    add("--masks", default="random", help="random, near, or an .npz file of recorded masks")
    add("--engine", default="auto")
    add("--block-size", type=int, default=64)
    add("--order", default="curve")
    add("--repeats", type=int, default=2, help="timed forwards of a kind; searches once")
    add("--whole", nargs="*", choices=("dense", "sparse"), default=[], help="run 50 steps, too")
    add("--seconds", type=float, default=1e9, help="begin nothing new after so long")
    add("--compile-backend", default="inductor")
    add("--commit", help="commit to record where there is no git")
    add("--tiny", action="store_true", help="tiny shapes, to try the script without a GPU")
    return parser


def main(argv: list[str] | None = None) -> None:
    Benchmark(options().parse_args(argv)).run()


if __name__ == "__main__":
    main()
