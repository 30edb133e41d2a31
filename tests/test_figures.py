"""Figures of README.md and docs/ are those of benchmarks/results."""

import json
import math
import re
import sys
from pathlib import Path
from statistics import mean

import numpy
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "samples")]

import pareto  # noqa: E402
import step  # noqa: E402

from dit_sparse import Auto, available_methods  # noqa: E402
from dit_sparse.api import make_config  # noqa: E402
from dit_sparse.preset import read_preset  # noqa: E402

NUMBER = r"[0-9.]+"
BOXES = "wan_tiny", "hunyuan_video_tiny", "cogvideox_tiny"
SHAPES = {"Wan 1.3B 480p": "wan-1.3b", "HunyuanVideo 720p": "hunyuanvideo-720p"}
SHAPES |= {"CogVideoX-5B": "cogvideox-5b"}


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def text(page):
    return " ".join((ROOT / page).read_text().split())


def tables(page):
    """Rows of cells, without bold and code marks, of each table of a page."""
    blocks = re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    lines = [re.sub(r"[*`]", "", block).splitlines() for block in blocks]
    return [[[c.strip() for c in row.strip("|").split("|")] for row in block] for block in lines]


def table(page, *heads):
    """The rows, by their first cell, of the one table whose head begins with these cells."""
    (found,) = (t for t in tables(page) if t[0][: len(heads)] == list(heads))
    return {row[0]: row[1:] for row in found[2:]}


def are(told, *values):
    """Whether numbers as they stand in a text are these, rounded."""
    digits = [len(number.partition(".")[2]) for number in told]
    return told == [f"{value:.{count}f}" for value, count in zip(values, digits, strict=True)]


def test_readme_pareto():
    found = result("pareto")
    budgets = "0.2", "0.3", "0.4", "0.6"
    for name, cells in table("README.md", "effective cost at most", *budgets).items():
        best = {
            str(budget): f"{record['psnr']:.1f}"
            for record in found["records"]
            if name == f"{record['pipeline']}, {record['method']}"
            for budget in record.get("budgets", ())
        }
        assert best and cells == [best.get(budget, "-") for budget in budgets]
    lines = [found["lines"][place] for box in BOXES for place in found["lines"] if box in place]
    floor, chance = (
        "{:.1f}, {:.1f} and {:.1f}".format(*(line[of]["psnr"] for line in lines))
        for of in ("noise_floor", "chance")
    )
    assert f"kernel gives {floor} dB, another seed {chance}" in text("README.md")


def best_of_budgets(name):
    """{(pipeline, method): {budget: record}}"""
    found = {}
    for record in result(name)["records"]:
        for budget in record.get("budgets", ()):
            found.setdefault((record["pipeline"], record["method"]), {})[budget] = record
    return found


def test_the_rest_of_the_field():
    best = best_of_budgets("pareto")
    told = table("docs/field.md", "method", "Wan", "HunyuanVideo", "CogVideoX")
    for method, cells in told.items():
        for box, cell in zip(BOXES, cells, strict=True):
            of = best.get((box, method))
            of = of and {budget: f"{record['psnr']:.1f}" for budget, record in of.items()}
            budgets = (0.2, 0.3, 0.4, 0.6)
            assert cell == (" / ".join(of.get(b, "-") for b in budgets) if of else "")
    in_readme = {
        "auto",
        "adaspa",
        "draftattention",
        "rettention",
        "sparse-vdit",
        "window",
        "random",
    }
    assert {method for _, method in best} - in_readme == {*told} - {"auto"}
    costs = [
        r["effective_cost"]
        for r in result("pareto")["records"]
        if r.get("published") and r["method"] in ("svg2", "sparge", "xattention")
    ]
    assert f"cost {min(costs):.2f} to {max(costs):.2f} here" in text("docs/field.md")


def ahead(best, box, by):
    """{budget: dB by which `auto` is ahead of all that cost or take no more}"""
    others = [of for (b, method), of in best.items() if b == box and method != "auto"]
    every = [record for of in others for record in of.values()]
    margins = {}
    for budget, auto in best[box, "auto"].items():
        rivals = [of[budget] for of in others if budget in of]
        if by == "effective_time":
            rivals = [r for r in every if r[by] <= auto[by]]
        margins[budget] = auto["psnr"] - max(r["psnr"] for r in rivals)
    return margins


def test_how_far_auto_is_ahead_of_the_field():
    best = best_of_budgets("pareto")
    by_cost = [margin for box in BOXES for margin in ahead(best, box, "effective_cost").values()]
    assert min(by_cost) > 0
    by_time = [margin for box in BOXES for margin in ahead(best, box, "effective_time").values()]
    told = (
        f"At {sum(m > 0 for m in by_time)} of its {len(by_time)} points nothing that takes no more"
        f" time is as near to dense, at {sum(m >= 2 for m in by_time)} of them nothing within 2 dB"
    )
    assert told in text("README.md")
    for box, least in zip(BOXES, (5, 5)):  # all but Re-ttention on Wan and HunyuanVideo
        rest = {k: of for k, of in best.items() if k[1] != "rettention"}
        assert min(ahead(rest, box, "effective_cost").values()) >= least


