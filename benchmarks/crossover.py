"""From how many tokens on is a sparse attention call faster than a dense one?

    python benchmarks/crossover.py --out benchmarks/results/crossover_h200.json

Whole calls of one layer as a pipeline makes them, (B, S, H, D) in and out: dense by torch's own
choice, and a search and a reuse of each method, host time included where the GPU waits for it.
`--fit ARCHITECTURE` writes the constants of `auto` into `dit_sparse/cost_model.json` instead.

What would mislead: random tensors, whose masks are scattered (the worst for the cache); calls in a
row hide the host's time behind the GPU's, as layers in a row do.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from environment import environment  # noqa: E402

from dit_sparse.api import make_config  # noqa: E402
from dit_sparse.cost_model import KINDS, features_of  # noqa: E402
from dit_sparse.grid import VideoGrid  # noqa: E402
from dit_sparse.state import Call, State  # noqa: E402
from dit_sparse.step import LayerAttention  # noqa: E402

MODEL = ROOT / "dit_sparse" / "cost_model.json"
GRIDS = (5, 8, 8), (5, 16, 16), (9, 16, 16), (17, 16, 16), (13, 24, 26), (13, 30, 42), (21, 30, 52)
HEADS = (12, 128), (24, 128), (30, 64)  # of Wan 1.3B, HunyuanVideo, CogVideoX-2B
METHODS = "auto", "adaspa", "adaspa-sampled"
OPTIONS = {"auto": {"dense_if_faster": False}}
STEPS, SEARCH_AT, CALLS = 50, 40, 20  # a step after every method's last search


def seconds_of(call, device, calls):
    """Of one call, median of three runs of `calls` in a row."""
    call()
    found = []
    for _ in range(3):
        wait(device)
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        found.append((time.perf_counter() - begun) / calls)
    return statistics.median(found)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def dense(query, key, value, kv_len=None):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rows_of(grid, heads, dim, methods, device, calls):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, grid.tokens, heads, dim, device=device, dtype=dtype)
    shape = {"tokens": grid.tokens, "heads": heads, "dim": dim}
    plain = seconds_of(lambda: dense(query, key, value), device, calls)
    yield {**shape, "method": "dense", "kind": "dense", "seconds": plain}
    for method in methods:
        config = make_config(method, OPTIONS.get(method, {}))[0]
        layer = LayerAttention(State(), config, 0, False)
        layer.dense = dense

        def begin(step, state=layer.state):
            state.begin(Call(grid, step, STEPS, "cond", query.device, dtype))

        def search(layer=layer):
            layer.state.kept.clear()
            layer(query, key, value)

        def reuse(layer=layer):
            layer(query, key, value)

        for step, kind, call, count in (
            (SEARCH_AT, "search", search, 3),
            (SEARCH_AT + 1, "reuse", reuse, calls),
        ):
            begin(step)
            found = seconds_of(call, device, count)
            density = float(next(iter(layer.state.kept.values())).mask.density.mean())
            row = {**shape, "method": method, "kind": kind, "density": density}
            yield row | {"tail_share": config.tail_share, "seconds": found}


def fit(rows, method):
    """Constants of `dit_sparse/cost_model.py`: least squares of relative errors, none negative."""
    constants = {}
    for kind in KINDS:
        found = [row for row in rows if row["kind"] == kind and row["method"] in (method, "dense")]
        over = []
        for row in found:
            shape = 1, row["tokens"], row["heads"], row["dim"]
            density = row.get("density", 1.0) + row.get("tail_share", 0.0)
            features = features_of(kind, shape, density)
            over.append([x / row["seconds"] for x in features])
        constants[kind] = [float(f"{x:.4g}") for x in not_negative(torch.tensor(over).double())]
    return constants


def not_negative(features):
    """The weights x >= 0 for which `features` (rows, columns) @ x is nearest to 1."""
    best = torch.zeros(features.shape[1], dtype=features.dtype)
    for chosen in product((False, True), repeat=features.shape[1]):
        chosen, weights = torch.tensor(chosen), torch.zeros_like(best)
        if chosen.any():
            size = features[:, chosen].norm(dim=0)  # columns differ by many orders
            ones = torch.ones(len(features), 1, dtype=features.dtype)
            weights[chosen] = torch.linalg.lstsq(features[:, chosen] / size, ones)[0][:, 0] / size
        if (weights >= 0).all() and distance(features, weights) < distance(features, best):
            best = weights
    return best.tolist()


def distance(features, weights):
    return (features @ weights - 1).norm()


def main(arguments=None):
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--out", type=Path, required=True)
    add("--method", action="append", help=f"again for each; default: {', '.join(METHODS)}")
    add("--grids", type=int, default=len(GRIDS), help="how many, from the smallest")
    add("--calls", type=int, default=CALLS)
    add("--commit", help="where there is no git here")
    add(
        "--fit", help="nothing is timed: fit the rows of --out for this architecture, such as sm_90"
    )
    args = parser.parse_args(arguments)
    if args.fit:
        known = json.loads(MODEL.read_text())
        known[args.fit] = fit(json.loads(args.out.read_text())["rows"], "auto")
        MODEL.write_text(json.dumps(known, indent=1) + "\n")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for heads, dim in HEADS:
        for grid in GRIDS[: args.grids]:
            methods, grid = args.method or METHODS, VideoGrid(*grid)
            for row in rows_of(grid, heads, dim, methods, device, args.calls):
                rows.append(row)
                print(*row.values())
    result = {"question": __doc__.split("\n")[0], "environment": environment(args.commit)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
