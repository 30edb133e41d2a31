"""What keeps each kernel from being faster: the GPU's own counters, read by Nsight Compute.

    python benchmarks/counters.py --out benchmarks/results/counters_h200.json

One launch of each kernel at full-size shapes under `ncu`, which must be on the path and allowed to
read counters. Percentages are of the peak over the kernel's time: of the tensor cores, of the unit
that computes exponentials (XU), of issued instructions, of the L2 cache and of memory; `stalls`
says how many cycles a warp waits for each instruction, and for what. Resumable, case by case.
What would mislead: ncu runs a kernel several times, alone and at full clocks, so `us` is no time
to publish; masks and inputs are random.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from environment import environment  # noqa: E402
from result_file import write_result  # noqa: E402

SHAPES = {  # heads, tokens, head dim
    "wan-1.3b": (12, 32768, 128),
    "cogvideox-5b": (48, 17664, 64),
    "hunyuanvideo-720p": (24, 118784, 128),
}
DENSITY = 0.2
METRICS = {
    "us": "gpu__time_duration.sum",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "exponentials": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "fma": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "alu": "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active",
    "issued": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_sectors": "lts__t_sectors.sum",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
STALL, STALL_END = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
STALLS = (
    "wait", "barrier", "long_scoreboard", "short_scoreboard", "not_selected", "math_pipe_throttle",
    "mio_throttle", "dispatch_stall", "gmma", "sleeping", "membar",
)  # fmt: skip


def kernels_at(shape: str) -> Iterator[tuple[str, Callable]]:
    """Name and call of every kernel; what is not installed is left out."""
    from masks import random_mask

    from dit_sparse import AdaSpa, sparse_attention
    from dit_sparse.block_mask import BlockMask
    from dit_sparse.engines import Problem, why_not
    from dit_sparse.kernels.block_mass import block_mass
    from dit_sparse.kernels.block_sparse_fwd import block_sparse_fwd
    from dit_sparse.kernels.sampled_mass import sampled_mass
    from dit_sparse.kernels.tiles import Tile
    from dit_sparse.tail import tail_attention

    heads, tokens, dim = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)
    size = 1, tokens, heads, dim
    q, k, v = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(3)
    )
    for block in (64, 128):
        blocks = block, block
        mask = BlockMask.from_dense(
            random_mask(heads, tokens // block, DENSITY), tokens, tokens, blocks
        )
        lists, order = mask.indices(), mask.work_order

        def forward(tile=None, precision="full", lists=lists, order=order, blocks=blocks):
            options = {"block_size": blocks, "order": order, "tile": tile, "precision": precision}
            return block_sparse_fwd(q, k, v, *lists, **options)

        plain = Tile(block, 64, 4, 3 if block == 64 else 2)
        yield f"triton {block}", lambda f=forward, t=plain: f(t)
        yield f"gluon {block}", lambda f=forward: f()
        yield f"fp8 {block}", lambda f=forward: f(precision="fp8")
        if why_not("fa4", Problem(q.device, q.dtype, dim, blocks)) is None:
            yield f"fa4 {block}", lambda m=mask: sparse_attention(q, k, v, m, engine="fa4")
        if block == 64:
            for mean in (64, 32, 16):
                yield (
                    f"tail {mean}",
                    lambda m=mask, t=mean: tail_attention(q, k, v, m, tail_tokens=t),
                )
    lse = torch.full((1, heads, tokens), 10.0, device="cuda")
    sampled = q[:, 4::8].contiguous()
    scores = torch.rand(1, heads, tokens // 64, tokens // 64, device="cuda")
    forced = torch.eye(tokens // 64, dtype=torch.bool, device="cuda")
    config = AdaSpa(density=DENSITY, block_size=64)
    yield "mass 64", lambda: block_mass(q, k, lse, block_size=(64, 64))
    yield "sampled mass 64", lambda: sampled_mass(sampled, k, 8, 64)
    yield "selection 64", lambda: config.find_packed(scores, forced, tokens, 0.5)


def launch(case: str) -> None:
    """What runs under ncu: the call twice, the second between the profiler's marks."""
    shape, _, kernel = case.partition(" ")
    call = dict(kernels_at(shape))[kernel]
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def measure(case: str) -> list[dict[str, Any]]:
    """A record for each launch of the case."""
    names = [*METRICS.values(), *(f"{STALL}{name}{STALL_END}" for name in STALLS)]
    command = ["ncu", "--csv", "--page", "raw", "--profile-from-start", "off"]
    command += ["--clock-control", "none", "--metrics", ",".join(names)]
    command += [sys.executable, __file__, "--launch", case]
    done = subprocess.run(command, capture_output=True, text=True)
    records = [{"case": case} | record for record in read(done.stdout)]
    return records or [{"case": case, "error": (done.stdout + done.stderr)[-500:]}]


def read(output: str) -> list[dict[str, Any]]:
    """Records from the table that ncu prints, whose second row holds units."""
    lines = output.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    records = []
    for row in list(csv.DictReader(lines[head:]))[1:]:
        found = {key: number(row.get(name)) for key, name in METRICS.items()}
        found["us"] = found["us"] and found["us"] / 1000  # nanoseconds
        stalls = {name: number(row.get(f"{STALL}{name}{STALL_END}")) or 0.0 for name in STALLS}
        found["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:5])
        records.append({"kernel": row["Kernel Name"].split("(")[0]} | found)
    return records


def number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def main() -> None:
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add("--out", type=Path, help="JSON file, continued where it exists")
    add("--case", action="append", help='"wan-1.3b triton 64", say; default: all')
    add("--seconds", type=float, default=1e9, help="no case begins later")
    add("--launch", metavar="CASE", help="only run a kernel: what ncu is given")
    add("--commit", help="commit to record where there is no git")
    args = parser.parse_args()
    if args.launch:
        return launch(args.launch)
    if not torch.cuda.is_available() or shutil.which("ncu") is None or args.out is None:
        sys.exit("this needs a GPU, Nsight Compute (ncu) and --out FILE")
    result = json.loads(args.out.read_text()) if args.out.is_file() else {"records": []}
    result |= {"question": __doc__.splitlines()[0], "metrics": METRICS}
    result["environment"] = environment(args.commit) | {"seed": 0, "density": DENSITY}
    done = {record["case"] for record in result["records"] if "error" not in record}
    started = time.perf_counter()
    every = [f"{shape} {kernel}" for shape in SHAPES for kernel, _ in kernels_at(shape)]
    torch.cuda.empty_cache()
    for case in args.case or every:
        if case not in done and time.perf_counter() - started < args.seconds:
            found = measure(case)
            result["records"] = [r for r in result["records"] if r["case"] != case] + found
            print(*found, sep="\n", flush=True)
            write_result(args.out, result)


if __name__ == "__main__":
    main()