def test_what_is_ahead_by_more_than_chance():
    by_chance = {
        (r["pipeline"], r["method"], r["budget"])
        for r in result("pareto")["paired"]
        if r["minus"] == "auto" and r["interval"][1] >= 0
    }
    assert by_chance == {("wan_tiny", "rettention", budget) for budget in (0.4, 0.6)}
    told = "but for `rettention` on Wan at 0.4, where the two are alike, and 0.6"
    assert told in text("README.md")


def test_one_prompt_is_in_both_sets():
    """Known and told: other prompts would void all curves."""
    tuning = {*pareto.Clips.drawn(10, 1, pareto.TUNING_SEED).prompts}
    test = pareto.Clips.drawn(20, 2, pareto.TEST_SEED).prompts
    assert len(tuning & {*test}) == 1
    assert not tuning & {*pareto.Clips.drawn(8, 1, 77).prompts}
    most = 0
    for r in result("pareto")["records"]:
        apart = [p for prompt, p in zip(test, r["psnr_per_clip"]) if prompt not in tuning]
        most = max(most, abs(sum(apart) / len(apart) - r["psnr"]))
    assert f"without which means move by at most {most:.1f} dB" in text("README.md")


def test_beyond_psnr():
    best, told = best_of_budgets("pareto"), table("docs/field.md", "at cost 0.2", "SSIM")
    for name, cells in told.items():
        box, method = name.split(", ")
        if method in available_methods():
            r = best[box, method][0.2]
            values = [r["ssim"], r["kept_mass"], r["velocity_error"], r["flicker"]]
        else:
            lines = result("pareto")["lines"]
            r = next(lines[place]["noise_floor"] for place in lines if box in place)
            values, cells = [r["ssim"], r["flicker"]], [cell for cell in cells if cell]
        follows = r["prompt_following"]
        percent = [100 * follows["shape"], 100 * follows["direction"]]
        assert are(cells, *values, *percent), name


def test_over_200_videos():
    best, told = best_of_budgets("pareto_follow"), table("docs/field.md", "of 200 videos", "PSNR")
    asks = ("colour", "shape", "direction", "speed")
    shapes, followed = {}, result("pareto_follow")
    for name, cells in told.items():
        box, method, budget = re.fullmatch(r"(\w+), (.+?)(?: at ([\d.]+))?", name).groups()
        if budget:
            r = best[box, method][float(budget)]
            last = [r["seams"], r["flicker"]]
        else:
            lines = followed["lines"]
            r = next(lines[place]["noise_floor"] for place in lines if box in place)
            last, cells = [r["flicker"]], [cell for cell in cells if cell]
        assert r["prompts"] * r["seeds"] == 200
        assert are(cells, r["psnr"], *(100 * r["prompt_following"][of] for of in asks), *last), name
        shapes[box, method, budget] = cells[2]
    readme = text("README.md")
    names = (
        ("auto", "0.2"),
        ("dense by another kernel", None),
        ("rettention", "0.2"),
        ("adaspa", "0.2"),
    )
    wan, *others = ([shapes[box, *name] for name in names] for box in BOXES)
    assert "on Wan in {}% with `auto` (dense {}), {}% with `rettention`, {}%".format(*wan) in readme
    for model, cells in zip(("HunyuanVideo", "CogVideoX"), others, strict=True):
        assert "{} in {} (dense {}), {} and {}%".format(model, *cells) in readme

    floors = {place.split()[0]: line["noise_floor"] for place, line in followed["lines"].items()}

    def lost(box, method, budget):
        dense, there = floors[box], best[box, method][budget]
        points = dense["prompt_following"]["shape"] - there["prompt_following"]["shape"]
        return f"{100 * points:.1f}".removesuffix(".0")

    page, (wan, hunyuan, cogvideox) = text("docs/field.md"), BOXES
    auto = [lost(box, "auto", 0.2) for box in (cogvideox, hunyuan)]
    rettention = [lost(box, "rettention", 0.2) for box in (cogvideox, hunyuan, wan)]
    assert "loses {} points of CogVideoX's shapes and {} of HunyuanVideo's".format(*auto) in page
    assert "HunyuanVideo's, `rettention` {} and {}, and {} on Wan.".format(*rettention) in page
    vdit = [lost(box, "sparse-vdit", 0.4) for box in (hunyuan, cogvideox, wan)]
    assert "({} and {} points less than dense) and fewer on Wan ({} less)".format(*vdit) in page
    (gap,) = (
        pair
        for pair in followed["paired"]
        if (pair["pipeline"], pair["method"], pair["budget"]) == (BOXES[0], "rettention", 0.4)
    )
    low, high = sorted(-end for end in gap["interval"])
    assert f"{-gap['psnr']:.1f} dB ({low:.1f} to {high:.1f})" in readme
    assert accuracy_of_speed() in text("docs/field.md")


