"""Is the attention of the boxed pipeline worth judging methods on?

    python benchmarks/structure.py --out benchmarks/results/structure.json

Along dense trajectories, per layer and head: softmax mass that the best 20% of blocks keep, chosen
row by row from exact mass, from pooled queries and keys, and from exact mass at an early step. If
pooled selection never missed and early masks never aged, all methods would look alike. Also draws
block maps of every layer and head.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "samples")]

from diffusers import WanPipeline  # noqa: E402
from environment import environment  # noqa: E402
from prompt_check import make_test_prompts  # noqa: E402

from dit_sparse import enable_sparse_attention  # noqa: E402
from dit_sparse.attention import block_mass  # noqa: E402
from dit_sparse.dense import dense_attention_with_lse  # noqa: E402
from dit_sparse.grid import token_order  # noqa: E402
from dit_sparse.reference import block_pool  # noqa: E402

BLOCK, DENSITY, EARLY = 64, 0.2, 0.2


def best_blocks(scores):
    """Bool mask of each row's best blocks."""
    kept = scores.topk(max(round(DENSITY * scores.shape[-1]), 1), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


class Probe:
    """Stands in for a layer's dense attention and looks at its queries and keys."""

    def __init__(self, state, layer, dense, early_step, rows, maps):
        self.state, self.layer, self.dense = state, layer, dense
        self.early_step, self.rows, self.maps = early_step, rows, maps
        self.early = {}

    def __call__(self, query, key, value, kv_len):
        call = self.state.call
        if call.step >= self.early_step and (call.step - self.early_step) % 5 == 0:
            self.look(call, query, key, value)
        return self.dense(query, key, value, kv_len)

    def look(self, call, query, key, value):
        masses = {}
        for order in ("raster", "curve"):
            index = token_order(call.grid, order, BLOCK)[0].to(query.device)
            q, k, v = query[:, index], key[:, index], value[:, index]
            _, lse = dense_attention_with_lse(q, k, v)
            mass = block_mass(q, k, lse, (BLOCK, BLOCK))
            masses[order] = mass / mass.sum(-1, keepdim=True)
        mass = masses["curve"]
        pooled = block_pool(q, BLOCK) @ block_pool(k, BLOCK).mT
        exact = best_blocks(mass)
        self.early.setdefault(call.branch, exact)
        early = self.early[call.branch]

        def kept(mask, of=mass):
            return (of * mask).sum(-1).mean(-1).mean(0).tolist()

        shared = (exact & early).sum((-1, -2)) / (exact | early).sum((-1, -2))
        self.rows.append({
            "branch": call.branch,
            "step": call.step,
            "layer": self.layer,
            "exact": kept(exact),
            "exact_raster": kept(best_blocks(masses["raster"]), masses["raster"]),
            "pooled": kept(best_blocks(pooled)),
            "early": kept(early),
            "overlap_with_early": shared.mean(0).tolist(),
        })  # fmt: skip
        if call.branch == "cond" and call.step == self.early_step + 5:
            self.maps[self.layer] = mass[0].cpu()


def summary(rows):
    """Means over steps and branches, per layer and head, and what stands out."""
    names = ("exact", "exact_raster", "pooled", "early", "overlap_with_early")
    last = max(row["step"] for row in rows)
    layers = {}
    for layer in sorted({row["layer"] for row in rows}):
        mine = [row for row in rows if row["layer"] == layer]
        late = [row for row in mine if row["step"] == last]
        layers[layer] = {
            **{name: mean_heads(mine, name) for name in names},
            "pooled_misses": difference(mine, "exact", "pooled"),
            "early_has_aged_by": difference(late, "exact", "early"),
        }
    exact = [value for layer in layers.values() for value in layer["exact"]]
    return {
        "layers": layers,
        "heads_with_45_to_90_percent": sum(0.45 <= x <= 0.9 for x in exact) / len(exact),
        "largest_pooled_miss": max(max(layer["pooled_misses"]) for layer in layers.values()),
        "largest_ageing": max(max(layer["early_has_aged_by"]) for layer in layers.values()),
        "last_step": last,
    }


def mean_heads(rows, name):
    return torch.tensor([row[name] for row in rows]).mean(0).tolist()


def difference(rows, a, b):
    return [x - y for x, y in zip(mean_heads(rows, a), mean_heads(rows, b))]


def draw_maps(maps, path):
    """Block maps, one row a layer and one column a head, square root of the mass."""
    from PIL import Image

    rows = []
    for layer in sorted(maps):
        scaled = (maps[layer] / maps[layer].amax((-1, -2), keepdim=True)).sqrt()  # (H, N, N)
        rows.append(torch.nn.functional.pad(scaled, (2, 2, 2, 2), value=1.0).unbind(0))
    picture = torch.cat([torch.cat(row, 1) for row in rows], 0)
    size = (picture.shape[1] * 2, picture.shape[0] * 2)
    image = Image.fromarray((picture * 255).byte().numpy())
    image.resize(size, Image.Resampling.NEAREST).save(path)


def main():
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--pipeline", type=Path, default=ROOT / "samples/wan_tiny")
    add("--out", type=Path, required=True)
    add("--prompts", type=int, default=8)
    add("--steps", type=int, default=25)
    add("--commit", help="where there is no git here")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = WanPipeline.from_pretrained(args.pipeline).to(device)
    call = json.loads((args.pipeline / "dit_sparse.json").read_text())["call"]
    call["num_inference_steps"] = args.steps
    handle = enable_sparse_attention(pipe, density=1.0)
    installed, rows, maps = handle._installed[0], [], {}
    for index, layer in enumerate(installed.layers):
        early = round(EARLY * args.steps)
        layer.dense = Probe(installed.state, index, layer.dense, early, rows, maps)
    prompts, _, _ = make_test_prompts(args.prompts, 23)
    pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    result = {
        "question": __doc__.split("\n")[0],
        "environment": environment(args.commit),
        "call": call,
        "prompts": prompts,
        **summary(rows),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw_maps(maps, args.out.with_suffix(".png"))
    print(json.dumps({k: v for k, v in result.items() if k not in ("layers", "prompts")}))


if __name__ == "__main__":
    main()
