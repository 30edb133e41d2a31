"""Figures of README.md and docs/ are those of benchmarks/results: steps, caches, GPUs."""

import math
import re
import sys

import numpy
import pytest
from told import NUMBER, ROOT, SHAPES, are, result, table, tables, text

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "samples")]

import step  # noqa: E402

from dit_sparse import Auto  # noqa: E402


def test_step_caches():
    told = table("docs/performance.md", "with a step cache")
    records = result("caches_cpu_wan_tiny")["records"][1:]  # after dense without a cache
    assert len(told) == len(records)
    for cells, r in zip(told.values(), records):
        values = r["effective_cost"], r["speedup"], r["psnr"]
        if r["method"] != "dense" and r["cache"]:
            product = r["product"]["effective_cost"], r["product"]["speedup"]
            values = values[0], product[0], values[1], product[1], values[2]
        assert are([cell for cell in cells if cell], *values)
    names = [f"{r['method'].split(':')[0]}, {r['cache'] or 'none'}" for r in records]
    assert all(row.startswith(name) for row, name in zip(told, names))


def test_step_caches_on_a_gpu():
    of = {}
    for r in result("caches_h200")["records"]:
        what = r["method"], r["cache"] and r["cache_options"].get("threshold", "MagCache")
        of.setdefault(what, {})[r["pipeline"]] = r
    ranges = [
        " to ".join(f"{end([r['speedup'] for r in of[what].values()]):.2f}" for end in (min, max))
        for what in (("dense", 0.2), ("auto", None), ("auto", 0.2))
    ]
    costs = [r["effective_cost"] for r in of["auto", 0.2].values()]
    nothing = [
        of[method, 0.05][box]["seconds"] / r["seconds"]
        for (method, cache), boxes in of.items()
        for box, r in boxes.items()
        if cache is None
    ]
    assert (
        "{} times as fast with FirstBlockCache 0.2 alone, {} times with `auto` alone and {} times "
        "with both, at costs of {:.2f} to {:.2f}.".format(*ranges, min(costs), max(costs))
    ) in text("docs/performance.md")
    assert f"take {min(nothing):.2f} to {max(nothing):.2f} times as long" in text(
        "docs/performance.md"
    )


def test_several_gpus():
    found = result("ulysses_h200x2")
    schedules, kinds = found["schedules"], found["kinds"]
    gain = f"{schedules[0]['speedup_by_gpus']:.2f} times as fast as one"
    assert gain in text("README.md") and gain in text("docs/performance.md")
    assert f"dense {kinds['dense']['speedup']:.2f} times" in text("docs/performance.md")
    told = f"{kinds['reuse']['speedup']:.2f} times (reuse) to {kinds['search']['speedup']:.2f}"
    told += " times (search) as fast. The exchange takes "
    told += f"{kinds['reuse']['exchange_share']:.0%} of a reuse"
    assert told in text("docs/several_gpus.md")
    rows = table("docs/several_gpus.md", "50 steps, seconds")
    for schedule in schedules:
        cells = rows[f"density {schedule['density']:g}, search at {schedule['search_at']}"]
        told = [cell.split()[0] for cell in cells[1:3]]
        assert told == [f"{seconds:.4g}" for seconds in schedule["seconds_50"].values()]


def test_from_how_many_tokens_on():
    ms = {
        (f"{row['tokens']:,}", row["method"], row["kind"]): row["seconds"] * 1e3
        for row in result("crossover_h200")["rows"]
        if (row["heads"], row["dim"]) == (24, 128)
    }
    columns = [("dense", "dense"), ("auto", "reuse"), ("auto", "search"), ("adaspa", "reuse")]
    columns += [("adaspa", "search"), ("adaspa-sampled", "search")]
    for tokens, cells in table("docs/performance.md", "tokens", "dense").items():
        assert are(cells, *(ms[tokens, *column] for column in columns))


STEPS = {
    "Wan 1.3B 480p, compiled": ("step_wan-1.3b_h100", True),
    "Wan 1.3B 480p, eager": ("step_wan-1.3b_h100", False),
    "HunyuanVideo 720p, eager": ("step_hunyuanvideo_h100", False),
}
STEPS_H200 = {
    "auto": {
        "HunyuanVideo 720p": "hunyuanvideo-720p_auto",
        "HunyuanVideo 720p, flash-attn-4": "hunyuanvideo-720p_auto_fa4",
        "Wan 1.3B 480p": "wan-1.3b-480p_auto",
        "Wan 1.3B 480p, compiled": "wan-1.3b-480p_auto",
        "CogVideoX-5B 480p": "cogvideox-5b-480p_auto",
    },
    "adaspa-sampled": {
        "HunyuanVideo 720p": "hunyuanvideo-720p_adaspa-sampled",
        "HunyuanVideo 720p, blocks of 128": "hunyuanvideo-720p_adaspa-sampled_128",
        "Wan 14B 720p": "wan-14b-720p_adaspa-sampled",
        "Wan 14B 720p, blocks of 128": "wan-14b-720p_adaspa-sampled_128",
        "CogVideoX-5B 480p": "cogvideox-5b-480p_adaspa-sampled",
    },
}
COSTS_H200 = {"auto": (0.35, 0.26, 0.29, 0.18), "adaspa-sampled": (0.37, 0.29, 0.29, 0.21)}