def accuracy_of_speed():
    report = result("prompt_check_hunyuan_video_tiny_true_cfg")
    return f"slow and fast right in {report['checker_on_drawn_clips']['speed']:.0%} of drawn clips"


def test_rules_that_only_pick_blocks_on_cogvideox():
    best = best_of_budgets("pareto")
    with_more = "auto", "llsa", "sol-attn", "scatterbrain", "rettention"
    picking = [of for (box, m), of in best.items() if box == BOXES[2] and m not in with_more]
    random = best[BOXES[2], "random"]
    for budget in (0.2, 0.3, 0.4):
        most = max(of[budget]["psnr"] for of in picking if budget in of)
        assert most - random[budget]["psnr"] <= 3
    assert "up to 0.4 on CogVideoX no more than 3 dB above a random mask" in text("docs/field.md")


def test_curves_of_settings_of_the_past_are_in_italics():
    found = result("pareto")["records"]
    grid = pareto.grid_of(pareto.parse(["--out", "pareto.json"]))
    stale = {(r["method"], r["pipeline"]) for r in pareto.stale(found, grid, tuned=True)}
    rows = [line.split("|") for line in (ROOT / "docs/field.md").read_text().splitlines()]
    told = {
        (row[1].strip(" `"), box)
        for row in rows
        for box, cell in zip(BOXES, row[2:5])
        if " / " in cell and cell.strip().startswith("*")
    }
    assert told == stale
    run = {(r["method"], r["pipeline"]) for r in found}
    missing = {(method, box) for method in available_methods() for box in BOXES} - run
    assert not missing


@pytest.mark.parametrize("box", BOXES)
def test_presets(box):
    file = ROOT / f"samples/presets/{box}_h200.json"
    preset, stored = read_preset(file), json.loads(file.read_text())
    trials, wanted = stored["evidence"]["trials"], stored["evidence"]["wanted_psnr"]
    chosen = min((t for t in trials if t["psnr"] >= wanted), key=lambda t: t["effective_cost"])
    config, _ = make_config(str(file), {})
    assert config == Auto(**preset.options) == Auto(**chosen["options"])
    told = table("docs/choosing.md", "preset")[f"[{box}](../samples/presets/{box}_h200.json)"]
    assert are(told, chosen["psnr"], chosen["effective_cost"])


def test_larger_videos():
    told = table("docs/performance.md", "settings of the effective cost, larger videos")
    rows = 0
    for size in ("192", "256"):
        for (box, method), of in best_of_budgets(f"pareto_{size}").items():
            cells = told[f"{box} {size}x{size}, {method}"]
            for cell, budget in zip(cells, (0.2, 0.3, 0.4, 0.6), strict=True):
                assert are(
                    re.findall(NUMBER, cell), of[budget]["psnr"], of[budget]["effective_time"]
                )
            rows += 1
    assert rows == len(told)


def test_how_far_auto_is_ahead_at_14400_tokens():
    best = best_of_budgets("pareto_192")
    by_time = (ahead(best, box, "effective_time") for box in BOXES)
    assert min(margin for of in by_time for margin in of.values()) >= 4
    leads = []
    for box in BOXES:
        curve = [best[box, "rettention"][budget] for budget in (0.2, 0.3, 0.4, 0.6)]
        costs, psnrs = ([r[of] for r in curve] for of in ("effective_cost", "psnr"))
        for mine in best[box, "auto"].values():
            if mine["effective_cost"] >= costs[0]:
                at = numpy.interp(mine["effective_cost"], costs, psnrs)
            else:  # the line of the first two goes on
                slope = (psnrs[1] - psnrs[0]) / (costs[1] - costs[0])
                at = psnrs[0] + slope * (mine["effective_cost"] - costs[0])
            leads.append(mine["psnr"] - at)
    told = f"{min(leads):.1f} to {max(leads):.1f} dB ahead of"
    assert told in text("README.md") and told in text("docs/performance.md")


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


def test_time_of_auto_on_the_small_pipelines():
    auto = [r for r in result("pareto")["records"] if r["method"] == "auto"]
    timed = [r for r in auto if r["effective_time"] is not None]
    times, costs = ([r[f"effective_{of}"] for r in timed] for of in ("time", "cost"))
    told = f"{min(times):.2f} to {max(times):.2f} of dense attention's time"
    assert f"takes {told} at costs of {min(costs):.2f} to {max(costs):.2f}" in text(
        "docs/performance.md"
    )
    assert f"`auto` took {told}" in text("docs/choosing.md")


def test_parts_of_auto():
    rows = table("docs/log.md", "variant", "PSNR")
    records = result("ablation_auto")["records"]
    assert rows == {r["method"]: [f"{r['psnr']:.1f}"] for r in records}


