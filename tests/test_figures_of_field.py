"""Figures of README.md and docs/ are those of benchmarks/results: quality, of all methods."""

import json
import re
import sys

import numpy
import pytest
from told import BOXES, NUMBER, ROOT, are, best_of_budgets, result, table, text

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "samples")]

import pareto  # noqa: E402

from dit_sparse import available_methods  # noqa: E402


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
        f"at all {len(by_time)} of its points nothing that takes no more time is as near to dense,"
        f" at {sum(m >= 2 for m in by_time)} of them nothing within 2 dB"
    )
    assert told in text("README.md") and min(by_time) > 0
    leads = []
    for box in BOXES:
        mine, theirs = best[box, "auto"], best[box, "rettention"]
        of = [mine[budget]["psnr"] - theirs[budget]["psnr"] for budget in mine]
        leads += [f"{min(of):.1f}", f"{max(of):.1f}"]
    told = "{} to {} dB below on Wan, {} to {} on HunyuanVideo and {} to {} on CogVideoX"
    assert told.format(*leads) in text("README.md")
    llsa = [
        best[BOXES[2], "auto"][b]["psnr"] - best[BOXES[2], "llsa"][b]["psnr"] for b in (0.2, 0.3)
    ]
    assert "`llsa` is {:.1f} and {:.1f} dB below".format(*llsa) in text("README.md")
    for box, least in zip(BOXES, (5, 5)):  # all but Re-ttention on Wan and HunyuanVideo
        rest = {k: of for k, of in best.items() if k[1] != "rettention"}
        assert min(ahead(rest, box, "effective_cost").values()) >= least


def test_what_is_ahead_by_more_than_chance():
    by_chance = {
        (r["pipeline"], r["method"], r["budget"])
        for r in result("pareto")["paired"]
        if r["minus"] == "auto" and r["interval"][1] >= 0
    }
    assert by_chance == {("wan_tiny", "rettention", budget) for budget in (0.6,)}
    told = "but for `rettention` on Wan at 0.6"
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
    further = [
        best[box, "auto"][0.4]["psnr"] - best[box, "sparse-vdit"][0.4]["psnr"] for box in BOXES
    ]
    assert f"is {min(further):.0f} to {max(further):.0f} dB further from dense" in page
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


def test_time_of_auto_on_the_small_pipelines():
    auto = [r for r in result("pareto")["records"] if r["method"] == "auto"]
    timed = [r for r in auto if r["effective_time"] is not None]
    times, costs = ([r[f"effective_{of}"] for r in timed] for of in ("time", "cost"))
    told = f"{min(times):.2f} to {max(times):.2f} of dense attention's time"
    assert f"takes {told} at costs of {min(costs):.2f} to {max(costs):.2f}" in text(
        "docs/performance.md"
    )
    assert f"`auto` took {told}" in text("docs/choosing.md")


def test_times_of_the_small_hunyuan_video_are_far_apart():
    times = {}
    for r in result("times_hunyuan_video_tiny")["records"]:
        times.setdefault(tuple(r["budgets"]), []).append(r["effective_time"])
    apart = {budgets: max(of) / min(of) for budgets, of in times.items()}
    told = f"were {min(apart.values()):.1f} to {max(apart.values()):.1f} times apart"
    assert told in text("docs/performance.md")


def test_times_of_the_gpu_alone_stand_in_the_curves():
    names = "pipeline", "size", "method", "config"
    of = {json.dumps([r[n] for n in names]): r for r in result("times_h200")["records"]}
    curves = {json.dumps([r[n] for n in names]): r for r in result("pareto")["records"]}
    assert of.keys() <= curves.keys()
    for key, record in of.items():
        assert record["effective_time"] == curves[key]["effective_time"]
        assert record["effective_time"] == min(record["seconds"]) / min(record["dense_seconds"])
        assert max(record["dense_seconds"]) < 1.01 * min(record["dense_seconds"])


def test_rivals_at_equal_time_between_points():
    best, leads = best_of_budgets("pareto"), {}
    for box in BOXES:
        for method in ("adaspa", "draftattention", "rettention", "sparse-vdit"):
            curve = sorted((r["effective_time"], r["psnr"]) for r in best[box, method].values())
            rising = [p for i, p in enumerate(curve) if all(p[1] > q[1] for q in curve[:i])]
            for budget, mine in best[box, "auto"].items():
                if mine["effective_time"] >= rising[0][0]:
                    at = numpy.interp(mine["effective_time"], *zip(*rising))
                    leads[box, method, budget] = mine["psnr"] - at
    two = [leads.pop((BOXES[0], "adaspa", budget)) for budget in (0.2, 0.3)]
    told = f"two it would be {-two[0]:.1f} dB nearer and {two[1]:.1f} further"
    readme = text("README.md")
    assert told in readme
    assert (
        f"at all others these four methods are {min(leads.values()):.1f} dB and more further"
        in readme
    )


def test_how_far_auto_is_ahead_at_33792_tokens():
    best, leads = best_of_budgets("pareto_256"), []
    for box in BOXES:
        auto = best[box, "auto"]
        others = [of for (name, method), of in best.items() if name == box and method != "auto"]
        assert len(others) == (2 if "hunyuan" in box else 3)
        lead = [auto[b]["psnr"] - max(of[b]["psnr"] for of in others) for b in auto]
        leads.append(f"{min(lead):.1f} to {max(lead):.1f}")
    told = "by {} dB on Wan, {} on HunyuanVideo and {} on CogVideoX"
    assert told.format(*leads) in text("docs/performance.md")
    flicker = {True: [], False: []}
    for (name, method), of in best.items():
        if "hunyuan" not in name:
            flicker[method == "auto"] += [record["flicker"] for record in of.values()]
    mine, theirs = (f"{min(x):.2f} to {max(x):.2f}" for x in (flicker[True], flicker[False]))
    assert f"At 256x256 it is {mine} with `auto` on Wan and CogVideoX, {theirs} with the" in text(
        "docs/performance.md"
    )


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
