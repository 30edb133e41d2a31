"""Which method is nearest to dense at which effective attention cost?

    python benchmarks/pareto.py --out benchmarks/results/pareto.json
    python benchmarks/pareto.py --out benchmarks/results/pareto.json --only-figure --figure it.png

Every method sweeps as many settings on tuning prompts, warm-up x density (or what its class lists
as `swept`) x searches x how these are spaced, judged by the error of the final latents; for each
budget its best setting is run on other prompts and scored. Published settings are run as they are
(hollow points). Resumable: a method that is in the file with the same grid is left out, what it has
of another grid, or of settings that it is no longer tuned over, is replaced, and of a killed run
all goes on: its tuning lies beside the results, its records in them, `unfinished` until those of
their method are all there. All prompts and seeds of a setting go in one batch. With
`accelerate launch --multi_gpu --num_processes N` before it the processes share the methods.

What would mislead: small models on drawn videos; PSNR is dominated by the first steps; Sparse-vDiT
has a threshold in place of searches, and its search is offline, so not in its cost; token order
and block size are each method's own default. `velocity_error` and kept mass are of single steps,
from dense's latents of the tuning prompts (velocity.py). One test prompt is a tuning prompt, too.

On a GPU the transformer's blocks are compiled, dense attention too. `--settings-of FILE` scores
what another file chose, at another size or on other prompts (`--prompt-seed`), and tunes nothing
but makes the tables and gates anew that such settings name, of the tuning prompts.
Several processes may share a GPU (`--lock FILE`, each with its own --out): they generate side by
side, and the others wait while one is timed. With `--claims FOLDER` no two of them run the same
method. `--also FILE` joins their files.
"""

import argparse
import fcntl
import json
import re
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "samples")]

from boxed import compiled_blocks, open_boxed, two_dense_runs  # noqa: E402
from environment import environment  # noqa: E402
from figures import save_figure  # noqa: E402
from prompt_check import accuracy, load_checker, make_test_prompts, predict  # noqa: E402
from result_file import write_result  # noqa: E402
from velocity import DenseTrajectory  # noqa: E402

from dit_sparse import AdaSpa, available_methods, enable_sparse_attention  # noqa: E402
from dit_sparse.api import make_config  # noqa: E402
from dit_sparse.calibrate import ModeSearch, calibrate  # noqa: E402
from dit_sparse.config import DENSITIES  # noqa: E402
from dit_sparse.distil import Distillation, distil  # noqa: E402
from dit_sparse.grid import token_order  # noqa: E402
from dit_sparse.metrics import Lpips, compare_clips  # noqa: E402
from dit_sparse.patterns import method_class  # noqa: E402
from dit_sparse.processes import Processes  # noqa: E402
from dit_sparse.step import LayerAttention  # noqa: E402

TUNING_SEED, TEST_SEED = 31, 11  # of the prompts
WARM_UPS = (0.0, 0.08, 0.12, 0.16, 0.24)
SEARCHES = 1, 3, 4, 5
SPACINGS = (1.5,)  # ever further apart; 1 is evenly
EPSILONS = (0.15, 0.3, 0.6)  # of Sparse-vDiT, in place of searches
BUDGETS = (0.2, 0.3, 0.4, 0.6)
TUNED_BY_RUNS = "sparse-vdit", "seerattention"  # their settings name files that runs make
BASELINES = "auto", "adaspa"  # of paired differences, the first that was run
RESAMPLES = 200_000  # the tails of many intervals at once
AT_ONCE = 50  # videos: HunyuanVideo's own attention takes 0.24 GB of each
DENSE = AdaSpa(density=1.0)
AHEAD = 10_000_000  # cycles, 5 ms, that a GPU waits before a timed call, for the host to issue it
# Videos this small stand for larger ones: `auto` would rather run them dense on a GPU.
RUNS_SPARSE = {"auto": {"dense_if_faster": False}}
MOST_TIME = 1.5  # that is drawn, of dense attention's
SEEDS = "adaspa", "draftattention", "rettention", "sparse-vdit"
DRAWN = {"auto": {"linewidth": 3}} | dict.fromkeys(SEEDS, {"linewidth": 1.8})  # others are thin
IDENTICAL_DB = 100.0  # stands for an infinite PSNR in means