def test_damping_and_finer_means():
    gained = {}
    for box in BOXES:
        records = [r for r in result("damping_h200")["records"] if r["pipeline"] == box]
        before = {
            (*r["search_at"], r["density"]): r["latent_psnr"]
            for r in records
            if (r["damping"], r["tail_tokens"]) == (0, 64)
        }
        for r in records:
            gain = r["latent_psnr"] - before[*r["search_at"], r["density"]]
            of = f"{r['damping']:g}, {r['tail_tokens']}"
            gained.setdefault(of, {}).setdefault(box, []).append(gain)
    for name, cells in table("docs/log.md", "damping, means of").items():
        for cell, gains in zip(cells, gained[name].values(), strict=True):
            mean = sum(gains) / len(gains)
            assert are(re.findall(r"-?[0-9.]+", cell), mean, min(gains), max(gains))


def test_damping_and_flicker():
    records = {(r["pipeline"], r["method"]): r for r in result("trials_h200")["records"]}
    head = "auto:search_at=(0,0.125,0.3536,0.6495),density=0.09,"
    for damping, cells in table("docs/log.md", "damping", "Wan").items():
        own = f"share_guidance=all,damping={float(damping)}"
        setting = "tail_tokens=32,share_guidance=all" if damping == "0.25" else own
        for cell, box in zip(cells, BOXES, strict=True):
            (found,) = (
                r for (b, method), r in records.items() if (b, method) == (box, head + setting)
            )
            assert are(re.findall(NUMBER, cell), found["psnr"], found["flicker"])


def test_more_damping_on_test_prompts():
    place = "cogvideox_tiny", "auto"
    more, as_is = (
        best_of_budgets(name)[place] for name in ("damping_half_cogvideox_tiny", "pareto")
    )
    gains = [round(more[b]["psnr"] - as_is[b]["psnr"], 1) for b in (0.2, 0.3, 0.4, 0.6)]
    assert gains == [1.1, -1.1, -1.3, -0.3]
    flicker = [round(of[b]["flicker"], 2) for of in (more, as_is) for b in (0.4, 0.6)]
    told = "is {:.2f} and {:.2f} in place of {:.2f} and {:.2f}".format(*flicker)
    assert told in text("docs/log.md")


def test_tuning_prompts():
    chosen, *others = sorted(
        result("tuning_prompts_cpu_wan_tiny")["records"], key=lambda r: r["error"]
    )
    told = "{:.3f} for what it chose (0.17, five searches from 0.08), {:.3f} for 0.17 with three"
    assert told.format(chosen["error"], others[0]["error"]) in text("docs/log.md")
    assert f"{others[1]['error']:.3f} for 0.09" in text("docs/log.md")
    pairs = zip(chosen["error_per_prompt"], others[0]["error_per_prompt"])
    gains = sorted((b - a for a, b in pairs), reverse=True)
    assert sum(gain > 0 for gain in gains) == 6 and sum(gains[2:]) < 0


def test_what_guidance_shares():
    """At equal schedules; a residual that follows changes is refreshed every second time."""
    records = [r for r in result("schedules_h200")["records"] if r["trial"] == 2]
    settings = 0.1, 32, 0.25, "fp8"
    names = "density", "tail_tokens", "damping", "residual"
    for name, cells in table("docs/log.md", "", "Wan, mask").items():
        steps = [int(step) for step in name.split(",")]
        cells = iter(cells)
        for box in ("wan_tiny", "cogvideox_tiny"):
            for shares in ("mask", "change", "all"):
                (found,) = (
                    r
                    for r in records
                    if (r["pipeline"], r["search_steps"], r["shares"]) == (box, steps, shares)
                    if tuple(r[name] for name in names) == settings
                    if shares != "change" or r["own_refresh_at"] == steps[::2]
                )
                told = re.findall(NUMBER, next(cells))
                assert are(told, found["latent_psnr"], found["effective_cost"])


def test_claims_of_the_seed_papers():
    both = "rho and residual"
    rows = {
        "2 searches over 1": ("reuse", "2 searches minus 1 searches"),
        "4 searches over 1": ("reuse", "4 searches minus 1 searches"),
        "a search at every step over 1": ("reuse", "every step minus 1 searches"),
        "rho over nothing": ("residual", "rho minus nothing"),
        "a residual over nothing": ("residual", "residual minus nothing"),
        "both, as published, over nothing": ("residual", f"{both}, as published minus nothing"),
        "both, clamped, over nothing": ("residual", f"{both}, clamped minus nothing"),
        "both, means of 64 tokens, over nothing": (
            "residual",
            f"{both} of 64 tokens minus nothing",
        ),
        "a table of the judged prompts over one of others": (
            "table",
            "the same prompts minus other prompts",
        ),
    }
    told = table("docs/log.md", "difference", "Wan")
    published = told.pop("both, as published, over a residual")
    of_rows = told.pop("the map's best blocks over those of every row")
    assert list(told) == list(rows)
    for place, box in enumerate(BOXES):
        found = {claim: of["paired"] for claim, of in result(f"claims_{box}")["claims"].items()}
        for name, (claim, difference) in rows.items():
            values = found[claim][difference]
            numbers = re.findall(r"-?[0-9.]+", told[name][place])
            assert are(numbers, values["psnr"], *values["psnr_ci95"])
        (paired,) = result(f"claims_rows_{box}")["claims"]["rows"]["paired"].values()
        numbers = re.findall(r"-?[0-9.]+", of_rows[place])
        assert are(numbers, paired["psnr"], *paired["psnr_ci95"])
        names = f"{both}, as published", "residual"
        with_rho, alone = (found["residual"][f"{name} minus nothing"]["psnr"] for name in names)
        assert are([published[place].split()[0]], with_rho - alone)


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


