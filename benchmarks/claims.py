"""Do the claims of the seed papers hold on the small pipelines?

    python benchmarks/claims.py --out benchmarks/results/claims_wan_tiny.json

- `reuse` (AdaSpa): does a mask found at a few steps serve the others? Searches at 1, 2, 4 steps and
  at every one, the same density and warm-up.
- `rows` (AdaSpa against DraftAttention): the best blocks of every row, or of a head's whole map?
- `residual` (Re-ttention): a window with nothing, with rho, with a residual, with both.
- `table` (Sparse-vDiT): modes searched on other prompts, and on the very prompts that are judged.

Each row is scored against dense; `paired` are differences within a claim, prompts resampled.

What would mislead: one small model on drawn videos; rows of a claim differ in effective cost where
they search more, which stands beside them.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "samples")]

from environment import environment  # noqa: E402
from pareto import schedule  # noqa: E402
from prompt_check import make_test_prompts  # noqa: E402
from quality import Runner, interval  # noqa: E402

from dit_sparse import AdaSpa, Rettention, SparseVDiT  # noqa: E402
from dit_sparse.calibrate import ModeSearch, calibrate  # noqa: E402
from dit_sparse.patterns.correct import add_residual, measure_residual, per_row  # noqa: E402
from dit_sparse.patterns.select import blocks_of, top_k_map  # noqa: E402

WARM_UP, DENSITY = 0.2, 0.2
OTHER_PROMPTS = 31  # seed


@dataclass(frozen=True)
class OfTheMap(AdaSpa):
    """The best blocks of a head's whole map; every row keeps one."""

    def find(self, search):
        mass, cost = self.score(search)  # what AdaSpa packs on a GPU are the best of every row
        return self.find_in_torch(mass, self.forced(search), cost)

    def _select(self, mass, density, forced):
        kept = blocks_of(density, mass.shape[-1] ** 2)
        return top_k_map(mass, kept, forced, row_floor=1)


@dataclass(frozen=True)
class RhoAlone(Rettention):
    def corrected(self, sparse, correction, age):
        return (per_row(correction.rho) * sparse.float()).to(sparse.dtype)


@dataclass(frozen=True)
class ResidualAlone(Rettention):
    """What the window lacks, added."""

    def correction(self, dense, dense_lse, sparse, sparse_lse):
        return measure_residual(dense, sparse)

    def corrected(self, sparse, correction, age):
        return add_residual(sparse, correction)


@dataclass(frozen=True)
class Nothing(Rettention):
    """The same dense steps, and the window as it is."""

    def corrected(self, sparse, correction, age):
        return sparse


def reuse(runner):
    for searches in (1, 2, 4):
        yield f"{searches} searches", AdaSpa(density=DENSITY, search_at=schedule(WARM_UP, searches))
    yield "every step", AdaSpa(density=DENSITY, search_at=(WARM_UP,), every_step=True)


def rows(runner):
    for cls, name in ((AdaSpa, "of every row"), (OfTheMap, "of the map")):
        yield name, cls(density=DENSITY, head_adaptive=False)


def residual(runner):
    shared = {"density": DENSITY, "search_at": schedule(WARM_UP, 4)}
    yield "nothing", Nothing(**shared)
    yield "rho", RhoAlone(**shared)
    yield "residual", ResidualAlone(**shared)
    yield "rho and residual, as published", Rettention(clamp=False, **shared)
    yield "rho and residual, clamped", Rettention(**shared)
    yield "rho and residual of 64 tokens", Rettention(pool=64, **shared)


def table(runner):
    prompts, _, _ = make_test_prompts(runner.args.prompts, OTHER_PROMPTS)
    for name, of in (("other prompts", prompts), ("the same prompts", runner.prompts)):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "modes.json"
            found = calibrate(runner.pipe, latents_of(runner, of), ModeSearch(DENSITY), len(of))
            found.save(path)
            yield name, SparseVDiT(density=DENSITY, search_at=(WARM_UP,), table=str(path))


def latents_of(runner, prompts):
    def run():
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        runner.pipe(prompts, generator=generators, output_type="latent", **runner.call)

    return run


CLAIMS = {"reuse": reuse, "rows": rows, "residual": residual, "table": table}


def paired(found, seeds):
    """Differences of each row to the claim's first one."""
    first, *others = found
    return {
        f"{row['name']} minus {first['name']}": interval(
            "psnr", [a - b for a, b in zip(row["psnr_per_clip"], first["psnr_per_clip"])], seeds
        )
        for row in others
    }


def main(arguments=None):
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--pipeline", type=Path, default=ROOT / "samples/wan_tiny")
    add("--out", type=Path, required=True)
    add("--claim", action="append", choices=CLAIMS, help="again for each; all without it")
    add("--prompts", type=int, default=20)
    add("--seeds", type=int, default=2)
    add("--steps", type=int, help="default: what the pipeline's dit_sparse.json says")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    add("--commit", help="where there is no git here")
    args = parser.parse_args(arguments)
    args.measure = args.warm = False
    runner = Runner(args)
    claims = {}
    for name in args.claim or CLAIMS:
        print(name)
        found = [runner.sparse(row, config) for row, config in CLAIMS[name](runner)]
        claims[name] = {"paired": paired(found, args.seeds), "rows": found}
        for row in found:
            del row["seconds"]  # kernels compile in it
    result = {
        "question": __doc__.split("\n")[0],
        "environment": environment(args.commit) | {"dtype": args.dtype},
        "pipeline": args.pipeline.name,
        "call": runner.call,
        "prompts": runner.prompts[:: args.seeds],
        "seeds": list(range(args.seeds)),
        "claims": claims,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(json.dumps({name: claim["paired"] for name, claim in claims.items()}))


if __name__ == "__main__":
    main()
