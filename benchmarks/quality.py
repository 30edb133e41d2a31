"""How near to dense is a method's video, at what cost? Token orders, block sizes, and the floors.

    python benchmarks/quality.py --part main --out benchmarks/results/quality.json
    python benchmarks/quality.py --part ablation --out benchmarks/results/ablation.json

`main`: AdaSpa in its defaults against a random mask and a 3-D window of the same measured cost,
warm-up and forced blocks, with the noise floor (two dense kernels) and chance (another seed).
`ablation`: token orders x block sizes at equal density, and at equal time of the sparse kernel on
this GPU at the shape of Wan 1.3B 480p.

With `accelerate launch --multi_gpu --num_processes N` before it the processes share the prompts;
`seconds` are then of the slowest one, for its own prompts, and a random mask is that of a clip's
place among them.

What would mislead: one small model on drawn videos; PSNR is dominated by the first steps, which are
dense in all rows; intervals are over prompts, not over models.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "samples")]

from boxed import open_boxed, two_dense_runs  # noqa: E402
from environment import environment  # noqa: E402
from prompt_check import make_test_prompts  # noqa: E402

from dit_sparse import (  # noqa: E402
    AdaSpa,
    BlockMask,
    RandomBlocks,
    Window,
    enable_sparse_attention,
    sparse_attention,
)
from dit_sparse.config import BLOCK_SIZES  # noqa: E402
from dit_sparse.grid import TOKEN_ORDERS  # noqa: E402
from dit_sparse.metrics import compare_clips  # noqa: E402
from dit_sparse.processes import Processes  # noqa: E402

WAN_1_3B = (12, 32760, 128)  # heads, tokens, head dim
RESAMPLES = 10_000
PROMPT_SEED = 11  # not the prompts of the prompt check


class Runner:
    """Generates all clips of a configuration in one batch and scores them against dense."""

    def __init__(self, args, processes=None):
        self.args, self.processes = args, processes or Processes()
        self.pipe, arguments = open_boxed(args.pipeline, args.dtype)
        self.call = arguments.override(num_inference_steps=args.steps).call
        self.all_prompts, _, _ = make_test_prompts(args.prompts, PROMPT_SEED)
        if args.prompts < self.processes.count:
            raise SystemExit(f"more processes than the {args.prompts} prompts: start fewer")
        prompts = self.processes.part(self.all_prompts)
        self.prompts = [prompt for prompt in prompts for _ in range(args.seeds)]
        self.seeds = [index for _ in prompts for index in range(args.seeds)]
        self.rows = []
        self.generate()  # kernels compile here, not in the seconds of a row
        self.dense, self.dense_seconds = self.generate()

    def generate(self, seed_offset=0):
        """Frames (N, T, H, W, 3) in [0, 1], and seconds."""
        generators = [torch.Generator().manual_seed(seed + seed_offset) for seed in self.seeds]
        start = time.perf_counter()
        frames = self.pipe(
            self.prompts, generator=generators, output_type="pt", **self.call
        ).frames  # (N, T, 3, H, W)
        if frames.is_cuda:
            torch.cuda.synchronize()
        return frames.permute(0, 1, 3, 4, 2).float(), time.perf_counter() - start

    def score(self, name, frames, seconds, **facts):
        metrics = [compare_clips(a, b) for a, b in zip(self.dense, frames)]
        metrics = self.processes.of_all(metrics)
        psnr = [100.0 if m.identical else m.psnr for m in metrics]
        row = {
            "name": name,
            **interval("psnr", psnr, self.args.seeds),
            "ssim": sum(m.ssim for m in metrics) / len(metrics),
            "seconds": max(self.processes.of_all([seconds])),
            **facts,
            "psnr_per_clip": psnr,
        }
        self.rows.append(row)
        if self.processes.first:
            print({k: v for k, v in row.items() if k != "psnr_per_clip"}, flush=True)
        return row

    def mean(self, figure):
        """Of all clips, where `figure` is the mean of this process' own; None where it is."""
        if figure is None:
            return None
        figures = self.processes.of_all([figure] * len(self.prompts))
        return sum(figures) / len(figures)

    def of_first(self, figures):
        """What the first process found, for all to go on with the same."""
        return self.processes.of_all([figures])[0]

    def sparse(self, name, config):
        with enable_sparse_attention(self.pipe, config, measure=self.args.measure) as handle:
            self.generate() if self.args.warm else None
            frames, seconds = self.generate()
            report = handle.report()
        return self.score(
            name,
            frames,
            seconds,
            config={"method": report.method, **report.config},
            density=self.mean(report.density),
            effective_cost=self.mean(report.effective_cost),
            kept_mass=self.mean(report.kept_mass),
        )


