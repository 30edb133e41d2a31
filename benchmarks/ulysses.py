"""What do two GPUs save of a HunyuanVideo 720p denoising step, dense and sparse?

    torchrun --nproc-per-node 2 benchmarks/ulysses.py --out benchmarks/results/ulysses_h100x2.json
    torchrun --nproc-per-node 2 benchmarks/ulysses.py --smoke --out x.json    # tiny, on the CPU

The forwards of step.py on one GPU (each process alone, at the same time), then on both by Ulysses.
Outputs are compared first: with the same masks two GPUs must equal one within rounding. "exchange"
is the time in all-to-all and gather, the wait for the slower GPU included; a row is that of the
slower GPU. `predicted` is a model fitted to one and two GPUs, no measurement.

What would mislead, beside what step.py says: dense attention runs through this library's hooks at
density 1, on both sides, since diffusers cannot split HunyuanVideo by itself; and two layers of
each kind stand for all, so that what happens once a step (patch embedding, the gather at its end)
is counted once.
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


def differences(one: OnGPUs, more: OnGPUs) -> dict[str, float]:
    """Of outputs at equal masks, in units of the norm; an error where it is more than rounding."""
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
        if not found[kind] <= TOLERANCE[one.dtype]:
            sys.exit(f"{kind}: the output of {more.gpus} GPUs is off by {found[kind]:.3g}")
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


def predicted_seconds(one: list[dict], two: list[dict], steps: dict[str, int], gpus: int) -> float:
    """Of a run of so many `steps` of each kind."""
    rows = {row["kind"]: (row, other) for row, other in zip(one, two, strict=True)}
    return sum(
        number * sum(predicted_row(*rows[kind], gpus).values()) for kind, number in steps.items()
    )


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
        if more.gpus == 2:
            found["predicted_seconds_50"] = {
                gpus: predicted_seconds(*rows, alone["steps"], gpus) for gpus in (4, 8)
            }
            found["predicted_dense_seconds_50"] = {
                gpus: predicted_seconds(*rows, {DENSE: step_benchmark.STEPS}, gpus)
                for gpus in (4, 8)
            }
        schedules.append(found)
    return {"kinds": kinds, "schedules": schedules}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--commit", help="commit to record where there is no git")
    add("--density", default="0.2")
    add("--layers", nargs=2, default=["2", "2"], help="layers built of each list of blocks")
    add("--repeats", default="2")
    add("--smoke", action="store_true", help="tiny shapes, to try the script without GPUs")
    args = parser.parse_args(argv)
    started_here = start(args.smoke)
    options = ["--model", "hunyuanvideo-720p", "--out", str(args.out), "--modes", "eager"]
    options += ["--densities", args.density, "--layers", *args.layers, "--repeats", args.repeats]
    options += ["--tiny", "--block-size", "32"] if args.smoke else []
    given = step_benchmark.options().parse_args(options)
    one = OnGPUs(given, 1)
    one.run()
    one.transformer = None
    gc.collect()
    given.dense_backend = one.result["dense_backend"]
    more = OnGPUs(given, dist.get_world_size())
    more.run()
    result: dict[str, Any] = {"question": (__doc__ or "").split("\n")[0]}
    result |= {"environment": environment(args.commit), "gpus": more.gpus}
    result["difference_to_one_gpu"] = differences(one, more)
    result |= summary(one, more)
    for run in (one, more):
        result[f"on_{run.gpus}"] = {k: v for k, v in run.result.items() if k not in result}
    if dist.get_rank() == 0:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: result[k] for k in ("difference_to_one_gpu", "kinds", "schedules")}))
    if started_here:
        dist.destroy_process_group()


def start(on_cpu: bool) -> bool:
    """Join the other processes, unless that is done; True if it was done here."""
    if on_cpu:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if dist.is_initialized():
        return False
    dist.init_process_group("gloo" if on_cpu else "nccl")
    return True


if __name__ == "__main__":
    main()
