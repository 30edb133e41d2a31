"""How fast is block-sparse attention beside its peers on this GPU?

    python benchmarks/kernels.py --out benchmarks/results/kernels_h200.json --seconds 540
    python benchmarks/kernels.py --out ... --sweep --shape wan-1.3b     # every candidate tile too

Peers run side by side, medians of CUDA events: torch SDPA (cuDNN, FlashAttention-2), flash-attn-4
dense and block sparse (`--fa4 DIR` where `pip --target` put it), FlexAttention, SageAttention
where it is installed (dense and lossy), ours.
First the cases of tests/kernel_cases.py and each engine against the reference; an engine that is
wrong gets no time. What is done already stands in --out and is not measured again; dense attention
and the matrix rate are, since ratios compare times of one process only. The last line is JSON.

--out is written after every record. What fails gets a record with its error, and the rest goes on;
what a process hung or died in is named by the next one, which goes past it (--retry tries again).
The Gluon kernel stands last among the tiles of a sweep; --gluon-cases checks it in its own call.

Records: shape, engine, block, density, mask, tile, ms, ms_p20, ms_p80, tflops (multiply-adds of
kept, valid pairs only), ratio_to_dense_best (time over that of the fastest dense engine),
busy_ms (of calls below SHORT_MS: what the GPU computes of it; the rest waits for launches),
peak_bytes (beyond inputs and outputs), read_bytes (of l2-reads); of 8 bits the errors beside
"triton" (the time has quantisation in it, which "quantize ..." times alone; inputs are random, not
a model's); of a case its errors and limits.
Lists are built before the clock starts; "lists", "selection" and "order" are rows of their own.
What would mislead: inputs are random, so clocks and power are those of random data; see masks.py
for what the masks leave out.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import masks  # noqa: E402
from environment import environment, folders_of_fa4  # noqa: E402
from result_file import write_result  # noqa: E402

from dit_sparse.attention import disagreement  # noqa: E402
from dit_sparse.block_mask import BlockMask  # noqa: E402
from dit_sparse.engines import ENGINES, Problem, why_not  # noqa: E402
from dit_sparse.patterns.adaspa import AdaSpa  # noqa: E402
from dit_sparse.patterns.auto import TAIL_TOKENS  # noqa: E402
from dit_sparse.patterns.select import forced_blocks  # noqa: E402


class Shape(NamedTuple):
    name: str
    heads: int
    tokens: int
    head_dim: int
    text: int = 0
    text_first: bool = False


SHAPES = [
    Shape("wan-1.3b-aligned", 12, 32768, 128),
    Shape("wan-1.3b", 12, 32760, 128),
    Shape("cogvideox-5b-aligned", 48, 17664, 64),
    Shape("cogvideox-5b", 48, 17776, 64, text=226, text_first=True),
    Shape("hunyuanvideo-720p-aligned", 24, 118784, 128),
    Shape("hunyuanvideo-720p", 24, 118860, 128, text=60),
]
BLOCKS = (128, 64)
SIZES = tuple((block, block) for block in BLOCKS)
DENSITIES = (0.5, 0.2, 0.1)
SHORT_MS = 2.0
KINDS = ("random", "real", "uneven")
SEARCH_CASES = (
    "case",
    "int8 case",
    "fp8 case",
    "selection case",
    "mass case",
    "sampled case",
    "top-k case",
    "pool case",
)


def measure(call: Callable[[], Any], budget_s: float = 0.3) -> dict[str, float]:
    """Median, p20 and p80 in ms over as many calls as fit the budget, 5 to 30; and peak bytes."""

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
    kept = sum(x.numel() * x.element_size() for x in outputs if isinstance(x, Tensor))
    peak = torch.cuda.max_memory_allocated() - before - kept
    del result, outputs
    repeats = max(5, min(30, int(budget_s * 1000 / max(timed(), 1e-3))))
    times = torch.tensor([timed() for _ in range(repeats)])
    low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    found = {"ms": median, "ms_p20": low, "ms_p80": high, "repeats": repeats}
    if median < SHORT_MS:
        found["busy_ms"] = busy_ms(call)
    return found | {"peak_bytes": max(peak, 0)}


def busy_ms(call: Callable[[], Any]) -> float:
    """Sum of the kernels of a call."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1000


