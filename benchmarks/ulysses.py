"""What do two GPUs save of a HunyuanVideo 720p denoising step, dense and sparse?

    torchrun --nproc-per-node 2 benchmarks/ulysses.py --out benchmarks/results/ulysses_h200x2.json
    torchrun --nproc-per-node 2 benchmarks/ulysses.py --smoke --out x.json    # tiny, on a CPU too
    python benchmarks/ulysses.py --expect benchmarks/results/ulysses_h200x2.json    # of 4 and 8

The forwards of step.py on one GPU (each process alone, at the same time), then on both by Ulysses.
Outputs are compared first: with the same masks two GPUs must equal one within rounding. "exchange"
is the time in all-to-all and gather, the wait for the slower GPU included; a row is that of the
slower GPU. What is expected of more GPUs is a model fitted to one and two, no measurement.

What would mislead, beside what step.py says: dense attention runs through this library's hooks at
density 1, on both sides, since diffusers cannot split HunyuanVideo by itself; and two layers of
each kind stand for all, so that what happens once a step (patch embedding, the gather at its end)
is counted once. On one GPU AdaSpa's search ends in one kernel, on more in torch's operators.
`measured_peak_bytes` is torch's: what NCCL allocates for itself is not in it.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import step as step_benchmark
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from environment import environment
from regions import Times, time_functions, time_hooks_added
from step import REUSE, SEARCH, SEARCH_AGAIN, WARM_UP, Benchmark, dense_backend, our_regions

from dit_sparse import enable_sparse_attention
from dit_sparse.ulysses import Ulysses

EXCHANGE = ("to_heads", "to_tokens", "all_tokens", "all_heads")
DENSE = "dense"
# Of outputs, in units of their norm; bfloat16 rounds to 2^-9 in each of a few hundred operations.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


class OnGPUs(Benchmark):
    """The forwards of one model on one GPU, or on all that torchrun started."""

    regions = (*step_benchmark.REGIONS, "exchange")

    def __init__(self, args: argparse.Namespace, gpus: int):
        self.gpus = gpus
        self.outputs: dict[Any, torch.Tensor] = {}
        super().__init__(args)
        if gpus > 1:
            config = ContextParallelConfig(ulysses_degree=gpus)
            self.transformer.enable_parallelism(config=config, cp_plan={})

    def say(self, text: str) -> None:
        if dist.get_rank() == 0:
            super().say(f"{self.gpus} GPU{'s' * (self.gpus > 1)}: {text}")

    def write(self) -> None:
        """`main` writes both results into one file."""

    def forward(self, step: int, branch: str | None = None) -> torch.Tensor:
        output = super().forward(step, branch)
        self.outputs[self.density, step] = output
        return output

    def time_forward(self, step: int) -> tuple[Times, int]:
        """Of the process that took longest."""
        dist.barrier()
        found = super().time_forward(step)
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, found)
        return max(of_all, key=lambda one: sum(one[0].values()))

    @contextmanager
    def exchange_timed(self) -> Iterator[None]:
        with time_functions(self.clock, [(Ulysses, name, "exchange") for name in EXCHANGE]):
            yield

    def dense(self, compiled: bool) -> None:
        self.density = 1.0
        with ExitStack() as undo:
            undo.enter_context(time_functions(self.clock, our_regions()))
            with time_hooks_added(self.transformer, self.clock, "reorder"):
                handle = enable_sparse_attention(self.loop, "adaspa", density=1.0)
                undo.enter_context(handle)
            for layer in handle._installed[0].layers:
                layer.dense = self.clock.wrap(layer.dense, "attention")
            self.warm_up(WARM_UP)
            found = [self.time_forward(WARM_UP) for _ in range(self.args.repeats)]
        attention = self.result["dense_backend"]
        self.add_row(DENSE, found, compiled=False, density=1.0, attention=attention, cost=1.0)

    def run(self) -> None:
        with dense_backend(self.transformer, self.choose_backend()), self.exchange_timed():
            self.dense(False)
            self.density = self.args.densities[0]
            self.sparse(False)
        self.compose()

    def choose_backend(self) -> str:
        """The same on all: what the first process finds fastest."""
        best = [self.args.dense_backend or super().choose_backend()]
        dist.broadcast_object_list(best)
        self.result["dense_backend"] = best[0]
        return best[0]

    def free(self) -> None:
        """Leave the GPU to the next model; what was found stays."""
        self.transformer = self.loop = self.attentions = self.inputs = self.state = None
        gc.collect()


def differences(one: OnGPUs, more: OnGPUs) -> dict[str, float]:
    """Of outputs at equal masks, in units of the norm."""
    found = {}
    density = one.args.densities[0]
    for kind, place in {
        DENSE: (1.0, WARM_UP),
        "search": (density, SEARCH),
        "reuse": (density, REUSE),
        "search again": (density, SEARCH_AGAIN),
    }.items():
        alone, together = (run.outputs[place].float() for run in (one, more))
        found[kind] = float((together - alone).norm() / alone.norm())
    return found


def predicted_row(one: dict, two: dict, gpus: int) -> dict[str, float]:
    """Seconds of a forward on so many GPUs, by region, from those on one and on two.

    A region takes a + b / N seconds, both at least 0. The exchange sends (N - 1) / N of what a GPU
    holds, which is 1 / N of all, at the same rate whatever N is (NVLink switches, one host).
    """
    found = {}
    for region in (name for name in two if name.endswith("_s") and name not in SKIPPED):
        shared = min(max(2 * (one[region] - two[region]), 0.0), one[region])
        found[region] = one[region] - shared + shared / gpus
    found["exchange_s"] = two["exchange_s"] * (gpus - 1) / gpus**2 * 4
    return found


SKIPPED = ("unpack_s", "exchange_s")  # unpacking is in the selection, too


def expected(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of 50 steps on one and two GPUs, measured, and on four and eight, by the model."""
    measured = [{row["kind"]: row for row in result[f"on_{gpus}"]["rows"]} for gpus in (1, 2)]

    def seconds(steps: dict[str, int], gpus: int) -> float:
        if gpus <= 2:
            return sum(n * measured[gpus - 1][kind]["seconds"] for kind, n in steps.items())
        pairs = {kind: [rows[kind] for rows in measured] for kind in steps}
        of_one = {kind: sum(predicted_row(*pair, gpus).values()) for kind, pair in pairs.items()}
        return sum(n * of_one[kind] for kind, n in steps.items())

    counts = (1, 2, 4, 8)
    dense = {DENSE: step_benchmark.STEPS}
    found = [{"what": DENSE, "cost": 1.0, "seconds": {n: seconds(dense, n) for n in counts}}]
    for schedule in result["schedules"]:
        what = f"density {schedule['density']:g}, search at {schedule['search_at']}"
        of = {gpus: seconds(schedule["steps"], gpus) for gpus in counts}
        found.append({"what": what, "cost": schedule["effective_cost"], "seconds": of})
    return found