def schedules(name, compiled, density):
    found = result(name)["schedules"]
    return [s for s in found if (s["compiled"], s["density"]) == (compiled, density)]


def are_times(cells, dense, found):
    assert are(re.findall(NUMBER, dense), found[0]["dense_seconds_50"])
    for cell, schedule in zip(cells, found, strict=True):
        assert are(re.findall(NUMBER, cell), schedule["seconds_50"], schedule["speedup"])


def test_autos_own_schedule():
    counts, told = step.counts_of(Auto().search_at), []
    for model in ("hunyuanvideo-720p", "wan-1.3b-480p", "cogvideox-5b-480p"):
        found = result(f"step_{model}_auto_h200")
        for compiled in (False, True):
            rows = [r for r in found["rows"] if r["compiled"] == compiled]
            kinds = {r["kind"]: r for r in rows if r["density"] in (0.1, 1.0, None)}
            if not kinds:
                continue
            seconds = sum(count * kinds[kind]["seconds"] for kind, count in counts.items())
            cost = sum(count * kinds[kind]["cost"] for kind, count in counts.items()) / 50
            speedup = 50 * kinds["dense"]["seconds"] / seconds
            told.append((seconds * len(found["branches"]), speedup, cost))
    (large, *of_large), small = told[0], [f"{speedup:.2f}x" for _, speedup, _ in told[1:]]
    page = text("docs/performance.md")
    assert f"{large:.0f} s and {of_large[0]:.2f}x at cost {of_large[1]:.2f} for Hun" in page
    assert "{} for Wan 1.3B, {} compiled, and {} for CogVideoX".format(*small) in page


def test_whole_videos():
    costs = "0.40", "0.32", "0.24"
    rows = table("docs/performance.md", "model", "dense", f"at effective cost {costs[0]}")
    assert list(rows) == list(STEPS)
    for model, (name, compiled) in STEPS.items():
        found = schedules(name, compiled, 0.2)[: len(costs)]
        assert are(list(costs), *(schedule["effective_cost"] for schedule in found))
        are_times(rows[model][1:], rows[model][0], found)


@pytest.mark.parametrize("method, density", [("auto", 0.1), ("adaspa-sampled", 0.2)])
def test_whole_videos_on_an_h200(method, density):
    rows = table("docs/performance.md", method, "rest")
    beside = table("docs/log.md", "", "search", "selection, lists, order")
    assert list(rows) == list(STEPS_H200[method])
    for model, (rest, dense, *cells) in rows.items():
        name, compiled = f"step_{STEPS_H200[method][model]}_h200", "compiled" in model
        found = schedules(name, compiled, density)[: len(cells)]
        are_times(cells, dense, found)
        costs = [schedule["effective_cost"] for schedule in found]
        assert costs == pytest.approx(COSTS_H200[method], abs=0.02)
        forwards = result(name)["rows"]
        (stock,) = (r for r in forwards if (r["kind"], r["compiled"]) == ("dense", compiled))
        assert are([rest], stock["rest_s"] / stock["seconds"])
        if told := beside.get(f"{model}, {method}"):
            share = shares_beside(found[0], stock, model.removesuffix(", flash-attn-4"))
            assert are([cell for cell in told if cell], *(100 * x for x in share if x is not None))


def test_how_much_faster_the_readme_says():
    heads = ["model, dense attention beside it", "method"]
    (told,) = (t[2:] for t in tables("README.md") if t[0][:2] == heads)
    beside = {
        "HunyuanVideo 720p, torch's (cuDNN)": "HunyuanVideo 720p",
        "HunyuanVideo 720p, flash-attn-4": "HunyuanVideo 720p, flash-attn-4",
        "Wan 14B 720p, flash-attn-4": "Wan 14B 720p",
        "Wan 1.3B 480p, torch's, compiled": "Wan 1.3B 480p, compiled",
        "CogVideoX-5B 480p, torch's": "CogVideoX-5B 480p",
    }
    assert {row[0] for row in told} == set(beside)
    for model, method, *cells in told:
        method, _, blocks = method.partition(", ")
        name = beside[model].removesuffix(", flash-attn-4" if blocks else "-")
        name = STEPS_H200[method][f"{name}, {blocks}" if blocks else name]
        density = {"auto": 0.1, "adaspa-sampled": 0.2}[method]
        found = schedules(f"step_{name}_h200", "compiled" in model, density)[:2]
        values = [x for s in found for x in (s["effective_cost"], s["speedup"])]
        assert are([cell.removesuffix("x") for cell in cells], *values)


