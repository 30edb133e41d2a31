"""Times of the settings in a file of pareto.py, measured again by one process.

    python benchmarks/times.py --of benchmarks/results/pareto.json --out times.json
    python benchmarks/times.py --of benchmarks/results/pareto.json --out times.json --put-in

The least of three generations each, of the GPU: before each call of attention it waits 5 ms for the
host to issue the call. `--put-in` measures nothing, but writes the times of --out where the same
settings stand in --of. Resumable: what is in --out is left out.

What would mislead: at a few thousand tokens a real run may wait for the host, which is left out
here but for calls that take it longer, such as a search at every step; the time of attention is no
time of a whole video.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "samples")]

from environment import environment  # noqa: E402
from pareto import (  # noqa: E402
    DENSE,
    Runner,
    config_anew,
    load_results,
    other_prompts,
    parser_of_runs,
    save,
    settings_file,
)
from result_file import write_result  # noqa: E402

REPEATS = 3
SETTING = "pipeline", "size", "method", "config"


def setting(record):
    """What a time is of."""
    return json.dumps([record[name] for name in SETTING], sort_keys=True)


def seconds_of(runner, config):
    """Inside attention, of each generation; the first call, which compiles, is left out."""
    with runner.enabled(config):
        runner.generate(runner.test, "latent", num_inference_steps=8)
        return [runner.timed(runner.test)[0] for _ in range(REPEATS)]


def measure(runner, records, result, args):
    """Each record's time, saved as it is known."""
    done = {setting(record) for record in result["records"]}
    left = [record for record in records if setting(record) not in done]
    if not left:
        return
    dense, made = seconds_of(runner, DENSE), {}
    for record in left:
        config = config_anew(runner, record["method"], record["config"], made)
        seconds = seconds_of(runner, config)
        found = {name: record[name] for name in SETTING}
        found |= {"seconds": seconds, "dense_seconds": dense}
        result["records"].append(found | {"effective_time": min(seconds) / min(dense)})
        print(record["pipeline"], record["method"], min(seconds) / min(dense), flush=True)
        write_result(args.out, result)


def put_in(results, times):
    """The times where the same settings stand; how many."""
    known, changed = {setting(r): r["effective_time"] for r in times["records"]}, 0
    for record in results["records"]:
        if setting(record) in known:
            record["effective_time"] = known[setting(record)]
            changed += 1
    return changed


def parse(arguments=None):
    parser = parser_of_runs(__doc__, prompts=20, seeds=2)
    add = parser.add_argument
    add("--of", type=settings_file, required=True, help="results of pareto.py")
    add("--method", action="append", help="repeatable; default: all that are there")
    add("--put-in", action="store_true", help="write the times of --out into --of")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    fixed = {k: getattr(args, k) for k in ("prompts", "seeds", "tuning_prompts", "steps", "dtype")}
    result = load_results(args, fixed | other_prompts(args))
    of = json.loads(args.of.read_text())
    if args.put_in:
        print(f"{put_in(of, result)} times put into {args.of}")
        save(args.of, of)
        return
    result |= {"question": __doc__.split("\n")[0], "environment": environment(args.commit)}
    for source in args.pipeline or [ROOT / "samples/wan_tiny"]:
        runner = Runner(args, source.name, source)
        records = [
            record
            for record in of["records"]
            if (record["pipeline"], record["size"]) == (runner.name, runner.size)
            if args.method is None or record["method"] in args.method
        ]
        measure(runner, records, result, args)


if __name__ == "__main__":
    main()
