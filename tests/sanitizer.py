"""The kernels under compute-sanitizer: a small case of each; the tool's last line goes into a log.

python tests/sanitizer.py benchmarks/results/gpu_tests_h200.json
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_log import ROOT, begin_run, read_log
from result_file import write_result

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
# Each tensor an allocation of its own: a read past its end is not one of its neighbour.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def small_cases(device: str) -> Iterator[tuple[str, Callable]]:
    """One call for each kernel, blocks and tiles cut short at the end."""
    from kernel_cases import Case, draw, gluon_tile, to_lists

    from dit_sparse import BlockMask
    from dit_sparse.kernels.block_lists import block_lists
    from dit_sparse.kernels.block_mass import block_mass
    from dit_sparse.kernels.block_pool import block_pool, pool_keys_values
    from dit_sparse.kernels.block_sparse_fwd import block_sparse_fwd
    from dit_sparse.kernels.sampled_mass import sampled_mass
    from dit_sparse.kernels.select_rows import select_rows, work_order
    from dit_sparse.kernels.tail_fwd import tail_fwd
    from dit_sparse.kernels.tiles import Tile, gluon_runs
    from dit_sparse.kernels.top_k import top_k

    size = (64, 64)
    for head_dim in (64, 128):
        case = Case("", head_dim=head_dim)
        query, key, value, blocks, _ = draw(case, device)
        forward = partial(block_sparse_fwd, query, key, value, *to_lists(blocks), block_size=size)
        yield f"forward {head_dim}", partial(forward, tile=Tile(64, 64, 4, 3))
        if device == "cuda" and gluon_runs(query.device):
            yield f"Gluon forward {head_dim}", partial(forward, tile=gluon_tile(case))
    for precision in ("int8", "fp8"):  # quantise first
        yield f"forward {precision}", partial(forward, precision=precision)
    lse = torch.zeros(1, 2, 140, device=device)
    yield "block mass", partial(block_mass, query, key, lse, block_size=size)
    yield "sampled mass", partial(sampled_mass, query[:, ::8].contiguous(), key, 8, 64)
    yield "pool", partial(block_pool, query, 64)
    bits = BlockMask.from_dense(blocks, 140, 140, size).bits
    for tokens, name in ((64, "tail"), (16, "tail of means of 16")):
        means = [x.transpose(1, 2) for x in pool_keys_values(key, value, tokens)]
        options = {"block_size": size, "max_kv_len": 140, "tail_tokens": tokens}
        yield name, partial(tail_fwd, query, *means, bits, **options)
    scores = torch.rand(1, 2, 19, 19).to(device)
    kept = torch.full((1, 2), 5, dtype=torch.int32, device=device)
    forced = torch.eye(19, dtype=torch.bool).to(device)
    yield "top k", partial(top_k, scores, kept, forced)
    budgets = 4, 5, 6, 0.8
    yield "select rows", partial(select_rows, scores, kept, forced, (1170, 1170), 64, budgets)
    yield "work order", partial(work_order, blocks.sum(-1, dtype=torch.int32))
    yield "block lists", partial(block_lists, bits, 3, 3)


def run_cases() -> None:
    for name, call in small_cases(DEVICE):
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"ran: {name}", flush=True)


def run_sanitizer(tool: str, timeout: float) -> dict:
    """What ran, and the last line of the tool, "no end" where it took longer than `timeout`."""
    cases = [sys.executable, __file__, "--cases"]
    environment = os.environ | ENVIRONMENT
    subprocess.run(cases, env=environment, check=True, capture_output=True)  # compiles
    command = [tool, "--tool", "memcheck", "--target-processes", "application-only", *cases]
    start, failed = time.monotonic(), ""
    try:
        done = subprocess.run(
            command,
            env=environment,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output = done.stdout.decode()
        failed = f", exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode() + f"\n========= no end in {timeout:.0f} s"
    print(output)
    lines = output.splitlines()
    told = [line.strip("= ") for line in lines if line.startswith("=====")]
    return {
        "tool": "compute-sanitizer --tool memcheck",
        "seconds": round(time.monotonic() - start, 1),
        "ran": [line.removeprefix("ran: ") for line in lines if line.startswith("ran: ")],
        "last_line": (told[-1] if told else "no line of the tool") + failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, nargs="?")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--seconds", type=float, default=200, help="limit of the watched run")
    parser.add_argument("--cases", action="store_true", help="run the cases unwatched")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.cases:
        return run_cases()
    if given.log is None:
        raise SystemExit("name the log, such as benchmarks/results/gpu_tests_h200.json")
    tool = shutil.which("compute-sanitizer") or shutil.which(CUDA / "bin" / "compute-sanitizer")
    if tool is None:
        raise SystemExit("compute-sanitizer is not here; it comes with CUDA's compiler")
    found = run_sanitizer(tool, given.seconds)
    log = read_log(given.log)
    begin_run(log, given.commit)["seconds"] = found["seconds"]
    log["sanitizer"] = {"run": len(log["runs"]) - 1, **found}
    write_result(given.log, log)
    if found["last_line"] != "ERROR SUMMARY: 0 errors":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
