"""Is the attention of a boxed pipeline worth judging methods on?

    python benchmarks/structure.py --pipeline samples/wan_tiny --out benchmarks/results/x.json
    python benchmarks/structure.py --pipeline samples/wan_tiny --size 256 --frames 33 --out x.json

Along dense trajectories, per layer and head, among the video's own keys: softmax mass that the best
blocks of each row keep, over density; how much less the same number of blocks keeps when chosen
from pooled queries and keys (along the curve, and in raster order), from 16 of 64 query rows, by
nearness in space and time, or from an early step (where a density is named, at the last step); and
how much the masks of prompts, heads and layers have in common. If pooled selection never missed and
early masks never aged, all methods would look alike. Also draws block maps of every layer and head,
and the curves where matplotlib is installed.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "samples")]

from diffusers import DiffusionPipeline  # noqa: E402
from environment import environment  # noqa: E402
from figures import save_figure  # noqa: E402
from prompt_check import make_test_prompts  # noqa: E402

from dit_sparse.attention import block_mass  # noqa: E402
from dit_sparse.dense import dense_attention_with_lse  # noqa: E402
from dit_sparse.grid import VideoGrid, token_order  # noqa: E402
from dit_sparse.patterns.score import nearness  # noqa: E402
from dit_sparse.probe import run_with_probes  # noqa: E402
from dit_sparse.reference import block_pool  # noqa: E402

BLOCK, DENSITY, EARLY, EVERY = 64, 0.2, 0.2, 5
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
SAMPLED = 16  # query rows of each block
CHOICES = ("pooled", "sampled", "window", "early")


def best_blocks(scores, density=DENSITY):
    """Bool mask of each row's best blocks."""
    kept = scores.topk(max(round(density * scores.shape[-1]), 1), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def kept(mass, mask):
    """Share of the mass inside the mask, one number a head."""
    return (mass * mask).sum(-1).mean(-1).mean(0).tolist()


def kept_by(scores, mass):
    """Share of the mass that the blocks with the best scores keep, at every density."""
    return {density: kept(mass, best_blocks(scores, density)) for density in DENSITIES}


def jaccard(a, b):
    """Of masks (..., N, N), mean over what leads."""
    return ((a & b).sum((-1, -2)) / (a | b).sum((-1, -2))).mean().item()


def normal(mass):
    return mass / mass.sum(-1, keepdim=True)


def pooled_scores(query, key):
    return block_pool(query, BLOCK) @ block_pool(key, BLOCK).mT


def sampled_mass(query, key, lse):
    """Block mass by every fourth query row alone."""
    stride = BLOCK // SAMPLED
    rows = query[:, ::stride].contiguous(), key, lse[..., ::stride].contiguous()
    return block_mass(*rows, (SAMPLED, BLOCK), engine="torch")


class Probe:
    """Stands in for a layer's dense attention and looks at its queries and keys."""

    def __init__(self, state, layer, dense, steps, found):
        self.state, self.layer, self.dense, self.found = state, layer, dense, found
        self.early_step, self.early = round(EARLY * steps), {}

    def __call__(self, query, key, value, kv_len):
        call = self.state.call
        if call.step >= self.early_step and (call.step - self.early_step) % EVERY == 0:
            start = query.shape[1] - call.grid.video_tokens if call.grid.text_first else 0
            video = slice(start, start + call.grid.video_tokens)
            self.look(call, *(x[:, video] for x in (query, key, value)))
        return self.dense(query, key, value, kv_len)

    def look(self, call, query, key, value):
        grid = VideoGrid(call.grid.frames, call.grid.height, call.grid.width)
        _, lse = dense_attention_with_lse(query, key, value)
        raster = normal(block_mass(query, key, lse, (BLOCK, BLOCK)))
        raster_pooled = best_blocks(pooled_scores(query, key))
        index = token_order(grid, "curve", BLOCK)[0].to(query.device)
        query, key, lse = query[:, index], key[:, index], lse[..., index]
        mass = normal(block_mass(query, key, lse, (BLOCK, BLOCK)))
        scores = {
            "pooled": pooled_scores(query, key),
            "sampled": sampled_mass(query, key, lse),
            "window": nearness(grid, "curve", BLOCK).to(mass)[0, 0],
            "early": self.early.setdefault(call.branch, mass),
        }
        self.found.rows.append({
            "branch": call.branch,
            "step": call.step,
            "layer": self.layer,
            "exact": kept_by(mass, mass),
            "exact_raster": kept(raster, best_blocks(raster)),
            "pooled_raster": kept(raster, raster_pooled),
            **{name: kept_by(scores[name], mass) for name in CHOICES},
        })  # fmt: skip
        if "cond" in call.branch.split("_") and call.step == self.early_step + EVERY:
            self.found.masses[self.layer] = mass[-self.found.prompts :].cpu()


class Found:
    """What the probes of all layers saw."""

    def __init__(self, prompts):
        self.prompts, self.rows, self.masses = prompts, [], {}


def summary(rows):
    """Means over steps and branches, per layer and head, and what stands out."""
    first, last = (pick(row["step"] for row in rows) for pick in (min, max))
    layers = {}
    for layer in sorted({row["layer"] for row in rows}):
        mine = [row for row in rows if row["layer"] == layer]
        late = [row for row in mine if row["step"] == last]
        exact = {density: mean(row["exact"][density] for row in mine) for density in DENSITIES}
        layers[layer] = {
            "exact": exact,
            "exact_raster": mean(row["exact_raster"] for row in mine),
            "pooled_raster_misses": lost(
                [row["exact_raster"] for row in mine], [row["pooled_raster"] for row in mine]
            ),
            **{f"{name}_misses": misses(mine, name) for name in CHOICES[:3]},
            "early_misses_by_step": {
                step: misses([row for row in mine if row["step"] == step], "early")
                for step in range(first, last + 1, EVERY)
            },
            "early_misses_at_the_end": misses(late, "early"),
            "misses_by_density": {
                name: {d: misses(late if name == "early" else mine, name, d) for d in DENSITIES}
                for name in CHOICES
            },
        }
    heads = [value for layer in layers.values() for value in layer["exact"][DENSITY]]
    names = [*(f"{name}_misses" for name in ("pooled", "pooled_raster", "sampled", "window"))]
    names += ["early_misses_at_the_end"]
    return {
        "kept_mass": {
            d: average(layer["exact"][d] for layer in layers.values()) for d in DENSITIES
        },
        "heads_with_45_to_90_percent": sum(0.45 <= x <= 0.9 for x in heads) / len(heads),
        **{f"mean_{name}": average(layer[name] for layer in layers.values()) for name in names},
        "layers_that_lose_5_points": {
            name: [i for i, layer in layers.items() if average([layer[name]]) >= 0.05]
            for name in names
        },
        "layers_that_lose_5_points_by_density": {
            name: {
                d: [i for i, layer in layers.items()
                    if average([layer["misses_by_density"][name][d]]) >= 0.05]
                for d in DENSITIES
            }
            for name in CHOICES
        },
        "layers": layers,
    }  # fmt: skip


def mean(lists):
    """Of lists with one number a head."""
    return torch.tensor(list(lists)).mean(0).tolist()


def average(lists):
    return torch.tensor(list(lists)).mean().item()


def misses(rows, name, density=DENSITY):
    """Points of mass by which a choice falls short of the exact one, one number a head."""
    return lost([row["exact"][density] for row in rows], [row[name][density] for row in rows])


def lost(best, choice):
    """Mean over rows of what `choice` keeps less than `best`, one number a head."""
    return mean([b - c for b, c in zip(*heads)] for heads in zip(best, choice))


def overlaps(masses):
    """Mean Jaccard index of the exact masks of two prompts, two heads, two neighbouring layers."""
    masks = {layer: best_blocks(mass) for layer, mass in masses.items()}  # (B, H, N, N)
    layers = sorted(masks)

    def pairs(axis):
        found = [
            jaccard(mask.select(axis, i), mask.select(axis, j))
            for mask in masks.values()
            for i, j in combinations(range(mask.shape[axis]), 2)
        ]
        return sum(found) / max(len(found), 1)

    neighbours = [jaccard(masks[a], masks[b]) for a, b in zip(layers, layers[1:])]
    return {
        "prompts": pairs(0),
        "heads": pairs(1),
        "layers": sum(neighbours) / max(len(neighbours), 1),
        "random": DENSITY / (2 - DENSITY),
    }


def draw_maps(masses, path):
    """Block maps, one row a layer and one column a head, square root of the mass."""
    from PIL import Image

    rows = []
    for layer in sorted(masses):
        mass = masses[layer][0]
        scaled = (mass / mass.amax((-1, -2), keepdim=True)).sqrt()  # (H, N, N)
        rows.append(torch.nn.functional.pad(scaled, (2, 2, 2, 2), value=1.0).unbind(0))
    picture = torch.cat([torch.cat(row, 1) for row in rows], 0)
    times = max(1, 136 // masses[layer].shape[-1])
    size = (picture.shape[1] * times, picture.shape[0] * times)
    image = Image.fromarray((picture * 255).byte().numpy())
    image.resize(size, Image.Resampling.NEAREST).save(path)


def draw_curves(result, path):
    """Kept mass over density, what other choices lose, and how an early mask ages."""
    try:
        import matplotlib
    except ImportError:
        return print("no curves: matplotlib is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = result["layers"]
    figure, (kept_axes, miss_axes, age_axes) = plt.subplots(
        1, 3, figsize=(12, 3.5), layout="constrained"
    )
    for index, layer in layers.items():
        kept_axes.plot(
            DENSITIES, [average([layer["exact"][str(d)]]) for d in DENSITIES], label=index
        )
        ages = layer["early_misses_by_step"]
        age_axes.plot(list(ages), [average([value]) for value in ages.values()], label=index)
    for name in CHOICES[:3]:
        miss_axes.plot(
            [average([layer[f"{name}_misses"]]) for layer in layers.values()], label=name
        )
    kept_axes.set(xlabel="density", ylabel="kept mass, exact choice")
    miss_axes.set(xlabel="layer", ylabel=f"mass lost against exact, density {DENSITY}")
    age_axes.set(xlabel="step", ylabel="mass that the early mask loses")
    for axes in (kept_axes, miss_axes, age_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save_figure(figure, path)


def call_of(pipe, args):
    """The box's own call, at another size if asked."""
    call = json.loads((args.pipeline / "dit_sparse.json").read_text())["call"]
    call["num_inference_steps"] = args.steps
    if args.size:
        call["height"] = call["width"] = args.size
    if args.frames:
        factor = pipe.vae_scale_factor_temporal
        wan = type(pipe).__name__ == "WanPipeline"  # at a factor of 1 it adds a frame
        call["num_frames"] = factor * (args.frames - 1) + 1 - wan
    return call


def main():
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--pipeline", type=Path, default=ROOT / "samples/wan_tiny")
    add("--out", type=Path, required=True)
    add("--prompts", type=int, default=8)
    add("--steps", type=int, default=25)
    add("--size", type=int, help="height and width in pixels")
    add("--frames", type=int, help="latent frames")
    add("--commit", help="where there is no git here")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(device)
    call, found = call_of(pipe, args), Found(args.prompts)
    prompts, _, _ = make_test_prompts(args.prompts, 23)
    generator = torch.Generator().manual_seed(0)
    last, _ = run_with_probes(
        pipe,
        lambda: pipe(prompts, generator=generator, output_type="latent", **call),
        lambda state, layer, dense: Probe(state, layer, dense, args.steps, found),
    )
    result = {
        "question": __doc__.split("\n")[0],
        "environment": environment(args.commit),
        "pipeline": args.pipeline.name,
        "call": call,
        "video_tokens": last.grid.video_tokens,
        "prompts": prompts,
        "mask_overlap": overlaps(found.masses),
        **summary(found.rows),
    }
    result = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw_maps(found.masses, args.out.with_suffix(".png"))
    draw_curves(result, args.out.with_name(f"{args.out.stem}_curves.png"))
    print(json.dumps({k: v for k, v in result.items() if k not in ("layers", "prompts")}))


if __name__ == "__main__":
    main()
