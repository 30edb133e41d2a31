"""Do the gains of a step cache of diffusers and of sparse attention multiply?

    python benchmarks/caches.py --out benchmarks/results/caches_wan_tiny.json

FirstBlockCache at several thresholds and MagCache, whose ratios are calibrated here on tuning
prompts: each alone, each method alone, and both. Effective cost is of attention; seconds are of a
whole generation without the VAE, not compiled; PSNR is against dense attention without a cache.
"product" is the product of what each has alone, beside what both have together. All prompts and
seeds are one batch, so that a cache decides for all of them.
"""

import ast
import contextlib
import io
import sys
from itertools import product
from pathlib import Path

import diffusers
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from environment import environment  # noqa: E402
from pareto import (  # noqa: E402
    DENSE,
    Runner,
    config_of,
    load_results,
    other_prompts,
    parser_of_runs,
    save,
)

from dit_sparse import enable_sparse_attention  # noqa: E402
from dit_sparse.method_spec import parse_method  # noqa: E402

THRESHOLDS = 0.05, 0.1, 0.2
METHODS = "auto", "auto:target=speed", "adaspa"


def mag_options(runner):
    """Of MagCache, its ratios by diffusers' own calibration: of the last branch that it tells."""
    steps = runner.call["num_inference_steps"]
    given, told = {"num_inference_steps": steps}, io.StringIO()
    with contextlib.redirect_stdout(told):
        with cached(runner.pipe, ("MagCache", given | {"calibrate": True})):
            runner.generate(runner.tuning, "latent")
    ratios = [line for line in told.getvalue().splitlines() if line.startswith("[")]
    return given | {"mag_ratios": ast.literal_eval(ratios[-1])}


def caches(runner, thresholds):
    """Name and options of each; first of all none."""
    yield None, {}
    for threshold in thresholds:
        yield "FirstBlockCache", {"threshold": threshold}
    yield "MagCache", mag_options(runner)


@contextlib.contextmanager
def cached(pipe, cache):
    name, options = cache
    if name is None:
        yield
        return
    pipe.transformer.enable_cache(getattr(diffusers, f"{name}Config")(**options))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def score(runner, method, config, cache):
    """One record, of the test prompts."""
    with enable_sparse_attention(runner.pipe, config) as handle, cached(runner.pipe, cache):
        frames = runner.frames(runner.test)  # and what kernels and libraries take once
        runner.generate(runner.test, "latent", alone=True)
        cost = handle.report().effective_cost
    if runner.test.dense is None:
        runner.test.dense = frames
    found = {"method": method, "cache": cache[0], "cache_options": cache[1]}
    found |= {"config": config.to_dict(), "effective_cost": cost, "seconds": runner.seconds}
    return found | runner.compare(frames)


def multiplied(records):
    """Of each pair: cost and speed of both together, and the products of what each has alone."""
    dense = records[0]
    alone = {r["method"]: r for r in records if r["cache"] is None}
    for record in records:
        only = next(
            r
            for r in records
            if r["method"] == dense["method"] and r["cache_options"] == record["cache_options"]
        )
        by_method, both = alone[record["method"]], dense["seconds"] / record["seconds"]
        yield record | {
            "speedup": both,
            "product": {
                "effective_cost": by_method["effective_cost"] * only["effective_cost"],
                "speedup": dense["seconds"] ** 2 / by_method["seconds"] / only["seconds"],
            },
        }


def parse(arguments=None):
    parser = parser_of_runs(__doc__, prompts=10, seeds=1)
    parser.add_argument("--method", action="append", help=f"repeatable; default: {METHODS}")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    fixed = {k: getattr(args, k) for k in ("prompts", "seeds", "tuning_prompts", "steps", "dtype")}
    fixed |= other_prompts(args) | {"thresholds": list(args.thresholds)}
    result = load_results(args, fixed)
    result |= {"question": __doc__.split("\n")[0], "environment": environment(args.commit)}
    specs = [parse_method(text) for text in args.method or METHODS]
    methods = {"dense": DENSE} | {s.text: config_of(s) for s in specs}
    for source in args.pipeline or [ROOT / "samples/wan_tiny"]:
        runner, records = Runner(args, source.name, source), []
        with torch.no_grad():
            of_all = list(caches(runner, args.thresholds))
            for (method, config), cache in product(methods.items(), of_all):
                records.append(score(runner, method, config, cache))
                told = {k: records[-1][k] for k in ("effective_cost", "seconds", "psnr")}
                of = cache[0], cache[1].get("threshold")
                print(source.name, method, *of, told, flush=True)
        place = runner.name, runner.size
        others = [r for r in result["records"] if (r["pipeline"], r["size"]) != place]
        result["records"] = others + list(multiplied(records))
        save(args.out, result)


if __name__ == "__main__":
    main()