@pytest.mark.parametrize("box", BOXES)
def test_readme_quality(box):
    def told(values):
        low, high = values["psnr_ci95"]
        return f"{values['psnr']:.1f} ({low:.1f} to {high:.1f})"

    found = result(f"quality_{box}")
    (adaspa,) = (row for row in found["rows"] if row["name"] == "adaspa")
    floors = [found["paired"][f"adaspa minus {name}"] for name in ("window", "random")]
    expected = [f"{adaspa['effective_cost']:.2f}", told(adaspa), *map(told, floors)]
    assert table("README.md", "", "cost", "PSNR, dB")[box] == expected


def test_token_orders_and_block_sizes():
    found = {row["name"]: f"{row['psnr']:.1f}" for row in result("ablation_order_block")["rows"]}
    names = "32", "64", "128", "32, time of 64", "128, time of 64"
    rows = table("docs/performance.md", "order", "block 32")
    assert [order.split()[0] for order in rows] == ["raster", "patch", "tile", "curve"]
    for order, cells in rows.items():
        assert cells == [found[f"{order.split()[0]} {name}"] for name in names]


def test_kernels():
    rows, gains = table("docs/performance.md", "shape", "cuDNN dense"), []
    for name, cells in rows.items():
        ms = {
            (record["engine"], record.get("block", [0])[0]): record["ms"]
            for record in result("kernels_h100")["records"]
            if record["shape"] == SHAPES[name.split(":")[0]] and record.get("mask") != "random"
        }
        cudnn, fa4, ours, peer, large, large_peer = cells
        assert are([cudnn, fa4], ms["sdpa-cudnn", 0], ms["fa4-dense", 0])
        assert are([ours, peer], ms["triton (64, 64, 4, 2, gluon)", 64], ms["fa4", 64])
        assert are([large_peer], ms["fa4", 128])
        tiles = [x for (engine, block), x in ms.items() if block == 128 and "triton" in engine]
        assert any(are([large], x) for x in tiles)
        gains.append(min(float(cudnn), float(fa4)) / float(ours))
    told = f"{min(gains):.1f} to {max(gains):.1f} times as fast"
    assert told in text("README.md") and told in text("docs/performance.md")


def test_kernels_on_an_h200():
    records, ratios = result("kernels_h200")["records"], {64: [], 128: []}
    for name, cells in table("docs/performance.md", "shape, masks, density").items():
        shape, masks, density = name.split(", ")
        place = {"shape": SHAPES[shape], "mask": masks.split()[0]}
        place |= {"density": float(density.split()[1])}
        found = {
            (record["block"][0], record["engine"]): record["tflops"]
            for record in records
            if place.items() <= record.items() and "tflops" in record
        }
        columns = [(64, "triton"), (64, "fa4"), (128, "triton"), (128, "fa4")]
        assert are(cells, *(found[column] for column in columns))
        for block in ratios:
            ratios[block].append(found[block, "triton"] / found[block, "fa4"])
    small, large = (f"{min(r):.2f} to {max(r):.2f} times" for r in ratios.values())
    told = f"blocks of 64 ours are {small} as fast as flash-attn-4, with blocks of 128 {large}"
    assert told in text("docs/performance.md")


def test_searches():
    records = [r for r in result("kernels_h200")["records"] if r["run"] == 3]
    rows = {
        "exact block mass": ["block_mass"],
        "mass of sampled rows": ["sampled_mass"],
        "selection and lists": ["selection", "lists"],
        "tokens into block order, once a step": ["reorder"],
    }
    told = table("docs/performance.md", "", "wanted")
    assert list(told) == list(rows)
    for place, shape in enumerate(SHAPES.values()):
        found = {
            r["engine"]: r
            for r in records
            if r["shape"] == shape and r.get("block", [64]) != [128, 128]
            if r.get("density", 0.2) == 0.2 or r["engine"] == "fa4-dense"
        }
        dense = found["fa4-dense"]["ms"]
        for name, engines in rows.items():
            parts = [found[engine] for engine in engines]
            times = [[part.get(of) for part in parts] for of in ("ms", "busy_ms")]
            shares = [sum(ms) / dense for ms in times if None not in ms]
            assert are(re.findall(NUMBER, told[name][1 + place]), *shares)


