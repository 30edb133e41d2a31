"""Are the kernels right on this GPU, and how fast are they beside dense attention?

    python benchmarks/kernel_check.py --out benchmarks/results/kernels.json [--quick] [--sweep]

First every case of `tests/kernel_cases.py` by the tolerance rule, then medians of CUDA events at
the shapes of real video models against torch's dense attention in the same run.

What would mislead: inputs and masks are random, every row keeps equally many blocks (real masks
are uneven) and indices are spread evenly (real ones cluster, which the L2 cache likes). TFLOP/s
count only multiply-adds of kept, valid token pairs. Search, pooling and reordering are not in the
attention rows. `--quick`: correctness and one shape. `--sweep`: times candidate tiles too.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from environment import commit_here  # noqa: E402
from kernel_cases import CASES, check_attention, check_mass, check_pool, check_tail  # noqa: E402

from dit_sparse.kernels import block_sparse_fwd as forward  # noqa: E402
from dit_sparse.kernels import dot  # noqa: E402
from dit_sparse.kernels.block_mass import block_mass  # noqa: E402
from dit_sparse.kernels.block_pool import block_pool  # noqa: E402

SHAPES = [  # name, heads, tokens, head dim
    ("wan-1.3b-aligned", 12, 32768, 128),
    ("wan-1.3b", 12, 32760, 128),
    ("cogvideox-5b", 48, 17664, 64),
    ("hunyuanvideo-720p", 24, 118784, 128),
]
DENSITIES = (1.0, 0.5, 0.2, 0.1)
BLOCKS = ((128, 128), (128, 64), (64, 64))
DENSE = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash2": SDPBackend.FLASH_ATTENTION,
}
SWEEP = [(128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)]
SWEEP += [(128, 64, 8, 2), (64, 128, 4, 2), (128, 32, 4, 3), (128, 128, 4, 2)]


def measure(call, budget_s: float = 0.25) -> dict[str, float]:
    """Median, p20 and p80 in milliseconds over as many calls as fit the budget, 3 to 30."""

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    timed()
    repeats = max(3, min(30, int(budget_s * 1000 / max(timed(), 1e-3))))
    times = torch.tensor([timed() for _ in range(repeats)])
    low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"ms": median, "ms_p20": low, "ms_p80": high, "repeats": repeats}


def random_lists(heads: int, seqlen: int, block_size: tuple[int, int], density: float):
    """Equally many random kv blocks a row, ascending; also the kept (query, key) pairs."""
    q_blocks, kv_blocks = (math.ceil(seqlen / size) for size in block_size)
    keep = max(1, round(density * kv_blocks))
    indices = torch.empty(1, heads, q_blocks, keep, dtype=torch.int16, device="cuda")
    for head in range(heads):  # one at a time bounds the memory
        order = torch.rand(q_blocks, kv_blocks, device="cuda").argsort(-1)[:, :keep]
        indices[0, head] = order.sort(-1).values
    counts = torch.full((1, heads, q_blocks), keep, dtype=torch.int32, device="cuda")
    q_len, kv_len = (
        (seqlen - size * torch.arange(n, device="cuda")).clamp(max=size)
        for n, size in ((q_blocks, block_size[0]), (kv_blocks, block_size[1]))
    )
    pairs = sum(
        int((q_len * kv_len[indices[0, head].long()].sum(-1)).sum()) for head in range(heads)
    )
    return counts, indices, pairs


def check_all() -> dict[str, dict]:
    """Every case through the path this GPU takes, and once more each head dim by pointers."""
    errors = {}
    for case in CASES:
        errors[case.name] = check_attention(case, "cuda") | check_tail(case, "cuda")
    for case in CASES[1:9:2] + CASES[15:16]:
        errors[case.name] |= check_mass(case, "cuda") | check_pool(case, "cuda")
    fast = dot.has_fast_descriptors
    dot.has_fast_descriptors = lambda device: False
    for case in CASES[1:3] + CASES[15:16]:
        errors[f"{case.name}-pointer"] = check_attention(case, "cuda") | check_tail(case, "cuda")
    dot.has_fast_descriptors = fast
    return errors


def time_shape(name: str, heads: int, seqlen: int, head_dim: int, sweep: bool) -> list[dict]:
    """All rows of one shape: dense, ours by block and density, mass and pooling."""
    shape = (1, seqlen, heads, head_dim)
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    base = {"shape": name, "heads": heads, "tokens": seqlen, "head_dim": head_dim}
    rows = []

    def add(engine: str, call, flops: float | None = None, **facts) -> dict:
        try:
            timing = measure(call)
        except (RuntimeError, triton.runtime.errors.TritonError) as error:
            timing = {"error": str(error).splitlines()[0][:200]}
        row = {**base, "engine": engine, **facts, **timing}
        if flops and "ms" in timing:
            row["tflops"] = flops / timing["ms"] / 1e9
        rows.append(row)
        return row

    dense_flops = 4 * heads * seqlen**2 * head_dim
    for engine, backend in DENSE.items():
        with sdpa_kernel(backend):
            add(engine, lambda: F.scaled_dot_product_attention(q, k, v), dense_flops, density=1.0)
    lse = None
    for block_size in BLOCKS:
        for density in DENSITIES:
            counts, indices, pairs = random_lists(heads, seqlen, block_size, density)

            def call(counts=counts, indices=indices, block_size=block_size):
                return forward.block_sparse_fwd(
                    query, key, value, counts, indices, block_size=block_size
                )

            flops = 4 * pairs * head_dim
            add("triton", call, flops, block=block_size, density=density)
            if density == 1.0 and lse is None:
                lse = call()[1]
            if sweep and density == 0.2:
                slot = dot.load_path(query, key, value), dot.padded_head_dim(head_dim)
                shipped = forward.TILES[slot]
                for tile in SWEEP:
                    if tile[0] <= block_size[0] and tile[1] <= block_size[1]:
                        forward.TILES[slot] = forward.Tile(*tile)
                        add(f"tile {tile}", call, flops, block=block_size, density=density)
                forward.TILES[slot] = shipped
        add(
            "block_mass",
            lambda lse=lse, s=block_size: block_mass(query, key, lse, block_size=s),
            dense_flops / 2,
            block=block_size,
        )
    for size in (64, 128):
        add("block_pool", lambda s=size: block_pool(query, s), block=(size, size))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--quick", action="store_true", help="correctness and one shape")
    parser.add_argument("--sweep", action="store_true", help="time candidate tiles at density 0.2")
    parser.add_argument("--commit", help="commit to record where there is no git")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernel_check needs a GPU; without one run: pytest tests/test_kernels.py")

    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    errors = check_all()
    checked = time.perf_counter() - started
    print(f"{len(errors)} cases within the rule, {checked:.0f} s", flush=True)

    rows = []
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        rows += time_shape(*shape, sweep=arguments.sweep)
        print(f"{shape[0]} done, {time.perf_counter() - started:.0f} s", flush=True)

    properties = torch.cuda.get_device_properties(0)
    record = {
        "machine": {
            "gpu": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "memory": properties.total_memory,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton.__version__,
        },
        "commit": arguments.commit or commit_here(),
        "seed": arguments.seed,
        "dtype": "bfloat16",
        "tiles": {f"{path} {dim}": tile for (path, dim), tile in forward.TILES.items()},
        "seconds": time.perf_counter() - started,
        "errors": errors,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")

    print(f"\n{properties.name}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'shape':18} {'engine':20} {'block':10} {'density':>7} {'ms':>9} {'TFLOP/s':>8}")
    for row in rows:
        block = "x".join(map(str, row["block"])) if "block" in row else ""
        result = row.get("error") or f"{row['ms']:9.3f} {row.get('tflops', 0):8.0f}"
        density = str(row.get("density", ""))
        print(f"{row['shape']:18} {row['engine']:20} {block:10} {density:>7} {result}")


if __name__ == "__main__":
    main()
