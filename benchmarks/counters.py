"""What keeps each kernel from being faster: the GPU's own counters, read by Nsight Compute.

    python benchmarks/counters.py --out benchmarks/results/counters_h200.json

One launch of each kernel at full-size shapes under `ncu`, which must be on the path and allowed to
read counters. Shares are of the peak over the kernel's time: of the tensor cores, of the unit that
computes exponentials (XU), of issued instructions, of the L2 cache and of memory; `stalls` says
how many cycles a warp waits for each instruction, and for what.
What would mislead: ncu runs a kernel several times with other caches and clocks, so `us` is no
time to publish; masks and inputs are random.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from environment import environment  # noqa: E402

SHAPES = {"wan-1.3b": (12, 32768, 128), "cogvideox-5b": (48, 17664, 64)}  # heads, tokens, head dim
DENSITY = 0.2
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats",
    "Occupancy", "LaunchStats",
)  # fmt: skip
METRICS = {
    "us": "gpu__time_duration.sum",
    "tensor": "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    "tensor_busy": "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_any": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "exponentials": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "fma": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "alu": "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active",
    "issued": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_sectors": "lts__t_sectors.sum",
    "l2_hit": "lts__t_sector_hit_rate.pct",
    "l1_to_l2": "lts__t_sectors_srcunit_tex.sum",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block",
}
STALL = "smsp__average_warps_issue_stalled_"
STALL_END = "_per_issue_active.ratio"


def cases(names: list[str]) -> Iterator[tuple[str, Callable]]:
    """Name and call of every kernel at every shape; what is not installed is left out."""
    for shape in SHAPES:
        wanted = [name for name in names if name.startswith(shape)] if names else None
        if wanted != []:
            for kernel, call in kernels_at(shape):
                if wanted is None or f"{shape} {kernel}" in wanted:
                    yield f"{shape} {kernel}", call
            torch.cuda.empty_cache()


def kernels_at(shape: str) -> Iterator[tuple[str, Callable]]:
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

        rows = block if dim == 64 or block == 64 else 128
        plain = Tile(rows, 64, 4, 3 if rows == 64 else 2)
        gluon = Tile(block, block, block // 16, 2, True)
        yield f"triton {block}", lambda f=forward, t=plain: f(t)
        yield f"gluon {block}", lambda f=forward, t=gluon: f(t)
        yield f"fp8 {block}", lambda f=forward: f(precision="fp8")
        if why_not("fa4", Problem(q.device, q.dtype, dim, blocks)) is None:
            yield f"fa4 {block}", lambda m=mask: sparse_attention(q, k, v, m, engine="fa4")
        if block == 64:
            for mean in (64, 16):
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


def launch(names: list[str]) -> None:
    """What runs under ncu: every call twice, the second between the profiler's marks.

    A spinning kernel goes before each, by which the launches of one case are told from the next's.
    """
    for name, call in cases(names):
        try:
            call()
        except Exception as error:
            print(f"left out {name}: {error}", file=sys.stderr)
            continue
        torch.cuda.synchronize()
        print(f"case {name}", flush=True)
        torch.cuda.profiler.start()
        torch.cuda._sleep(1000)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def read(output: str) -> list[dict]:
    """Records from what ncu printed: our own lines, then its table."""
    lines = output.splitlines()
    names = [line.removeprefix("case ") for line in lines if line.startswith("case ")]
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise SystemExit("ncu read no counters:\n" + "\n".join(lines[-20:]))
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[head:]))))[1:]  # a row of units first
    records, case = [], -1
    for row in rows:
        if "spin" in row["Kernel Name"]:
            case += 1
            continue
        found = {key: number(row[name]) for key, name in METRICS.items() if row.get(name)}
        stalls = {
            name.removeprefix(STALL).removesuffix(STALL_END): number(value)
            for name, value in row.items()
            if name.startswith(STALL) and name.endswith(STALL_END) and value
        }
        largest = sorted(stalls.items(), key=lambda item: -(item[1] or 0))[:5]
        records.append(
            {"case": names[case], "kernel": row["Kernel Name"].split("(")[0]}
            | found
            | {"stalls": dict(largest)}
        )
    return records


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def main() -> None:
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add("--out", type=Path)
    add("--case", action="append", default=[], help='"wan-1.3b triton 64", say; default: all')
    add("--launch", action="store_true", help="only run the kernels: what ncu is given")
    add("--commit", help="commit to record where there is no git")
    args = parser.parse_args()
    if args.launch:
        return launch(args.case)
    if not torch.cuda.is_available() or args.out is None:
        sys.exit("this needs a GPU, Nsight Compute and --out FILE")
    command = ["ncu", "--csv", "--page", "raw", "--profile-from-start", "off"]
    command += ["--clock-control", "none"]
    command += [argument for name in SECTIONS for argument in ("--section", name)]
    command += ["--metrics", ",".join(METRICS.values())]
    command += [sys.executable, __file__, "--launch"]
    command += [argument for name in args.case for argument in ("--case", name)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr[-2000:], file=sys.stderr)
    records = read(done.stdout)
    for record in records:
        print({key: value for key, value in record.items() if key != "stalls"}, flush=True)
    result = {
        "question": __doc__.splitlines()[0],
        "environment": environment(args.commit) | {"seed": 0, "density": DENSITY},
        "metrics": METRICS,
        "records": records,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