def test_blocks_of_128_beside_flash_attn_4():
    rates = {
        (r["shape"], r["mask"], r["density"], r["engine"]): r["tflops"]
        for r in result("kernels_h200")["records"]
        if r.get("block") == [128, 128] and "mask" in r and "tflops" in r
    }
    every = []
    for name, cells in table("docs/log.md", "shape", "random, 0.5 / 0.2 / 0.1").items():
        shape = SHAPES[name.split(",")[0]] + ("-aligned" if "," in name else "")
        for masks, cell in zip(("random", "real"), cells, strict=True):
            cases = [(shape, masks, density) for density in (0.5, 0.2, 0.1)]
            ratios = [rates[*case, "triton"] / rates[*case, "fa4"] for case in cases]
            assert are(cell.split(" / "), *ratios)
            every += ratios
    told, page = f"{min(every):.2f} to {max(every):.2f}", text("docs/log.md")
    assert len(every) == 36 and f"{told} of flash-attn-4" in page
    wanted = [
        ratio >= (1.0 if name.endswith("aligned") else 0.97)
        for (name, *case, engine), rate in rates.items()
        if engine == "triton"
        for ratio in [rate / rates[name, *case, "fa4"]]
    ]
    assert f"{sum(wanted)} of the 36 cases" in page and len(wanted) == 36
    busy = {}
    for r in result("kernels_h200")["records"]:
        if r["run"] in (2, 4) and "busy_ms" in r:
            place = r["shape"], r.get("mask"), r.get("density")
            busy.setdefault(place, {})[r["engine"]] = r
    pairs = [(of["fa4"], of["triton"]) for of in busy.values() if {"fa4", "triton"} <= set(of)]
    ratios = [fa4["busy_ms"] / ours["busy_ms"] for fa4, ours in pairs]
    assert len(pairs) == 10 and {ours["density"] for _, ours in pairs} == {0.1, 0.2}
    assert f"ours is {min(ratios):.2f} to {max(ratios):.2f} there" in page
    waits = [1 - of["busy_ms"] / of["ms"] for pair in pairs for of in pair]
    assert 0.08 < min(waits) and max(waits) < 0.24


def test_cases_of_kernels_on_an_h200():
    records = result("kernel_cases_h200")["records"]
    assert f"in {len(records)} cases beside torch" in text("docs/performance.md")
    for r in records:
        errors = [name for name in r if f"{name}_limit" in r]
        assert not r.get("error") and all(r[name] <= r[f"{name}_limit"] for name in errors)


def test_kernels_that_were_tried():
    records, page = result("tiles_h200")["records"], text("docs/log.md")

    def shares(run, engine, shape):
        of = [r for r in records if (r["run"], r["engine"]) == (run, engine)]
        return [r["ratio_to_dense_best"] for r in of if r["shape"].startswith(shape)]

    def told(found):
        return f"{min(found):.2f} to {max(found):.2f}"

    now = shares(1, "sampled_mass (128, 128, 8, 3)", "wan")
    now += shares(1, "sampled_mass (128, 64, 4, 3)", "cog")
    then = shares(0, "sampled_mass", "wan") + shares(0, "sampled_mass", "cog")
    assert len(now) == len(then) == 8
    assert f"{told(now)} of cuDNN's in place of {told(then)}" in page

    def gain(run, ours, other):
        times = {
            (r["shape"], r["density"], r["engine"]): r["ms"] for r in records if r["run"] == run
        }
        pairs = [key for key in times if key[2] == ours and (*key[:2], other) in times]
        return told([times[*key[:2], other] / times[key] for key in pairs])

    whole = "(128, 128, 8, 2, True)"
    assert f"{gain(3, whole, '(128, 64, 4, 2)')} times Triton's 128x64 tile" in page
    assert f"{gain(3, whole, '(64, 128, 4, 2, True)')} of `hopper_fwd`: not taken" in page
    assert f"{gain(2, 'specialised, in turns', 'specialised')} of the same without" in page
    assert f"{gain(2, 'specialised, persistent', 'specialised')} in a process" in page
    assert f"{gain(3, '(128, 128, 8, 3, True)', whole)}: not taken" in page
    assert f"{gain(2, 'hopper_fwd, second wait', 'hopper_fwd')}: not taken" in page