@dataclass
class Clips:
    """Prompts and seeds of one batch, and what dense attention makes of them."""

    prompts: list[str]
    labels: torch.Tensor
    seeds: int
    dense: torch.Tensor | None = None

    @classmethod
    def drawn(cls, count, seeds, prompt_seed):
        prompts, labels, _ = make_test_prompts(count, prompt_seed)
        repeated = [prompt for prompt in prompts for _ in range(seeds)]
        return cls(repeated, labels.repeat_interleave(seeds, 0), seeds)


@dataclass
class Runner:
    """One pipeline at one size."""

    args: argparse.Namespace
    name: str
    source: Path
    call: dict = field(default_factory=dict)
    seconds: float | None = None  # of the last generation

    def __post_init__(self):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe, arguments = open_boxed(self.source, self.args.dtype)
        arguments = arguments.override(
            num_inference_steps=self.args.steps,
            height=self.args.height,
            width=self.args.width,
            num_frames=self.args.frames,
        )
        self.call, args = arguments.call, self.args
        self.tuning = Clips.drawn(args.tuning_prompts, 1, TUNING_SEED)
        self.test = Clips.drawn(args.prompts, args.seeds, args.prompt_seed)
        # the same small network for all: it knows colours, shapes and directions
        self.checker = load_checker(ROOT / "samples/prompt_checker.safetensors", self.device)
        self.lpips = Lpips()

    @property
    def size(self):
        return "x".join(str(self.call[k]) for k in ("width", "height", "num_frames"))

    def prepare(self):
        """Dense clips, and how long their attention takes."""
        with self.enabled(DENSE):
            self.tuning.dense = self.latents(self.tuning)
            self.test.dense = self.frames(self.test)
            self.trajectory = DenseTrajectory(
                self.pipe.transformer, lambda **more: self.generate(self.tuning, "latent", **more)
            )
            self.dense_seconds, _ = self.timed(self.test)  # not of the first call, which compiles

    @contextmanager
    def enabled(self, config, **options):
        """The pipeline with a method, compiled on a GPU; gives the handle."""
        with ExitStack() as undo:
            handle = undo.enter_context(enable_sparse_attention(self.pipe, config, **options))
            if self.device == "cuda":
                undo.enter_context(compiled_blocks(self.pipe.transformer))
            yield handle

    def generate(self, clips, output_type, seed_offset=0, alone=False, after=None, **changes):
        """Of all batches; after each, `after` is told how many videos it had."""
        generators = [
            torch.Generator().manual_seed(i % clips.seeds + seed_offset)
            for i in range(len(clips.prompts))
        ]
        with torch.no_grad(), gpu_of(self.args.lock, alone):
            start, frames = time.perf_counter(), []  # not while it waits for the GPU
            for i in range(0, len(generators), AT_ONCE):
                made = self.pipe(
                    clips.prompts[i : i + AT_ONCE],
                    generator=generators[i : i + AT_ONCE],
                    output_type=output_type,
                    **self.call | changes,
                )
                frames.append(made.frames)
                if after is not None:
                    after(len(made.frames))
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - start
        return torch.cat(frames)

    def latents(self, clips):
        return self.generate(clips, "latent").float()

    def frames(self, clips, **options):
        """(N, T, H, W, 3) in [0, 1]."""
        frames = self.generate(clips, "pt", **options)  # (N, T, 3, H, W)
        return frames.permute(0, 1, 3, 4, 2).float()

    def timed(self, clips, **options):
        """Seconds inside self-attention, search included, of one generation; and its frames."""
        with attention_clock(self.device) as total:
            frames = self.frames(clips, alone=True, **options)
            return total(), frames

    def tune(self, config):
        """Cost and latent error on the tuning prompts."""
        with self.enabled(config) as handle:
            latents = self.latents(self.tuning)
            cost = handle.report().effective_cost
        error = (latents - self.tuning.dense).square().mean() / self.tuning.dense.square().mean()
        return {"config": config.to_dict(), "effective_cost": cost, "error": float(error)}

    def score(self, method, config, **more):
        """One record: the method on the test prompts."""
        reports = []  # of each video; a report is of the last batch
        with self.enabled(config) as handle:
            # compiles what batches of this size need, in few steps
            self.generate(self.test, "latent", num_inference_steps=8)
            seconds, frames = self.timed(
                self.test, after=lambda videos: reports.extend([handle.report()] * videos)
            )
            grid = handle._installed[0].state.call.grid
        blocks = block_of_tokens(grid, config.order, config.block_size)
        each = self.pipe.vae_scale_factor_temporal
        edges = [seams(clips, blocks, each) for clips in (frames, self.test.dense)]
        with self.enabled(config, measure=True) as handle:
            velocity_error = self.trajectory.error()
            kept_mass = handle.report().kept_mass
        return {
            **self.compare(frames),
            "method": method,
            "config": config.to_dict(),
            "effective_cost": mean([report.effective_cost for report in reports]),
            "effective_time": seconds / self.dense_seconds,
            "density": mean([report.density for report in reports]),
            "kept_mass": kept_mass,
            "velocity_error": velocity_error,
            "seams": None if None in edges else edges[0] / max(edges[1], 1e-9),
            "peak_cache_bytes": max(report.peak_cache_bytes for report in reports),
            **more,
        }

    def compare(self, frames):
        """Figures of clips against the dense ones."""
        with gpu_of(self.args.lock):
            metrics = [compare_clips(a, b, self.lpips) for a, b in zip(self.test.dense, frames)]
        psnr = [IDENTICAL_DB if m.identical else m.psnr for m in metrics]
        return {
            "pipeline": self.name,
            "size": self.size,
            "psnr": mean(psnr),
            "ssim": mean([m.ssim for m in metrics]),
            "lpips": mean([m.lpips for m in metrics]),
            "flicker": flicker(frames) / max(flicker(self.test.dense), 1e-9),
            "prompt_following": self.followed(frames),
            "prompts": len(self.test.prompts) // self.test.seeds,
            "seeds": self.test.seeds,
            "psnr_per_clip": [round(x, 4) for x in psnr],
        }

    def followed(self, frames):
        each = self.pipe.vae_scale_factor_temporal  # HunyuanVideo's shows every frame so often
        video = frames[:, ::each].permute(0, 1, 4, 2, 3) * 2 - 1
        return accuracy(predict(self.checker, video), self.test.labels)