@pytest.mark.parametrize("model", ["hunyuanvideo-720p", "wan-14b-720p"])
def test_what_no_kernel_can_pass(model):
    found = result(f"step_{model}_adaspa-sampled_128_h200")
    (stock,) = (r for r in found["rows"] if r["kind"] == "dense")
    rest = stock["rest_s"] / stock["seconds"]
    told = table("docs/log.md", "50 steps beside flash-attn-4, blocks of 128")
    name = next(name for name in STEPS_H200["adaspa-sampled"] if name.lower()[:3] == model[:3])
    _, limits, measured = told[name]
    assert are(re.findall(NUMBER, limits), *(1 / (rest + (1 - rest) * c) for c in (0.2, 0.3, 0.4)))
    schedules = found["schedules"]
    costs, seconds = ([s[of] for s in schedules] for of in ("effective_cost", "seconds_50"))
    line = numpy.polyfit(costs, seconds, 1)
    assert max(abs(numpy.polyval(line, costs) - seconds)) < 0.2
    speedups = schedules[0]["dense_seconds_50"] / numpy.polyval(line, (0.2, 0.3, 0.4))
    assert are(re.findall(NUMBER, measured), *speedups)


def shares_beside(schedule, stock, model):
    """Of dense attention: search, selection, outside of attention, tail and residual, all."""
    search, beside = schedule["search_share"], schedule["overhead_share"]
    outside = schedule["overhead_share_by_difference"] - beside
    if schedule["density"] == 0.2:
        return search, beside, outside, None, search + beside + outside
    steps = schedule["steps"]
    sparse = steps["first reuse"] + steps["reuse"]
    alone = (50 - sparse + sparse * sparse_seconds(model) / stock["attention_s"]) / 50
    tail = schedule["effective_time"] - search - beside - alone
    return search, beside, outside, tail, search + beside + outside + tail


def sparse_seconds(model):
    """Of the sparse kernel at `auto`'s density, all layers."""
    (kernel,) = (
        record["ms"] / 1000
        for record in result("kernels_h200")["records"]
        if (record["shape"], record["engine"]) == (SHAPES[model], "triton")
        if (record["block"], record["density"], record["mask"]) == ([64, 64], 0.1, "random")
        if record["run"] < 3  # the kernels with which steps were timed
    )
    return {"wan-1.3b": 30, "hunyuanvideo-720p": 60}[SHAPES[model]] * kernel


def test_overhead_of_autos_own_searches():
    counts, told = step.counts_of(Auto().search_at), []
    for model, file in (
        ("HunyuanVideo 720p", "hunyuanvideo-720p_auto"),
        ("HunyuanVideo 720p", "hunyuanvideo-720p_auto_fa4"),
        ("Wan 1.3B 480p", "wan-1.3b-480p_auto"),
    ):
        rows = {r["kind"]: r for r in result(f"step_{file}_h200")["rows"] if not r["compiled"]}
        dense, rest = rows["dense"]["attention_s"], rows["dense"]["rest_s"]
        sparse = counts["first reuse"] + counts["reuse"]
        needed = (50 - sparse) * dense + sparse * sparse_seconds(model)
        took = sum(count * (rows[kind]["seconds"] - rest) for kind, count in counts.items())
        told.append(f"{100 * (took - needed) / (50 * dense):.1f}")
    sentence = "last column is {}% beside cuDNN, {} beside flash-attn-4 at HunyuanVideo and {} at"
    assert sentence.format(*told) in text("docs/log.md")


def test_what_masks_take_at_least():
    bits = -(0.2 * math.log2(0.2) + 0.8 * math.log2(0.8))
    page = text("docs/log.md")
    large = 24 * 60 * (-(-118860 // 64)) ** 2 * bits / 8 / 1e6
    assert f"are {large:.0f} MB; at Wan 14B" in page
    of = [40 * 40 * 2 * (-(-75600 // block)) ** 2 * bits / 8 / 1e6 for block in (64, 128)]
    assert f"guidance, {of[0]:.0f} MB with blocks of 64" in page
    assert f"and {of[1]:.0f} MB with 128" in page
