"""Which parts of `auto` are worth their cost?

    python benchmarks/ablation_auto.py --out benchmarks/results/ablation_auto.json

Each variant changes one part. Its density is set so that a run costs as much as `auto` as it is at
the same target, found on tuning prompts; it is scored on others, as in pareto.py. `paired` are
differences to `auto`. Resumable: a variant that is in the file is left out. A variant that costs
more at any density has no row.

What would mislead: what pareto.py names; masks keep whole blocks, so costs agree nearly;
parts may help only together.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "samples")]

from environment import environment  # noqa: E402
from pareto import (  # noqa: E402
    Runner,
    lines,
    load_results,
    other_prompts,
    parser_of_runs,
    save,
    say,
    schedule,
)

from dit_sparse import AdaSpa, Auto  # noqa: E402
from dit_sparse.config import SHARES  # noqa: E402
from dit_sparse.patterns.auto import TAIL_TOKENS, TARGETS  # noqa: E402
from dit_sparse.patterns.correct import add_residual  # noqa: E402
from dit_sparse.patterns.score import exact_mass  # noqa: E402

CLOSE, NEAR = 0.005, 0.05  # costs that need no other density; that still count as equal
LEAST_DENSITY, MOST_DENSITY = 0.01, 0.95


@dataclass(frozen=True)
class WithoutTail(Auto):
    """Nothing in place of the blocks left out; the residual makes up for all of it."""

    tail: ClassVar[bool] = False

    def corrected(self, sparse, correction, age):
        return add_residual(sparse, correction)


@dataclass(frozen=True)
class ExactMasks(Auto):
    """Mass of all rows, from the log-sum-exp of the refresh's dense attention."""

    uses_lse: ClassVar[bool] = True
    search_cost: ClassVar[float] = 0.5

    def score(self, search):
        return exact_mass(search, self.block_size, self.engine)


@dataclass(frozen=True)
class MasksOfAdaSpa(ExactMasks):
    """AdaSpa's rule, with its three levels of density over heads."""

    def find(self, search):
        options = {name: getattr(self, name) for name in AdaSpa.options() if hasattr(self, name)}
        return AdaSpa(**options).find(search)


def variants(config):
    """Name and config, from `auto` at a target."""
    options = config.to_dict()
    yield "auto", config
    yield "without tail", WithoutTail(**options)
    for tokens in TAIL_TOKENS:
        if tokens <= config.block_size and tokens != config.tail_tokens:
            yield f"means of {tokens} tokens", replace(config, tail_tokens=tokens)
    yield "without residual", replace(config, residual=None)
    yield "without both", WithoutTail(**options | {"residual": None})
    yield "exact masks", ExactMasks(**options)
    yield "masks of AdaSpa", MasksOfAdaSpa(**options)
    first, *rest = config.search_at
    yield "even searches", replace(config, search_at=schedule(first, 1 + len(rest)))
    for shares in SHARES:
        if shares != config.share_guidance:
            yield f"guidance shares {shares}", replace(config, share_guidance=shares)
    for damping in (0.0, 0.5, 1.0):
        yield f"damping {damping}", replace(config, damping=damping)
    for precision in ("int8", "fp8"):
        yield f"{precision} products", replace(config, precision=precision)
    for searches in (1, 2, 3, 6):
        yield f"{searches} searches", replace(config, search_at=schedule(first, searches, 1.5))


def at_cost(runner, config, goal):
    """The config at the density whose runs cost `goal`, or nearly; None where none does."""
    num_steps = runner.call["num_inference_steps"]
    slope = config.planned_cost(num_steps, 0.5, 1) - config.planned_cost(num_steps, 0.4, 1)
    tried = {}
    while len(tried) < 3 and config not in tried:
        missing = goal - runner.tune(config)["effective_cost"]
        tried[config] = abs(missing)
        if abs(missing) > CLOSE:
            density = config.density + missing * 0.1 / slope
            config = replace(config, density=min(max(density, LEAST_DENSITY), MOST_DENSITY))
    nearest = min(tried, key=tried.get)
    return nearest if tried[nearest] < NEAR else None


def run_target(runner, target, result, args):
    """All variants at one target, each saved as it is done."""
    auto = Auto(**TARGETS[target], dense_if_faster=False)
    place = runner.name, runner.size, [target]
    done = {r["method"] for r in result["records"] if place == place_of(r)}
    left = [(name, variant) for name, variant in variants(auto) if name not in done]
    if args.variant:
        left = [(name, variant) for name, variant in left if name in args.variant]
    if not left:
        return
    if runner.test.dense is None:
        prepare(runner, result)
    goal = runner.tune(auto)["effective_cost"]
    for name, variant in left:
        config = at_cost(runner, variant, goal)
        if config is None:
            print(f"{name} has no density that costs {goal:.2f}", flush=True)
            continue
        result["records"].append(runner.score(name, config, budgets=[target]))
        say(result["records"][-1])
        save(args.out, result)


def prepare(runner, result):
    runner.prepare()
    place = f"{runner.name} {runner.size}"
    if place not in result["lines"]:
        result["lines"][place] = lines(runner)


def place_of(record):
    return record["pipeline"], record["size"], record["budgets"]


def parse(arguments=None):
    parser = parser_of_runs(__doc__, prompts=10, seeds=1)
    add = parser.add_argument
    add("--target", action="append", choices=TARGETS, help="repeatable; default: all")
    add("--variant", action="append", help="repeatable; default: all")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    fixed = {k: getattr(args, k) for k in ("prompts", "seeds", "tuning_prompts", "steps", "dtype")}
    fixed |= other_prompts(args)
    result = load_results(args, fixed)
    result |= {"question": __doc__.split("\n")[0], "environment": environment(args.commit)}
    for source in args.pipeline or [ROOT / "samples/wan_tiny"]:
        runner = Runner(args, source.name, source)
        for target in args.target or TARGETS:
            run_target(runner, target, result, args)


if __name__ == "__main__":
    main()