@contextmanager
def gpu_of(lock, alone=False):
    """The GPU beside others that hold `lock`, or alone; who waits to be alone goes first."""
    if lock is None:
        yield
        return
    with open(f"{lock}.turn", "w") as turn, open(lock, "w") as gpu:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(gpu, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield


class attention_clock:
    """Counts the time inside `LayerAttention`; gives a function that returns the seconds.

    On a GPU that of its own work, where the host takes less than AHEAD for a call: at the sizes
    here the host is slower, and far less even.
    """

    def __init__(self, device):
        self.cuda, self.spans = device == "cuda", []

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def total(self):
        if not self.cuda:
            return sum(end - start for start, end in self.spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1000

    def __enter__(self):
        self.original = original = LayerAttention.__call__

        def timed(layer, *args):
            if self.cuda:
                torch.cuda._sleep(AHEAD)
            start = self.now()
            output = original(layer, *args)
            self.spans.append((start, self.now()))
            return output

        LayerAttention.__call__ = timed
        return self.total

    def __exit__(self, *exception):
        LayerAttention.__call__ = self.original


def flicker(frames):
    """Mean second difference over time, (N, T, H, W, 3)."""
    return float((frames[:, 2:] - 2 * frames[:, 1:-1] + frames[:, :-2]).abs().mean())


def block_of_tokens(grid, order, block_size):
    """The block that each token of the video lies in, (T, H, W)."""
    _, place = token_order(grid, order, block_size)
    before = grid.text_tokens if grid.text_first else 0
    return ((place + before) // block_size).view(grid.frames, grid.height, grid.width)


def seams(frames, blocks, each):
    """Mean step between pixels across edges of blocks, over that across other edges of tokens.

    Args:
        frames: (N, F, Y, X, 3), `each` of them for a frame of tokens after the first.
        blocks: of each token, (T, H, W).

    Returns:
        None where all edges, or none, are those of blocks, or tokens are no whole pixels or frames.
    """
    _, shown, height, width = frames.shape[:4]
    steps, rows, columns = blocks.shape
    if shown != 1 + (steps - 1) * each or height % rows or width % columns:
        return None
    of_frame = (torch.arange(shown) + each - 1) // each
    across, inside = [], []
    for axis in (2, 3):
        pixels = frames.shape[axis] // blocks.shape[axis - 1]
        other = frames.shape[5 - axis] // blocks.shape[4 - axis]
        step = frames.diff(dim=axis).abs().mean((0, 4)).movedim(axis - 1, -1)  # (F, other, -1)
        step = step[..., pixels - 1 :: pixels].unflatten(1, (-1, other)).mean(2).cpu()
        apart = blocks.movedim(axis - 1, -1).diff(dim=-1)[of_frame] != 0
        across.append(step[apart])
        inside.append(step[~apart])
    across, inside = torch.cat(across), torch.cat(inside)
    if not len(across) or not len(inside):
        return None
    return float(across.mean() / inside.mean().clamp_min(1e-9))


def mean(values):
    """None where one of them is."""
    return None if None in values else sum(values) / len(values)


def config_of(spec):
    """Of a method as typed on the command line."""
    return make_config(spec.name, RUNS_SPARSE.get(spec.name, {}) | spec.options)[0]


def grid_of(args):
    """The axes that all methods are tuned over."""
    axes = "warm_ups", "densities", "searches", "spacings", "epsilons"
    return {axis: getattr(args, axis) for axis in axes}


def settings(runner, method, cls, grid):
    """The configs that a method is tuned over."""
    if method == "sparse-vdit":
        for density in grid["densities"]:
            for epsilon in grid["epsilons"]:
                yield from mode_table_configs(runner, cls, density, epsilon, grid["warm_ups"])
        return
    also = dict(RUNS_SPARSE.get(method, {}))
    if method == "seerattention":
        also["gate"] = str(gates(runner))
    # where a density only caps, or goes with another option, as many values of that are swept
    for swept in cls.swept or [{"density": density} for density in grid["densities"]]:
        options = swept | also
        for warm_up in grid["warm_ups"]:
            axes = product(grid["searches"], grid["spacings"])
            for at in dict.fromkeys(schedule(warm_up, *of) for of in axes):  # one search is one
                yield cls(**options, search_at=at, every_step=False)
            if cls.every_step:  # a method that looks at every step by itself may do so
                yield cls(**options, search_at=(warm_up,), every_step=True)


def stale(records, grid, tuned):
    """Those of another grid and, if `tuned`, of settings no longer among their method's."""
    tried = {}
    for record in records:
        method = record["method"]
        if record["grid"] != grid:
            yield record
        elif tuned and "budgets" in record and method not in TUNED_BY_RUNS:
            if method not in tried:
                configs = settings(None, method, method_class(method), grid)
                tried[method] = {json.dumps(config.to_dict()) for config in configs}
            if json.dumps(record["config"]) not in tried[method]:
                yield record


def schedule(first, searches, spacing=1.0):
    """Times of searches from the first on; above a spacing of 1 ever further apart."""
    return tuple(first + (1 - first) * (i / searches) ** spacing for i in range(searches))


def gates(runner):
    """Where the gates lie that were distilled on the tuning prompts, beside the results."""
    path = runner.args.out.parent / f"gates-{runner.name}-{runner.size}.safetensors"
    distil(runner.pipe, lambda: runner.latents(runner.tuning), Distillation()).save(path)
    return path


def mode_table_configs(runner, cls, density, epsilon, warm_ups):
    """Of a table that is searched on the tuning prompts."""
    table = str(mode_table(runner, density, epsilon))
    for warm_up in warm_ups:
        yield cls(density=density, search_at=(warm_up,), table=table)


def mode_table(runner, density, epsilon):
    """Where the modes lie that were searched on the tuning prompts, beside the results."""
    path = runner.args.out.parent / f"modes-{runner.name}-{runner.size}-{density}-{epsilon}.json"
    run = lambda: runner.latents(runner.tuning)  # noqa: E731
    search = ModeSearch(density, epsilon=epsilon)
    calibrate(runner.pipe, run, search, len(runner.tuning.prompts)).save(path)
    return path


def chosen(tuned, budgets):
    """For each budget the tuned setting of least error within it: (budgets it is best for, it)."""
    best = {}
    for budget in budgets:
        within = [t for t in tuned if t["effective_cost"] <= budget]
        if within:
            setting = min(within, key=lambda t: t["error"])
            best.setdefault(json.dumps(setting["config"]), ([], setting))[0].append(budget)
    return list(best.values())


def tuned_settings(runner, method, budgets, grid):
    """(budgets, config) of what is best within each on the tuning prompts."""
    cls = method_class(method)
    tuned = tune_all(runner, tuned_file(runner, method), settings(runner, method, cls, grid))
    for of_budgets, setting in chosen(list(tuned), budgets):
        yield of_budgets, cls(**setting["config"])


def tuned_file(runner, method):
    """What a method's tuning has found, until its records are written: a file for all that counts,
    since runs with other settings may lie in the same folder."""
    args, steps = runner.args, runner.call["num_inference_steps"]
    what = runner.name, runner.size, steps, args.tuning_prompts, args.dtype, method
    return args.out.parent / f"{file_name('tuned', *what)}.jsonl"


def tune_all(runner, path, configs):
    """Every setting on the tuning prompts, less what a killed run left in `path`."""
    with path.open("a+") as file:
        file.seek(0)
        whole = "".join(file.read().rpartition("\n")[:2])
        file.truncate(len(whole))  # a kill may have left half a line
        found = {json.dumps(line["config"]): line for line in map(json.loads, whole.splitlines())}
        for config in configs:
            key = json.dumps(config.to_dict())
            if key not in found:
                found[key] = runner.tune(config)
                file.write(json.dumps(found[key]) + "\n")
                file.flush()
            yield found[key]


def gives(path, runner, method):
    """(budgets, config as a dict) of what another file chose for this pipeline."""
    return [
        (record["budgets"], record["config"])
        for record in json.loads(path.read_text())["records"]
        if (record["pipeline"], record["method"]) == (runner.name, method)
        if "budgets" in record and "unfinished" not in record  # else others will be missing
    ]


def given_settings(path, runner, method):
    """(budgets, config) of the same; with tables and gates made anew."""
    made = {}  # which settings share
    for budgets, config in gives(path, runner, method):
        yield budgets, config_anew(runner, method, config, made)


def config_anew(runner, method, config, made):
    """Of its options in a result; tables and gates are `made` once, by the names that they had."""
    if method in TUNED_BY_RUNS:
        named = config.get("gate") or config["table"]
        if named not in made:
            made[named] = made_anew(runner, config)
        config = config | made[named]
    return method_class(method)(**config)


def made_anew(runner, config):
    """The files that a config names, as `settings` makes them: only their names lie in results."""
    if "gate" in config:
        return {"gate": str(gates(runner))}
    density, epsilon = Path(config["table"]).stem.split("-")[-2:]
    return {"table": str(mode_table(runner, float(density), float(epsilon)))}


def scored_settings(runner, method, budgets, grid):
    """(config, what its record says beside its figures), with the grid that it was chosen from."""
    given, cls = runner.args.settings_of, method_class(method)
    found = given_settings(given, runner, method) if given else ()
    for of_budgets, config in found or tuned_settings(runner, method, budgets, grid):
        yield config, {"budgets": of_budgets, "grid": grid}
    published = {} if given else {json.dumps(o): o for o in cls.published.values()}
    for options in published.values():
        yield cls(**options), {"published": True, "grid": grid}


def run_method(runner, method, budgets, grid, begun):
    """The records of a method on one pipeline, whenever there is one more, and at the end.

    Args:
        begun: what a killed run has of them.
    """
    records, missing = [], []
    for config, more in scored_settings(runner, method, budgets, grid):
        told = more | {"config": json.loads(json.dumps(config.to_dict()))}
        found = [record for record in begun if record | told == record]
        records += found
        missing += [] if found else [(config, more)]
    for config, more in missing:
        records.append(runner.score(method, config, **more))
        say(records[-1])
        yield [record | {"unfinished": True} for record in records]
    yield [{k: v for k, v in record.items() if k != "unfinished"} for record in records]


def say(record):
    keys = ("pipeline", "method", "effective_cost", "effective_time", "psnr", "ssim")
    print(" ".join(f"{k}={record[k]}" for k in keys), flush=True)


def lines(runner):
    """Chance, and on a GPU the noise floor: what two dense runs differ by."""
    found = {"chance": runner.compare(runner.frames(runner.test, seed_offset=1000))}
    if runner.device == "cuda":
        dense = runner.test.dense
        runner.test.dense, frames = two_dense_runs(lambda: runner.frames(runner.test))
        found["noise_floor"] = runner.compare(frames)
        runner.test.dense = dense
    return found


def paired(records):
    """PSNR of each method minus that of `auto`, or AdaSpa, within the same budget; prompts are
    resampled.

    Intervals hold together: 95% for all comparisons of a pipeline at once (Bonferroni).
    """
    at = [(r, (r["pipeline"], r["size"], b)) for r in records for b in r.get("budgets", ())]
    ran = {r["method"] for r in records}
    baseline = next((name for name in BASELINES if name in ran), None)
    base = {key: r for r, key in at if r["method"] == baseline}
    pairs = [(r, base[key], key) for r, key in at if r["method"] != baseline and key in base]
    found = []
    for record, other, key in pairs:
        differences = [a - b for a, b in zip(record["psnr_per_clip"], other["psnr_per_clip"])]
        of_prompts = (
            torch.tensor(differences, dtype=torch.float64).view(-1, record["seeds"]).mean(1)
        )
        level = 0.05 / sum(key[:2] == other_key[:2] for _, _, other_key in pairs) / 2
        means, ends = resampled(len(of_prompts)) @ of_prompts, torch.tensor([level, 1 - level])
        bounds = means.quantile(ends.double())
        found.append({
            "pipeline": record["pipeline"],
            "size": record["size"],
            "method": record["method"],
            "minus": baseline,
            "budget": key[2],
            "psnr": float(of_prompts.mean()),
            "interval": bounds.tolist(),
        })  # fmt: skip
    return found


@cache
def resampled(prompts):
    """How much of each prompt is in each resample, (RESAMPLES, prompts); the same for all pairs."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(prompts, (RESAMPLES, prompts), generator=generator)
    counts = torch.zeros(RESAMPLES, prompts, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)) / prompts


def draw(result, path):
    """PSNR over effective cost and over effective time; hollow points as published."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = list(dict.fromkeys((r["pipeline"], r["size"]) for r in result["records"]))
    if not places:
        raise SystemExit("nothing to draw: no setting is within a budget")
    figure, axes = plt.subplots(
        len(places), 2, figsize=(12, 4.5 * len(places)), squeeze=False, sharey="row",
        layout="constrained",
    )  # fmt: skip
    known = [
        name for name in available_methods() if any(r["method"] == name for r in result["records"])
    ]
    methods = list(dict.fromkeys([*known, *(r["method"] for r in result["records"])]))
    for row, place in zip(axes, places):
        for axis, x in zip(row, ("effective_cost", "effective_time")):
            for index, method in enumerate(methods):
                mine = [
                    r
                    for r in result["records"]
                    if (r["pipeline"], r["size"]) == place and r["method"] == method
                ]
                look = {"color": plt.cm.tab10(index % 10), "marker": "osD^vP"[index // 10 % 6]}
                mine = [r for r in mine if r[x] is not None]
                tuned = sorted((r[x], r["psnr"]) for r in mine if "budgets" in r)
                look |= DRAWN.get(method, {"linewidth": 0.8, "alpha": 0.5, "markersize": 4})
                x_and_y = zip(*tuned) if tuned else ((), ())
                axis.plot(*x_and_y, label=method, **look)
                hollow = [(r[x], r["psnr"]) for r in mine if r.get("published")]
                if hollow:
                    axis.plot(*zip(*hollow), linestyle="none", fillstyle="none", **look)
            for name, line in result["lines"].get(" ".join(place), {}).items():
                axis.axhline(line["psnr"], linestyle=":", color="grey")
                axis.annotate(
                    name.replace("_", " "), (0.99, line["psnr"]),
                    xycoords=("axes fraction", "data"), ha="right", va="bottom",
                )  # fmt: skip
            axis.set(xlabel=x.replace("_", " ") + " (dense = 1)", title=" ".join(place))
            if axis.get_xlim()[1] > MOST_TIME:
                axis.set(xlim=(0, MOST_TIME), xlabel=f"{axis.get_xlabel()}, up to {MOST_TIME}")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("PSNR against dense, dB")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    save_figure(figure, path)


def load_results(args, fixed):
    """What an earlier run left, if it had the same settings.

    Raises:
        SystemExit: it had others.
    """
    if not args.out.is_file():
        return {"question": __doc__.split("\n")[0], "settings": fixed, "records": [], "lines": {}}
    result = json.loads(args.out.read_text())
    if result["settings"] != fixed:
        raise SystemExit(f"{args.out} was made with other settings: name another --out")
    return result


def join(result, path):
    """Add what another file of the same settings has and this one lacks.

    Raises:
        SystemExit: it had others.
    """
    other = json.loads(path.read_text())
    if other["settings"] != result["settings"]:
        raise SystemExit(f"{path} was made with other settings than the --out file")
    have = {key(record) for record in result["records"]}
    finished = have - unfinished(result)
    made = {name: other["environment"][name] for name in ("commit", "gpu")}
    rest = (r for r in other["records"] if key(r) not in (have if "unfinished" in r else finished))
    put_in(result, [made | record for record in rest])
    result["lines"] = other["lines"] | result["lines"]
    result.setdefault("environment", other["environment"])


def save(path, result):
    result["paired"] = paired(result["records"])
    write_result(path, result)


def take_in(args, result):
    """What several processes found, each in a file of its own, of this run or a killed one."""
    for path in sorted(args.out.parent.glob(f"{args.out.stem}-process-*.json")):
        found = json.loads(path.read_text())
        if found["settings"] == result["settings"]:
            put_in(result, found["records"])
            result["lines"] |= found["lines"]
            save(args.out, result)
        path.unlink()


def put_in(result, records):
    """In the place of what there is of the same methods."""
    new = {key(record) for record in records}
    result["records"] = [r for r in result["records"] if key(r) not in new] + records


def unfinished(result):
    """Keys of the methods that a killed run has begun."""
    return {key(record) for record in result["records"] if "unfinished" in record}


def key(record):
    return record["pipeline"], record["size"], record["method"]


def file_name(*what):
    """Of one file, also where a method is a path."""
    return re.sub(r"[^\w.-]+", "-", " ".join(map(str, what)))


@contextmanager
def claim(folder, *what):
    """Whether this is ours to do: no other process does it or has done it."""
    if folder is None:
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / file_name(*what), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it ends, also by a kill
        except BlockingIOError:
            yield False
            return
        file.seek(0)
        ours = not file.read()
        yield ours
        if ours:
            file.write("done")


def other_prompts(args):
    """The seed of the prompts as a setting, where it is not that of all files from before it."""
    return {} if args.prompt_seed == TEST_SEED else {"prompt_seed": args.prompt_seed}


def settings_file(text):
    """A path to a file of records, for the command line."""
    try:
        for record in json.loads(Path(text).read_text())["records"]:
            record["pipeline"], record["method"], record["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it has no records of settings"
        raise argparse.ArgumentTypeError(f"cannot read {text}: {reason}") from error
    return Path(text)


def existing(text):
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no {text}")
    return Path(text)


def at_least_1(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def parser_of_runs(doc, prompts, seeds):
    """The arguments of a benchmark that makes a `Runner`."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    add = parser.add_argument
    add("--pipeline", type=existing, action="append", help="repeatable; default: samples/wan_tiny")
    add("--out", type=Path, required=True)
    add("--lock", type=Path, help="file by which processes on one GPU take turns")
    add("--prompts", type=at_least_1, default=prompts)
    add("--seeds", type=at_least_1, default=seeds)
    add("--tuning-prompts", type=at_least_1, default=10)
    add("--prompt-seed", type=int, default=TEST_SEED, help="which prompts are scored")
    for name in ("steps", "height", "width", "frames"):
        add(f"--{name}", type=at_least_1, help="default: what the pipeline's dit_sparse.json says")
    dtypes = "bfloat16", "float16", "float32"
    add("--dtype", choices=dtypes, default=dtypes[0 if torch.cuda.is_available() else 2])
    add("--commit", help="where there is no git here")
    return parser


def parse(arguments=None):
    parser = parser_of_runs(__doc__, prompts=20, seeds=2)
    add = parser.add_argument
    add("--also", type=settings_file, action="append", default=[], help="join it; repeatable")
    add("--figure", type=Path)
    add("--only-figure", action="store_true")
    add("--settings-of", type=settings_file, help="score what this file chose; tune nothing")
    add("--method", action="append", help="name or file of a rule; repeatable; default: all")
    add("--claims", type=Path, help="folder by which processes share the methods")
    for name, values in (
        ("budgets", BUDGETS), ("warm-ups", WARM_UPS), ("densities", DENSITIES),
        ("searches", SEARCHES), ("spacings", SPACINGS), ("epsilons", EPSILONS),
    ):  # fmt: skip
        add(f"--{name}", type=type(values[0]), nargs="+", default=list(values))
    args = parser.parse_args(arguments)
    for method in args.method or ():  # now, not after all dense videos
        if method_class(method) is None:
            parser.error(f"no method {method!r}: there are {', '.join(available_methods())}")
    return args


def main(arguments=None):
    args = parse(arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid = grid_of(args)
    numbers = ("prompts", "seeds", "tuning_prompts", "steps", "budgets", "dtype")
    fixed = {k: getattr(args, k) for k in numbers} | other_prompts(args)
    if args.settings_of:
        fixed["settings_of"] = args.settings_of.name
    processes, _ = Processes.joined("cuda" if torch.cuda.is_available() else "cpu")
    if processes.first:
        take_in(args, load_results(args, fixed))
    processes.wait()
    result = load_results(args, fixed)
    if not args.only_figure:
        result["environment"] = environment(args.commit)
    for other in args.also:
        join(result, other)
    if args.also:
        save(args.out, result)
    own, path = result, args.out  # what this process finds, and where it goes
    if processes.several:
        own = {"settings": fixed, "records": [], "lines": {}}
        path = args.out.with_name(f"{args.out.stem}-process-{processes.number}.json")
    methods, failed = args.method or list(available_methods()), []
    again = stale(result["records"], grid, tuned=not args.settings_of)
    done = {key(record) for record in result["records"]} - {key(record) for record in again}
    done -= unfinished(result)
    for source in [] if args.only_figure else args.pipeline or [ROOT / "samples/wan_tiny"]:
        runner = Runner(args, source.name, source)
        place = runner.name, runner.size
        wanted = methods
        if args.settings_of:
            wanted = [method for method in methods if gives(args.settings_of, runner, method)]
            lacking = [method for method in args.method or () if method not in wanted]
            failed += [f"no settings of {method} on {runner.name} there" for method in lacking]
        left = processes.part([method for method in wanted if (*place, method) not in done])
        if not left:
            continue
        runner.prepare()
        if processes.first and " ".join(place) not in result["lines"]:
            own["lines"][" ".join(place)] = lines(runner)
        for method in left:
            try:
                with claim(args.claims, *place, method) as ours:
                    if not ours:  # also where it was done over another grid
                        print(f"{method} on {runner.name}: claimed in {args.claims}", flush=True)
                        continue
                    begun = [r for r in result["records"] if key(r) == (*place, method)]
                    begun = [record for record in begun if "unfinished" in record]
                    for records in run_method(runner, method, args.budgets, grid, begun):
                        put_in(own, records)
                        save(path, own)  # before the claim is done, and its tuning gone
                    if not args.settings_of:
                        tuned_file(runner, method).unlink(missing_ok=True)
            except Exception as error:  # the others go on
                failed.append(f"{method} on {runner.name}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                save(path, own)
    processes.end()
    if processes.first:
        take_in(args, result)
        if args.figure:
            draw(result, args.figure)
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