def interval(name, values, seeds):
    """Mean over clips and its 95% interval, by resampling prompts: their seeds hang together.

    Args:
        values: one per clip, the seeds of a prompt side by side.
    """
    means = torch.tensor(values, dtype=torch.float64).view(-1, seeds).mean(1)  # (prompts,)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(means), (RESAMPLES, len(means)), generator=generator)
    bounds = means[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {name: means.mean().item(), f"{name}_ci95": bounds.tolist()}


def at_cost(runner, name, config, cost):
    """The config at the density whose measured cost is `cost`; two corrections suffice."""
    config = type(config)(**{**config.to_dict(), "density": min(cost, 1.0)})
    for _ in range(3):
        with enable_sparse_attention(runner.pipe, config, measure=False) as handle:
            runner.pipe(runner.prompts[0], output_type="latent", **runner.call)
            measured = handle.report()
        figures = measured.effective_cost, 1 - sparse_share(measured)
        of_config, of_dense = runner.of_first(figures)
        wanted = config.density * (cost - of_dense) / max(of_config - of_dense, 1e-6)
        config = type(config)(**{**config.to_dict(), "density": min(max(wanted, 0.01), 0.999)})
    return runner.sparse(name, config)


def sparse_share(report):
    """Share of the attention calls that read a mask."""
    sparse = sum(entry["density"] is not None for entry in report.trace)
    return sparse / len(report.trace)


def main_part(runner):
    if torch.cuda.is_available():
        dense = runner.dense
        (runner.dense, _), (frames, seconds) = two_dense_runs(runner.generate)
        runner.score("noise floor: dense by another kernel", frames, seconds)
        runner.dense = dense
    frames, seconds = runner.generate(seed_offset=1000)
    runner.score("chance: another seed", frames, seconds)
    adaspa = runner.sparse("adaspa", AdaSpa())
    paired = {}
    for name, config in {"random": RandomBlocks(), "window": Window()}.items():
        row = at_cost(runner, name, config, adaspa["effective_cost"])
        pairs = zip(adaspa["psnr_per_clip"], row["psnr_per_clip"])
        paired[f"adaspa minus {name}"] = interval(
            "psnr", [a - b for a, b in pairs], runner.args.seeds
        )
    for density in (0.1, 0.3):
        runner.sparse(f"adaspa {density}", AdaSpa(density=density))
    return {"paired": paired}


def ablation_part(runner):
    times = (
        {size: kernel_ms(size, 0.2) for size in BLOCK_SIZES} if torch.cuda.is_available() else {}
    )
    times = runner.of_first(times)
    for order in TOKEN_ORDERS:
        for size in BLOCK_SIZES:
            runner.sparse(f"{order} {size}", AdaSpa(order=order, block_size=size))
    for order in TOKEN_ORDERS:
        for size in BLOCK_SIZES:
            if times and size != 64:
                density = runner.of_first(equal_time_density(size, times[64]))
                config = AdaSpa(order=order, block_size=size, density=density)
                runner.sparse(f"{order} {size}, time of 64", config)
    return {"kernel_ms_at_density_0.2": times}


def kernel_ms(block_size, density):
    """Median milliseconds of one sparse call at the shape of Wan 1.3B, random mask."""
    heads, length, dim = WAN_1_3B
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = torch.randn(
        3, 1, length, heads, dim, device="cuda", dtype=torch.bfloat16, generator=generator
    )
    blocks = -(-length // block_size)
    best = torch.rand(1, heads, blocks, blocks, device="cuda", generator=generator)
    best = best.topk(max(round(density * blocks), 1), -1).indices
    mask = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool, device="cuda")
    packed = BlockMask.from_dense(mask.scatter_(-1, best, True), length, length, (block_size,) * 2)
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        sparse_attention(query, key, value, packed)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def equal_time_density(block_size, milliseconds):
    """Density at which blocks of this size take so long, by two measured points."""
    low, high = kernel_ms(block_size, 0.1), kernel_ms(block_size, 0.3)
    return min(max(0.1 + 0.2 * (milliseconds - low) / (high - low), 0.02), 0.6)


def main(arguments=None):
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--part", choices=("main", "ablation"), default="main")
    add("--pipeline", type=Path, default=ROOT / "samples/wan_tiny")
    add("--out", type=Path, required=True)
    add("--prompts", type=int, default=20)
    add("--seeds", type=int, default=2)
    add("--steps", type=int, help="default: what the pipeline's dit_sparse.json says")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    add("--measure", action="store_true", help="sample the kept mass at every sparse step")
    add("--warm", action="store_true", help="run each row twice, so that seconds hold no compiling")
    add("--commit", help="where there is no git here")
    args = parser.parse_args(arguments)
    runner = Runner(args, Processes.joined("cuda" if torch.cuda.is_available() else "cpu")[0])
    extra = {"main": main_part, "ablation": ablation_part}[args.part](runner)
    result = {
        "question": __doc__.split("\n")[0],
        "environment": environment(args.commit) | {"dtype": args.dtype},
        "call": runner.call,
        "prompts": runner.all_prompts,
        "seeds": list(range(args.seeds)),
        "dense_seconds": runner.dense_seconds,
        **extra,
        "rows": runner.rows,
    }
    runner.processes.end()
    if not runner.processes.first:
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(extra))


if __name__ == "__main__":
    main()