def test_last_tile_after_the_loop_and_mass_by_warp_groups():
    page, large, small = text("docs/log.md"), list(SHAPES.values())[:2], ["cogvideox-5b"]
    ms = {
        (r["run"], r["engine"], r["shape"], r["block"][0], r.get("density")): r["ms"]
        for r in result("tiles_h200")["records"]
        if r["run"] > 3 and "block" in r
    }

    def gain(other, ours, shapes, *blocks):
        pairs = [key for key in ms if key[1] == ours and key[2] in shapes and key[3] in blocks]
        found = [ms[key[0], other, *key[2:]] / ms[key] for key in pairs]
        return f"{min(found):.2f} to {max(found):.2f}"

    before, after = "forward, main", "forward, next"
    found = gain(before, after, small, 64, 128), gain(before, after, large, 64)
    assert "{} at CogVideoX, {} with blocks of 64 at head dim 128: taken".format(*found) in page
    assert f"density 0.1 | {gain(before, after, large, 128)}: not taken" in page
    special = [gain(after, f"forward specialised, next, {n} stages", small, 128) for n in (2, 3)]
    assert f"{special[1][:4]} to {special[0][-4:]} of `hopper_fwd`: not taken" in page

    sums = "mass (128, 128, 8, 4), sums over {}"
    told = "within a warp: {:.1f} ms at Wan, {:.1f} at CogVideoX; over 64: {:.1f} and {:.1f}"
    shapes = "wan-1.3b", "cogvideox-5b"
    found = [ms[4, sums.format(rows), shape, 64, None] for rows in (16, 64) for shape in shapes]
    assert told.format(*found) in page
    tiles = "(128, 128, 8, 4, True)", "(128, 64, 8, 4, True)"
    wan, cog = (ms[5, f"block_mass {tile}", s, 64, None] for tile, s in zip(tiles, shapes))
    assert f"{wan:.1f} ms at Wan with tiles of 128x128, {cog:.1f} at CogVideoX" in page
    plain = "block_mass (128, 64, 4, 3, False)", "cogvideox-5b", 64, None
    gluon = f"block_mass {tiles[1]}", *plain[1:]
    one, other = (f"{ms[run, *gluon] / ms[run, *plain]:.2f}" for run in (5, 6))
    assert f"Gluon's takes {one} and {other} of its time" in page
    told = f"takes {one} of its time in a run beside it and {other} in another"
    assert f"Gluon's, the default since, {told}" in text("docs/performance.md")

    def mass(run, shape):
        return ms[run, f"block_mass {tiles[shape == shapes[1]]}", shape, 64, None]

    hunyuan = SHAPES["HunyuanVideo 720p"]
    now, kept, cubic = ([mass(run, shape) for shape in (shapes[0], hunyuan)] for run in (6, 7, 8))
    assert f"{kept[0]:.1f} and {kept[1]:.0f} beside {now[0]:.1f} and {now[1]:.0f}: not" in page
    assert f"{cubic[0]:.1f} and {cubic[1]:.0f} at HunyuanVideo; " in page
    assert f"{mass(8, shapes[1]):.1f} at CogVideoX beside {mass(6, shapes[1]):.1f}: not" in page


def test_more_settings_of_auto_and_refreshes_that_are_not_dense():
    found, gains = result("schedules_h200")["records"], []
    for box in BOXES:
        mine = [r for r in found if (r["trial"], r["pipeline"]) == (3, box)]
        grid = {r["best_of_grid_within"]: r for r in mine if "best_of_grid_within" in r}
        above = [r for r in mine if "just_above" in r]
        others = [r for r in mine if r not in above and "best_of_grid_within" not in r]
        assert len(others) == 73 and set(grid) == {0.2, 0.3, 0.4, 0.6}
        for budget, best in grid.items():  # as good where guidance has one branch
            within = [r["error"] for r in others if r["effective_cost"] <= budget]
            assert min(within) >= best["error"]
        for r in above:
            gains.append(10 * math.log10(grid[r["just_above"]]["error"] / r["error"]))
    page = text("docs/log.md")
    assert f"are {min(gains):.1f} to {max(gains):.1f} dB better than those chosen" in page
    told = table("docs/log.md", "latents, dB against dense")
    for box, cells in zip(BOXES, told.values(), strict=True):
        mine = [r for r in found if (r["trial"], r["pipeline"]) == (4, box)]
        dense = sorted(r["effective_cost"] for r in mine if "refresh_density" not in r)
        assert len(dense) == 3 and len(mine) == 69
        wanted = []
        for budget, cost in zip((0.2, 0.3, 0.4), dense):
            of = [r for r in mine if r["effective_cost"] <= budget]
            wanted += [r["latent_psnr"] for r in of if r["effective_cost"] == cost]
            wanted.append(max(r["latent_psnr"] for r in of if "refresh_density" in r))
        assert are(cells, *wanted)