class Bench:
    """Records of one file, and the clock.

    Args:
        out: JSON file that is continued.
        seconds: no measurement begins later than this.
        engines: names to run; empty for all.
        retry: forget what failed before, so that it is tried again.
    """

    def __init__(
        self,
        out: Path,
        seconds: float,
        engines: list[str],
        facts: dict[str, Any],
        retry: bool = False,
    ):
        self.out, self.engines = out, engines
        self.started, self.seconds = time.perf_counter(), seconds
        old = json.loads(out.read_text()) if out.is_file() else {}
        self.records = old.get("records", [])
        self.finished = old.get("finished", [])  # masks on which every engine has its record
        self.runs = [*old.get("runs", []), facts]
        self.run = len(self.runs) - 1
        self.best_dense: dict[str, float] = {}  # ms, of this process
        self.complete = True
        self.running: dict[str, Any] | None = None  # what the process is in
        ended_in = old.get("running")
        if ended_in and not self.has(ended_in):
            self.keep(ended_in, error="the process ended in it")
        if retry:
            self.finished = []
            self.records = [record for record in self.records if "error" not in record]
        before = {run.get("commit") for run in old.get("runs", [])} - {facts.get("commit")}
        if before:
            print(f"{out} also has records of other commits, kept: {before}", flush=True)

    def wanted(self, key: dict[str, Any]) -> bool:
        """Whether there is time for it, and no record yet."""
        name = key["engine"].partition(" (")[0]  # a tile of a sweep belongs to its engine
        if self.engines and name not in self.engines:
            return False
        return not self.has(key) and not self.late()

    def has(self, key: dict[str, Any]) -> bool:
        return any(key.items() <= record.items() for record in self.records)

    @contextmanager
    def attempt(self, key: dict[str, Any]) -> Iterator[None]:
        """What fails inside gets a record, and the rest goes on, unless the GPU is lost."""
        outer, self.running = self.running, key
        self.save()
        try:
            yield
        except Exception as error:
            self.keep(key, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            self.stop_if_lost()
        self.running = outer
        self.save()

    def stop_if_lost(self) -> None:
        """After an illegal access every later call of this process fails, whatever it is."""
        try:
            torch.cuda.synchronize()
        except Exception as error:
            self.running = None  # it has its record
            self.save()
            sys.exit(
                f"the GPU is lost to this process ({error}); the same command goes on after it"
            )

    def add(self, shape: str, engine: str, call, flops: float | None = None, **facts) -> None:
        """Time `call` and keep the record, unless it is there, unwanted or too late.

        Args:
            again: measure even if there is a record of an earlier process.
            extra: facts that do not tell one record from another.
        """
        again, extra = facts.pop("again", False), facts.pop("extra", {})
        key = {"shape": shape, "engine": engine, **facts}
        if self.late() if again else not self.wanted(key):
            return
        with self.attempt(key):
            timing = measure(call) | extra
            if flops:
                timing["tflops"] = flops / timing["ms"] / 1e9
            if again and facts.get("density") == 1.0:
                best = self.best_dense.get(shape, float("inf"))
                self.best_dense[shape] = min(best, timing["ms"])
            if shape in self.best_dense:
                timing["ratio_to_dense_best"] = timing["ms"] / self.best_dense[shape]
            self.keep(key, **timing)

    def keep(self, key: dict[str, Any], **found) -> None:
        """Append a record, print its line and save."""
        self.records.append({**key, **found, "run": self.run})
        shape, engine, *facts = key.values()
        rate = f"{found['tflops']:6.0f} TFLOP/s" if "tflops" in found else ""
        text = f"{found['ms']:9.3f} ms {rate}" if "ms" in found else found.get("error", "right")
        print(f"{shape:26} {engine:36} {' '.join(map(str, facts)):28} {text}", flush=True)
        self.save()

    def late(self) -> bool:
        late = time.perf_counter() - self.started > self.seconds
        self.complete = self.complete and not late
        return late

    def finish(self, task: list) -> None:
        if not self.late():
            self.finished.append(task)
            self.save()

    def save(self) -> None:
        state = {"runs": self.runs, "finished": self.finished, "records": self.records}
        if self.running:
            state["running"] = self.running
        write_result(self.out, state)


def dense_rows(bench: Bench, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> None:
    """The dense peers and the rates of matrix products and cache, in every process anew."""
    import l2_reads

    flops = 4 * shape.heads * shape.tokens**2 * shape.head_dim
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    bench.add(shape.name, "matmul 8192", lambda: a @ b, 2 * 8192**3, again=True)
    bench.add(shape.name, "l2-reads", l2_reads.run, again=True, read_bytes=l2_reads.read_bytes())
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    facts = {"density": 1.0, "again": True}
    for engine, backend in (
        ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        ("sdpa-flash2", SDPBackend.FLASH_ATTENTION),
    ):
        with sdpa_kernel(backend):
            bench.add(
                shape.name,
                engine,
                lambda: F.scaled_dot_product_attention(*heads_first),
                flops,
                **facts,
            )
    if ENGINES["fa4"].missing("cuda") is None:
        from flash_attn.cute.interface import flash_attn_func

        bench.add(shape.name, "fa4-dense", lambda: flash_attn_func(q, k, v)[0], flops, **facts)
    if find_spec("sageattention"):
        from sageattention import sageattn

        exact = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        error = distance(sageattn(q, k, v, tensor_layout="NHD"), exact)
        call = partial(sageattn, q, k, v, tensor_layout="NHD")
        extra = {"relative_error": error}
        bench.add(shape.name, "sageattention", call, flops, extra=extra, **facts)


def distance(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).float().norm() / exact.float().norm()).item()


def kernel_calls(
    mask: BlockMask, q: Tensor, k: Tensor, v: Tensor, sweep: bool
) -> Iterator[tuple[str, Callable[[], Callable], dict[str, Any]]]:
    """(engine, function that builds what belongs to the mask and gives the call, extra facts)."""
    from dit_sparse.kernels.block_sparse_fwd import block_sparse_fwd, default_tile
    from dit_sparse.kernels.quantize import quantize, quantize_values
    from dit_sparse.kernels.tiles import CANDIDATES, FORWARD_FP8, Tile, tile_for

    size = mask.block_size
    lists = cache(mask.indices)

    def ours(order: bool = True, tile: Tile | None = None):
        chosen = mask.work_order if order else None
        return block_sparse_fwd(q, k, v, *lists(), block_size=size, order=chosen, tile=tile)

    expected = cache(lambda: ours()[0])
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    dense = cache(lambda: F.scaled_dot_product_attention(*heads_first).transpose(1, 2))

    def candidate(tile: Tile) -> Callable:
        error = (ours(tile=tile)[0] - expected()).abs().max().item()
        if not error < 2e-2:  # nor where it is NaN
            raise ValueError(f"differs from the table's tile by {error}")
        return lambda: ours(tile=tile)

    def eight_bits(precision: str, errors: dict[str, Any], tile: Tile | None = None) -> Callable:
        def call():
            options = {"order": mask.work_order, "precision": precision, "tile": tile}
            return block_sparse_fwd(q, k, v, *lists(), block_size=size, **options)

        (out, lse), (want, want_lse) = call(), ours()
        errors["relative_error"] = distance(out, want)
        errors["error_to_dense"] = distance(out, dense())
        errors["error_of_16_bits_to_dense"] = distance(want, dense())
        errors["max_error"] = (out - want).abs().max().item()
        errors["lse_error"] = (lse - want_lse).abs().max().item()
        return call

    default = {"tile": list(default_tile(q, k, v, size))}
    yield "triton", lambda: ours, default
    for precision in ("int8", "fp8"):
        errors: dict[str, Any] = {}
        yield f"triton {precision}", partial(eight_bits, precision, errors), errors
    yield "quantize int8", lambda: lambda: quantize(q, k, size), {}

    def quantize_all():
        return quantize(q, k, size, precision="fp8"), quantize_values(v, size[1])

    yield "quantize fp8", lambda: quantize_all, {}
    yield "triton unordered", lambda: lambda: ours(order=False), default
    if why_not("fa4", problem(q, size)) is None:
        yield "fa4", lambda: fa4_call(mask, q, k, v), {}
    if mask.density.max() <= 0.25:  # slow, and its lists are large
        yield "flex", lambda: flex_call(mask, q, k, v), {}
    if sweep:
        tiles = CANDIDATES.get((q.shape[-1], size[0]), [])
        for tile in sorted(tiles, key=lambda tile: tile.gluon):  # what may hang comes last
            name = f"triton {tuple(tile[:4])}"
            name = name.replace(")", ", gluon)") if tile.gluon else name
            yield name, lambda tile=tile: candidate(tile), {"tile": list(tile)}
        tile = tile_for(FORWARD_FP8, q.device, "descriptor", q.shape[-1], size)
        errors = {"tile": list(tile)}
        name = f"triton {tuple(tile[:4])} fp8"
        yield name, partial(eight_bits, "fp8", errors, tile), errors


def fa4_call(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Callable:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    lists = BlockSparseTensorsTorch(**mask.to_fa4())
    return lambda: flash_attn_func(q, k, v, block_sparse_tensors=lists, return_lse=True)[:2]


def flex_call(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Callable:
    from torch.nn.attention.flex_attention import AuxRequest

    flex, run, aux = mask.to_flex(), ENGINES["flex"].compiled(), AuxRequest(lse=True)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    options = {"kernel_options": ENGINES["flex"].tiles(mask.block_size)}
    return lambda: run(*heads_first, block_mask=flex, return_aux=aux, **options)[0]


def problem(q: Tensor, size: tuple[int, int]) -> Problem:
    return Problem(q.device, q.dtype, q.shape[-1], size)


def tasks(bench: Bench, shape: Shape, options) -> list[list]:
    """The masks of a shape that have no record of every engine yet."""
    every = [
        [shape.name, *size, kind, density, options.sweep, bench.engines]
        for size in SIZES
        if size[0] in options.block
        for kind in options.mask
        for density in options.density
    ]
    return [task for task in every if task not in bench.finished]


def sparse_rows(bench: Bench, shape: Shape, q, k, v, options) -> None:
    compiled = None
    for task in tasks(bench, shape, options):
        if bench.late():
            return
        _, *size, kind, density, sweep, _ = task
        if size != compiled:  # FlexAttention is compiled for each shape
            torch._dynamo.reset()
            ENGINES["flex"].compiled.cache_clear()
            compiled = size
        facts = {"block": size, "density": density, "mask": kind}
        with bench.attempt({"shape": shape.name, "engine": "mask", **facts}):
            mask_rows(bench, shape, q, k, v, tuple(size), kind, density, sweep)
            bench.finish(task)


def mask_rows(bench: Bench, shape: Shape, q, k, v, size, kind, density, sweep) -> None:
    """Every engine on one mask."""
    dense = make_mask(kind, shape, -(-shape.tokens // size[0]), density, size[0])
    mask = BlockMask.from_dense(dense, shape.tokens, shape.tokens, size)
    del dense
    torch.cuda.empty_cache()
    pairs = mask.density.double().sum().item() * shape.tokens**2
    facts = {"block": list(size), "density": density, "mask": kind}
    if kind == "real":
        bench.add(shape.name, "lists", lambda: mask.indices(), None, **facts)
        bench.add(shape.name, "order", lambda: fresh(mask).work_order, None, **facts)
    for engine, prepare, extra in kernel_calls(mask, q, k, v, sweep):
        key = {"shape": shape.name, "engine": engine, **facts}
        if not bench.wanted(key):
            continue
        with bench.attempt(key):
            name = engine.replace("quantize", "triton").split(" ")
            precision = name[-1] if name[-1] in ("int8", "fp8") else "full"
            asked = problem(q, size)._replace(precision=precision)
            wrong = disagreement(name[0], asked)
            if wrong:
                raise ValueError(f"not timed, {wrong}")
            call = prepare()
            bench.add(shape.name, engine, call, 4 * pairs * shape.head_dim, extra=extra, **facts)


def fresh(mask: BlockMask) -> BlockMask:
    """The same mask without what it has computed already."""
    names = ("bits", "q_len", "kv_len", "block_size", "max_blocks", "density")
    return BlockMask(**{name: getattr(mask, name) for name in names})


def make_mask(kind: str, shape: Shape, blocks: int, density: float, size: int) -> Tensor:
    torch.manual_seed(0)
    if kind == "real":
        mask = masks.real_mask(shape.heads, blocks, density, size)
    elif kind == "uneven":
        mask = masks.uneven_mask(shape.heads, blocks, density)
    else:
        mask = masks.random_mask(shape.heads, blocks, density)
    if shape.text:
        mask = masks.with_text(mask, shape.tokens, shape.text, shape.text_first, size)
    return mask


def with_tiles(bench: Bench, shape: Shape, engine: str, kernel, tiles, call, flops, **block):
    """`call` with the table's tile, then with each of `tiles` in the module `kernel`."""
    bench.add(shape.name, engine, call, flops, **block)
    for tile in tiles:
        with patch.object(kernel, "tile_for", lambda *_, tile=tile: tile):
            bench.add(shape.name, f"{engine} {tuple(tile[:4])}", call, flops, **block)


def tail_rows(bench: Bench, shape: Shape, q: Tensor, k: Tensor, v: Tensor, size, tiles) -> None:
    """What `auto` adds to a sparse call: pooling, the tail and a residual in fp8."""
    from dit_sparse.kernels import tail_fwd
    from dit_sparse.patterns.correct import measure_residual
    from dit_sparse.tail import add_tail

    tiles = dict.fromkeys(tile.within((size[0], 128)) for tile in tiles)
    blocks, block = -(-shape.tokens // size[0]), {"block": list(size), "density": 0.1}
    dense = make_mask("random", shape, blocks, 0.1, size[0])
    mask = BlockMask.from_dense(dense, shape.tokens, shape.tokens, size)
    lse = torch.zeros(1, shape.heads, shape.tokens, device="cuda")
    residual = measure_residual(q, k, fp8=True, rho=lse + 0.5)
    for tokens in TAIL_TOKENS:
        if tokens <= size[1]:
            call = partial(
                add_tail, v, lse, q, k, v, mask, tail_tokens=tokens, engine="triton",
                residual=residual,
            )  # fmt: skip
            pairs = 4 * shape.heads * shape.tokens**2 * shape.head_dim
            name, flops = f"tail of {tokens}", pairs / tokens
            with_tiles(bench, shape, name, tail_fwd, tiles, call, flops, **block)


def search_rows(bench: Bench, shape: Shape, q: Tensor, k: Tensor, v: Tensor, sweep: bool) -> None:
    """Scoring, selection, pooling and reordering, each on its own."""
    from dit_sparse.dense import dense_attention_with_lse
    from dit_sparse.kernels import block_mass, sampled_mass
    from dit_sparse.kernels.block_pool import block_pool
    from dit_sparse.kernels.tiles import SEARCH_CANDIDATES

    _, lse = dense_attention_with_lse(q, k, v)
    flops = 2 * shape.heads * shape.tokens**2 * shape.head_dim
    order = torch.randperm(shape.tokens, device="cuda")
    hidden = q.flatten(2)
    bench.add(shape.name, "reorder", lambda: hidden[:, order])
    for size in SIZES:
        block, tiles = {"block": list(size)}, SEARCH_CANDIDATES if sweep else []
        exact = partial(block_mass.block_mass, q, k, lse, block_size=size)
        with_tiles(bench, shape, "block_mass", block_mass, tiles, exact, flops, **block)
        rows = q[:, 4::8]

        def sampled(rows=rows, size=size):
            return sampled_mass.sampled_mass(rows.contiguous(), k, size[0] // 8, size[1])

        with_tiles(bench, shape, "sampled_mass", sampled_mass, tiles, sampled, flops / 8, **block)
        bench.add(shape.name, "block_pool", lambda s=size: block_pool(q, s[0]), **block)
        tail_rows(bench, shape, q, k, v, size, tiles)
        blocks = -(-shape.tokens // size[0])
        scores = torch.rand(1, shape.heads, blocks, blocks, device="cuda")
        grid = masks.VideoGrid(1, 1, shape.tokens - shape.text, shape.text, shape.text_first)
        forced = forced_blocks(grid, size[0], scores.device)

        config = AdaSpa(density=0.2, block_size=size[0])

        def in_torch(scores=scores, forced=forced, size=size, config=config):
            mask = config.find_in_torch(scores, forced, 0.5).mask
            return BlockMask.from_dense(mask, shape.tokens, shape.tokens, size).bits

        def packed(scores=scores, forced=forced, config=config):
            return config.find_packed(scores, forced, shape.tokens, 0.5).mask.bits

        bench.add(shape.name, "selection", packed, density=0.2, **block)
        bench.add(shape.name, "selection unfused", in_torch, density=0.2, **block)
        del scores


def check_cases(bench: Bench) -> None:
    """Every case of the tests on this GPU. Ours gets no time where one is outside the rule."""
    from kernel_cases import (
        CASES,
        EIGHT_BIT_CASES,
        TAIL_CASES,
        check_8_bits,
        check_attention,
        check_mass,
        check_pool,
        check_sampled,
        check_selection,
        check_tail,
        check_top_k,
    )

    for case in CASES:
        run_case(bench, "case", case.name, partial(check_attention, case, "cuda"))
    for case in CASES + TAIL_CASES:
        run_case(bench, "tail case", case.name, partial(check_tail, case, "cuda"))
    run_case(bench, "selection case", "7 blocks", partial(check_selection, "cuda"))
    many = partial(check_selection, "cuda", tokens=59456, heads=24, density=0.2)
    run_case(bench, "selection case", "1858 blocks", many)
    for case in EIGHT_BIT_CASES:
        for precision in ("int8", "fp8"):
            check = partial(check_8_bits, case, "cuda", precision)
            run_case(bench, f"{precision} case", case.name, check)
    run_case(bench, "top-k case", "77 blocks", partial(check_top_k, "cuda"))
    run_case(bench, "top-k case", "1858 blocks", partial(check_top_k, "cuda", 1858))
    for case in CASES:
        run_case(bench, "sampled case", case.name, partial(check_sampled, case, "cuda"))
    for case in CASES[1:9:2] + CASES[15:16]:
        run_case(bench, "mass case", case.name, partial(check_mass, case, "cuda"))
        run_case(bench, "pool case", case.name, partial(check_pool, case, "cuda"))


def check_gluon(bench: Bench) -> None:
    """The cases that Gluon kernels serve. Run it alone under `timeout`: a barrier may hang."""
    from kernel_cases import (
        CASES,
        EIGHT_BIT_CASES,
        check_8_bits,
        check_attention,
        check_mass,
        gluon_fp8_tile,
        gluon_mass_tiles,
        gluon_tile,
    )

    for case in EIGHT_BIT_CASES:
        if tile := gluon_fp8_tile(case):
            check = partial(check_8_bits, case, "cuda", "fp8", tile)
            run_case(bench, "gluon case", f"{case.name} fp8", check)
    for case in CASES:
        if tile := gluon_tile(case):
            check = partial(check_attention, case, "cuda", tile)
            run_case(bench, "gluon case", case.name, check)
        for tile in gluon_mass_tiles(case):
            check = partial(check_mass, case, "cuda", tile)
            run_case(bench, "gluon mass case", f"{case.name} {tuple(tile[:4])}", check)


def run_case(bench: Bench, kind: str, name: str, check: Callable[[], dict[str, float]]) -> None:
    """Cases have no clock to be late for: they take seconds, and nothing may be timed without."""
    key = {"shape": kind, "engine": name}
    if any(key.items() <= record.items() and "error" in record for record in bench.records):
        return  # it failed or hung before; --retry forgets that
    bench.records = [record for record in bench.records if not key.items() <= record.items()]
    with bench.attempt(key):
        errors = check()
        torch.cuda.synchronize()
        bench.keep(key, **errors)


def wrong_cases(bench: Bench, *kinds: str) -> list[str]:
    """Names of the cases of these kinds that are outside the rule, or failed."""
    return [r["engine"] for r in bench.records if r["shape"] in kinds and "error" in r]


@torch.no_grad()
def main() -> None:
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add(
        "--out",
        type=Path,
        default=Path("kernels.json"),
        help="JSON file, continued where it exists",
    )
    add("--seconds", type=float, default=540, help="no measurement begins later")
    add("--shape", action="append", choices=[shape.name for shape in SHAPES])
    add("--mask", action="append", choices=KINDS)
    add("--density", action="append", type=float)
    add("--block", action="append", type=int, choices=BLOCKS, help="blocks of attention")
    add("--engine", action="append", help='only these ("triton fp8", say), beside the dense ones')
    add("--sweep", action="store_true", help="time candidate tiles too")
    add("--skip-cases", action="store_true", help="do not run the correctness cases again")
    add("--skip-search", action="store_true", help="attention only")
    add("--retry", action="store_true", help="measure again what has an error in --out")
    add("--gluon-cases", action="store_true", help="check the Gluon kernel and stop")
    add("--fa4", type=Path, help="folder that pip --target filled with flash-attn-4")
    add("--commit", help="commit to record where there is no git")
    options = parser.parse_args()
    options.mask, options.density = options.mask or KINDS, options.density or DENSITIES
    options.block = options.block or BLOCKS
    if options.fa4:
        sys.path[:0] = folders_of_fa4(options.fa4)
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU; without one run: pytest tests/test_kernels.py")

    import triton

    torch.zeros(1, device="cuda")  # a GPU that cannot be used says so here
    fa4 = ENGINES["fa4"].missing("cuda") or "ready"
    print(f"flash-attn-4: {fa4}", flush=True)
    facts = environment(options.commit) | {"triton": triton.__version__, "fa4": fa4, "seed": 0}
    bench = Bench(options.out, options.seconds, options.engine or [], facts, options.retry)
    if options.gluon_cases:
        check_gluon(bench)
    elif not options.skip_cases:
        check_cases(bench)
    if not options.gluon_cases:
        time_all(bench, options)
    bench.save()
    wrong = wrong_cases(bench, *SEARCH_CASES, "gluon case", "gluon mass case")
    summary = {"complete": bench.complete, "records": len(bench.records), "wrong": wrong}
    print(json.dumps(summary | {"run": bench.runs[-1]}))
    if wrong:
        sys.exit(f"outside the rule: {', '.join(wrong)}")


def time_all(bench: Bench, options) -> None:
    """Every shape that was asked for; our engine only where none of its cases is wrong."""
    if wrong := wrong_cases(bench, "case"):
        print(f"ours gets no time: {', '.join(wrong)} outside the rule", flush=True)
        bench.engines = [name for name in bench.engines or ("fa4", "flex") if name != "triton"]
        if not bench.engines:
            return
    search = not (options.skip_search or wrong_cases(bench, *SEARCH_CASES))
    torch.manual_seed(0)
    for shape in SHAPES:
        if options.shape and shape.name not in options.shape:
            continue
        if bench.late() or not (search or tasks(bench, shape, options)):
            continue

        def row(name: str, shape=shape):
            return bench.attempt({"shape": shape.name, "engine": name})

        with row("inputs"):
            size = (1, shape.tokens, shape.heads, shape.head_dim)
            q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            with row("dense"):
                dense_rows(bench, shape, q, k, v)
            sparse_rows(bench, shape, q, k, v, options)
            if search and not bench.late():
                with row("search"):
                    search_rows(bench, shape, q, k, v, options.sweep)
            del q, k, v


if __name__ == "__main__":
    main()
