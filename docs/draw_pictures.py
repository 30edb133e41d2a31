"""Draw the pictures of docs/how_it_works.md from real attention of the small boxed Wan pipeline.

    python docs/draw_pictures.py                      # generates twice, then draws
    python docs/draw_pictures.py --data look.pt       # keeps what was seen, to draw again from it

Needs matplotlib. Every number in a picture is computed here.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

from dit_sparse import enable_sparse_attention  # noqa: E402
from dit_sparse.attention import block_mass  # noqa: E402
from dit_sparse.dense import dense_attention_with_lse  # noqa: E402
from dit_sparse.grid import VideoGrid, token_order  # noqa: E402
from dit_sparse.loading import call_arguments, load_pipeline  # noqa: E402
from dit_sparse.probe import run_with_probes  # noqa: E402

PROMPT = "a large striped yellow ring moving right quickly over a dark blue background"
STEPS, LOOK_AT = 10, 4  # of the denoising steps
BLOCK, DENSITY = 64, 0.2
ORDERS = "raster", "curve"
BLUE, ORANGE, GREY = "#2f6fb3", "#e08a1e", "#b8bec6"


def look(seed=0):
    """Block mass of every layer at one step in both orders, the frames, and a trace of AdaSpa."""
    pipe = load_pipeline(None, "cpu", torch.float32)
    call = call_arguments(pipe, None).override(num_inference_steps=STEPS).call
    masses = {}

    def generate():
        generator = torch.Generator().manual_seed(seed)
        return pipe(PROMPT, generator=generator, output_type="np", **call).frames[0]

    def probe(state, layer, dense):
        def attend(query, key, value, kv_len):
            if state.call.step == LOOK_AT and state.call.branch == "cond":
                masses[layer] = masses_of(query, key, value, state.call.grid)
            return dense(query, key, value, kv_len)

        return attend

    frames = []
    seen, _ = run_with_probes(pipe, lambda: frames.append(generate()), probe)
    with enable_sparse_attention(pipe, "adaspa", measure=True) as handle:
        generate()
    size = seen.grid.frames, seen.grid.height, seen.grid.width
    trace = handle.report().trace
    return {"masses": masses, "frames": torch.as_tensor(frames[0]), "grid": size, "trace": trace}


def masses_of(query, key, value, grid):
    """For each order the share of softmax mass of every block, (H, N, N)."""
    _, lse = dense_attention_with_lse(query, key, value)
    found = {}
    for order in ORDERS:
        index = token_order(grid, order, BLOCK)[0]
        mass = block_mass(query[:, index], key[:, index], lse[..., index], (BLOCK, BLOCK))[0]
        found[order] = mass / mass.sum(-1, keepdim=True)
    return found


def best_blocks(mass):
    """The heaviest fifth of every row, (H, N, N) bool."""
    kept = mass.topk(round(DENSITY * mass.shape[-1]), -1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, kept, True)


def kept_mass(mass):
    return (mass * best_blocks(mass)).sum(-1).mean(-1)


def block_of_token(grid, order):
    """Block of each token, (frames, height, width)."""
    index = token_order(grid, order, BLOCK)[0]
    blocks = torch.empty_like(index)
    blocks[index] = torch.arange(len(index)) // BLOCK
    return blocks.view(grid.frames, grid.height, grid.width)


def draw_orders(grid, block_at):
    """The tokens of a few frames; one block stands out."""
    times = range(block_at[0] - 4, block_at[0] + 2)
    figure, axes = plt.subplots(2, len(times), figsize=(9, 3.4))
    for row, order in zip(axes, ORDERS):
        blocks = block_of_token(grid, order)
        chosen = blocks[block_at]
        for axis, t in zip(row, times):
            shade = (blocks[t] % 2).float() * 0.5
            shade[blocks[t] == chosen] = 2
            colours = ListedColormap(["#eceff2", "#dfe4e9", ORANGE])
            axis.pcolormesh(
                (shade * 2).clamp(max=2), cmap=colours, vmin=0, vmax=2, edgecolors="white", lw=0.4
            )
            axis.set(xticks=[], yticks=[], aspect="equal")
            axis.invert_yaxis()
            axis.set_title(f"frame {t}", fontsize=8)
        row[0].set_ylabel(order)
    save(figure, "orders")


def draw_maps(masses, layer, heads):
    """Square root of the mass of every block, in both orders."""
    figure, axes = plt.subplots(2, len(heads), figsize=(9, 5))
    for row, order in zip(axes, ORDERS):
        mass = masses[layer][order]
        shares = kept_mass(mass)
        for axis, head in zip(row, heads):
            axis.imshow((mass[head] / mass[head].max()).sqrt(), cmap="magma")
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"head {head}: best 20% hold {shares[head]:.0%}", fontsize=8)
        row[0].set_ylabel(f"{order}\nblocks of queries")
        row[0].set_xlabel("blocks of keys")
    save(figure, "maps")


def draw_reads(data, grid, layer, heads, block_at):
    """What one block of queries reads in the video: the rest is dimmed."""
    masses = data["masses"][layer]["curve"]
    blocks = block_of_token(grid, "curve")
    row = blocks[block_at]
    times = [min(max(block_at[0] + d, 0), grid.frames - 1) for d in (-6, -3, -1, 0, 1, 3, 6)]
    figure, axes = plt.subplots(len(heads), len(times), figsize=(9, 1.45 * len(heads)))
    for line, head in zip(axes, heads):
        kept = best_blocks(masses)[head, row]  # (N,)
        for axis, t in zip(line, times):
            frame = data["frames"][t]
            pixels = frame.shape[0] // grid.height
            shown = kept[blocks[t]].float()
            mine = (blocks[t] == row).float()
            shown, mine = (
                x.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1) for x in (shown, mine)
            )
            axis.imshow(frame * (0.25 + 0.75 * shown[..., None]))
            if mine.any():
                axis.contour(mine, levels=[0.5], colors=[ORANGE], linewidths=1.2)
            axis.set(xticks=[], yticks=[])
            if head == heads[0]:
                axis.set_title(f"frame {t}", fontsize=8)
        line[0].set_ylabel(f"head {head}", fontsize=8)
    save(figure, "reads")


def draw_schedule(trace):
    """Density and kept mass of each step, means over layers, branches and heads."""
    figure, axis = plt.subplots(figsize=(9, 2.4))
    for step in range(STEPS):
        entries = [entry for entry in trace if entry["step"] == step]
        kind = entries[0]["kind"]
        density = mean(entry["density"] or [1.0] for entry in entries)
        colour = {"dense": GREY, "search": ORANGE, "reuse": BLUE}[kind]
        axis.bar(step, density, color=colour)
        axis.annotate(kind, (step, 0.02), ha="center", fontsize=8, color="white")
    steps, kept = kept_by_step(trace)
    axis.plot(steps, kept, "o-", color="black", ms=4, lw=1)
    axis.annotate("kept mass", (steps[-1], kept[-1]), xytext=(-10, 8), textcoords="offset points",
                  ha="right", fontsize=8)  # fmt: skip
    axis.set(xlabel="denoising step", ylabel="share of blocks", ylim=(0, 1.1), xticks=range(STEPS))
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "schedule")


def kept_by_step(trace):
    steps = sorted({entry["step"] for entry in trace if entry["kept_mass"]})
    masses = [
        mean(e["kept_mass"] for e in trace if e["step"] == step and e["kept_mass"])
        for step in steps
    ]
    return steps, masses


def mean(lists):
    values = [value for values in lists for value in values]
    return sum(values) / len(values)


def save(figure, name):
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "pictures" / f"{name}.webp", dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="what was seen; read if it is there")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--heads", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--token", type=int, nargs=3, default=[8, 8, 8], help="frame, row, column")
    args = parser.parse_args()
    if args.data and args.data.is_file():
        data = torch.load(args.data)
    else:
        data = look()
    if args.data:
        torch.save(data, args.data)
    grid, place = VideoGrid(*data["grid"]), tuple(args.token)
    draw_orders(grid, place)
    draw_maps(data["masses"], args.layer, args.heads)
    draw_reads(data, grid, args.layer, args.heads, place)
    draw_schedule(data["trace"])


if __name__ == "__main__":
    main()
