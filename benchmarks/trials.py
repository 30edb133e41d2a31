"""How near are settings to dense on the prompts that pareto.py tunes on?

    python benchmarks/trials.py --out trials.json --method auto:damping=0.5 --method adaspa
    python benchmarks/trials.py --out trials.json --methods FILE  # one in each line

For choosing what pareto.py sweeps, never for claims: those come from other prompts. Resumable:
settings that are in the file are left out.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from environment import environment  # noqa: E402
from pareto import (  # noqa: E402
    DENSE,
    TUNING_SEED,
    Runner,
    config_of,
    load_results,
    other_prompts,
    parser_of_runs,
    save,
)

from dit_sparse.method_spec import parse_method  # noqa: E402


def trial(runner, spec):
    """One record: cost, and videos against dense ones."""
    with runner.enabled(config_of(spec)) as handle:
        frames = runner.frames(runner.test)
        cost = handle.report().effective_cost
    return {"method": spec.text, "effective_cost": cost} | runner.compare(frames)


def parse(arguments=None):
    parser = parser_of_runs(__doc__, prompts=10, seeds=1)
    parser.set_defaults(prompt_seed=TUNING_SEED)
    add = parser.add_argument
    add("--method", action="append", default=[], help="and its options; repeatable")
    add("--methods", type=Path, help="file with one in each line")
    args = parser.parse_args(arguments)
    if args.methods:
        args.method += args.methods.read_text().split()
    if not args.method:
        parser.error("name a --method, or a file of --methods")
    return args


def main(arguments=None):
    args = parse(arguments)
    fixed = {k: getattr(args, k) for k in ("prompts", "seeds", "steps", "dtype")}
    result = load_results(args, fixed | other_prompts(args))
    result |= {"question": __doc__.split("\n")[0], "environment": environment(args.commit)}
    specs = [parse_method(text) for text in args.method]
    for source in args.pipeline or [ROOT / "samples/wan_tiny"]:
        runner = Runner(args, source.name, source)
        with runner.enabled(DENSE):
            runner.test.dense = runner.frames(runner.test)
        place = runner.name, runner.size
        done = {
            r["method"]
            for r in result["records"]
            if (r["pipeline"], r.get("size", runner.size)) == place  # the first ones have no size
        }
        for spec in specs:
            if spec.text in done:
                continue
            record = trial(runner, spec)
            result["records"].append(record)
            print(
                *(record[k] for k in ("pipeline", "method", "effective_cost", "psnr")), flush=True
            )
            save(args.out, result)


if __name__ == "__main__":
    main()