def test_a_residual_that_goes_on_changing():
    found, page = result("forecast"), text("docs/log.md")
    share = {
        (r["layer"], r["after_refresh_at"]): r["error_energy_it_removes"]
        for r in found["outputs"]
        if r["best_factor"] is not None
    }
    first = sorted(x for (layer, _), x in share.items() if layer < 3)
    assert f"{100 * first[1]:.0f} to {100 * first[-1]:.0f}% off" in page and first[0] < 0.02
    last = max(x for (layer, _), x in share.items() if layer > 2)
    assert f"takes off {100 * last:.0f}% at most" in page
    told = table("docs/log.md", "small Wan", "PSNR, five prompts")
    videos = [v for v in found["videos"] if v["prompts"] == "five"]
    rows = [[f"{v['psnr']:.1f}", f"{v['effective_cost']:.2f}"] for v in videos]
    assert sorted(told.values()) == sorted(rows)


def test_counters():
    kernels = {"Gluon": "gluon", "Triton": "triton", "flash-attn-4": "fa4", "FP8": "fp8"}
    kernels |= {"tail_fwd": "tail", "block_mass": "mass", "sampled_mass": "sampled mass"}
    columns = "tensor", "l2", "exponentials", "issued", "memory"
    records = result("counters_h200")["records"]
    for name, cells in table("docs/log.md", "kernel, blocks").items():
        kernel, block = name.removesuffix(" (Triton)").split(", ")
        kernel, _, model = kernel.partition(" at ")
        shape = "cogvideox-5b" if model else "wan-1.3b"
        triton = "triton " if name.endswith(" (Triton)") else ""
        case = f"{shape} {triton}{kernels[kernel]} {block.split()[-1]}"
        longest = max((r for r in records if r["case"] == case), key=lambda r: r["us"])
        assert are(cells, *(longest[column] for column in columns))


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
    (kernel,) = (
        record["ms"] / 1000
        for record in result("kernels_h200")["records"]
        if (record["shape"], record["engine"]) == (SHAPES[model], "triton")
        if (record["block"], record["density"], record["mask"]) == ([64, 64], 0.1, "random")
        if record["run"] < 3  # the kernels with which steps were timed
    )
    layers = {"wan-1.3b": 30, "hunyuanvideo-720p": 60}[SHAPES[model]]
    steps = schedule["steps"]
    sparse = steps["first reuse"] + steps["reuse"]
    alone = (50 - sparse + sparse * layers * kernel / stock["attention_s"]) / 50
    tail = schedule["effective_time"] - search - beside - alone
    return search, beside, outside, tail, search + beside + outside + tail


@pytest.mark.parametrize("box", [*BOXES, "wan_tiny_lora", "hunyuan_video_tiny_true_cfg"])
def test_what_the_boxes_follow(box):
    found = list(result(f"prompt_check_{box}")["accuracy"].values())[:3]
    rows = table("samples/TRAINING.md", "", "updates")
    row = {"wan_tiny_lora": "wan_tiny_lora, 4 steps"}.get(box, box)
    told = rows[row.replace("_true_cfg", ", guidance of two calls")]
    assert told[2:5] == [f"{share:.0%}" for share in found]
    if "%" in told[5]:
        masked = list(result(f"prompt_check_{box}_text_masked")["accuracy"].values())[:3]
        assert told[5] == "{:.0f}, {:.0f}, {:.0f}%".format(*(100 * share for share in masked))
    assert "{:.0f}, {:.0f} and {:.0f}%".format(*(100 * x for x in found)) in text("docs/limits.md")


def test_what_choices_miss_at_every_density():
    found, page = [result(f"structure_{box}") for box in BOXES], text("docs/limits.md")
    lost = [of["layers_that_lose_5_points_by_density"] for of in found]
    assert [of["pooled"]["0.2"] for of in lost] == [[], [], []]
    assert [len(of["early"]["0.2"]) for of in lost] == [1, 2, 3]
    pooled = [
        {d: max(mean(layer["misses_by_density"]["pooled"][d]) for layer in of["layers"].values())
         for d in of["kept_mass"]}
        for of in found
    ]  # fmt: skip
    assert all(max(of, key=of.get) == "0.1" for of in pooled)
    told = "{:.1f}, {:.1f} and {:.1f} points".format(*(100 * of["0.1"] for of in pooled))
    assert f"At 0.1 pooled selection misses most: {told} in the worst layer" in page


def test_what_larger_boxes_attend_to():
    def points(shares):
        return "{:.0f}, {:.0f} and {:.0f}".format(*(100 * share for share in shares))

    found, page = [result(f"structure_{box}_256") for box in BOXES], text("docs/limits.md")
    assert f"hold {points(of['kept_mass']['0.2'] for of in found)}% of the mass" in page
    names = "window_misses", "early_misses_at_the_end", "pooled_misses"
    window, early, pooled = (points(of[f"mean_{name}"] for of in found) for name in names)
    assert f"window misses {window} points" in page and f"mask {early} by the end" in page
    assert pooled == "1, 1 and 1"
    lost = [of["layers_that_lose_5_points_by_density"]["pooled"] for of in found]
    lost = [{density: len(layers) for density, layers in of.items() if layers} for of in lost]
    assert lost == [{}, {}, {"0.05": 1}]