def show_expected(path: Path) -> None:
    """A table of a result file, for a page: seconds, and times as fast as dense on one GPU."""
    result = json.loads(path.read_text())
    if result["gpus"] != 2:
        sys.exit(f"the model is fitted to one and two GPUs; {path} is of {result['gpus']}")
    print("| 50 steps, seconds | cost | 1 GPU | 2 GPUs | 4, expected | 8, expected |")
    print("|---|---|---|---|---|---|")
    rows = expected(result)
    of_dense = rows[0]["seconds"][1]
    for row in rows:
        cells = [f"{s:.4g} ({of_dense / s:.2f}x)" for s in row["seconds"].values()]
        print(f"| {row['what']} | {row['cost']:.2f} |", " | ".join(cells), "|")


def summary(one: OnGPUs, more: OnGPUs) -> dict[str, Any]:
    rows = one.result["rows"], more.result["rows"]
    kinds = {
        alone["kind"]: {
            "seconds": alone["seconds"],
            f"seconds_on_{more.gpus}": together["seconds"],
            "speedup": alone["seconds"] / together["seconds"],
            "exchange_share": together["exchange_s"] / together["seconds"],
        }
        for alone, together in zip(*rows, strict=True)
    }
    schedules = []
    for alone, together in zip(one.result["schedules"], more.result["schedules"], strict=True):
        found = {name: alone[name] for name in ("density", "search_at", "effective_cost", "steps")}
        times = ("seconds_50", "dense_seconds_50")
        found |= {name: {1: alone[name], more.gpus: together[name]} for name in times}
        found["speedup_by_gpus"] = alone["seconds_50"] / together["seconds_50"]
        found["speedup_over_dense"] = {1: alone["speedup"], more.gpus: together["speedup"]}
        schedules.append(found)
    return {"kinds": kinds, "schedules": schedules}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="result file")
    add("--expect", type=Path, metavar="FILE", help="only print what a result file lets expect")
    add("--commit", help="commit to record where there is no git")
    add("--density", default="0.2")
    add("--layers", nargs=2, default=["2", "2"], help="layers built of each list of blocks")
    add("--repeats", default="2")
    add("--smoke", action="store_true", help="tiny shapes, to try the script, without GPUs too")
    args = parser.parse_args(argv)
    if args.expect:
        show_expected(args.expect)
        return
    if not args.out:
        parser.error("name the result file with --out")
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("no GPU here: try the script with --smoke")
    started_here = start()
    options = ["--model", "hunyuanvideo-720p", "--out", str(args.out), "--modes", "eager"]
    options += ["--densities", args.density, "--layers", *args.layers, "--repeats", args.repeats]
    options += ["--tiny", "--block-size", "32"] if args.smoke else []
    given = step_benchmark.options().parse_args(options)
    one = OnGPUs(given, 1)
    one.run()
    one.free()
    given.dense_backend = one.result["dense_backend"]
    more = OnGPUs(given, dist.get_world_size())
    more.run()
    result: dict[str, Any] = {"question": (__doc__ or "").split("\n")[0]}
    result |= {"environment": environment(args.commit), "gpus": more.gpus}
    result["difference_to_one_gpu"] = differences(one, more)
    result |= summary(one, more)
    for run in (one, more):
        result[f"on_{run.gpus}"] = {k: v for k, v in run.result.items() if k not in result}
    if more.gpus == 2:
        result["expected"] = expected(result)
    if dist.get_rank() == 0:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: result[k] for k in ("difference_to_one_gpu", "kinds", "schedules")}))
    if started_here:
        dist.destroy_process_group()
    off = {
        k: d for k, d in result["difference_to_one_gpu"].items() if not d <= TOLERANCE[one.dtype]
    }
    if off:
        sys.exit(f"the output of {more.gpus} GPUs is not that of one: {off}")


def start() -> bool:
    """Join the other processes, unless that is done; True if it was done here."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        sys.exit("start this with torchrun --nproc-per-node 2, or more")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    if dist.is_initialized():
        return False
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return True


if __name__ == "__main__":
    main()
