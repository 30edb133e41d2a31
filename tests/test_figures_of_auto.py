"""Figures of docs/ are those of benchmarks/results: what `auto` is made of."""

import json
import math
import re

import pytest
from told import BOXES, NUMBER, ROOT, are, best_of_budgets, result, table, text

from dit_sparse import Auto
from dit_sparse.api import make_config
from dit_sparse.preset import read_preset


@pytest.mark.parametrize("box", BOXES)
def test_presets(box):
    file = ROOT / f"samples/presets/{box}_h200.json"
    preset, stored = read_preset(file), json.loads(file.read_text())
    trials, wanted = stored["evidence"]["trials"], stored["evidence"]["wanted_psnr"]
    chosen = min((t for t in trials if t["psnr"] >= wanted), key=lambda t: t["effective_cost"])
    config, _ = make_config(str(file), {})
    of_then = {"tail_tokens": 32}  # the default when they were calibrated
    assert config == Auto(**preset.options) == Auto(**of_then | chosen["options"])
    told = table("docs/choosing.md", "preset")[f"[{box}](../samples/presets/{box}_h200.json)"]
    assert are(told, chosen["psnr"], chosen["effective_cost"])


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
    assert gains == [0.8, -1.2, -1.3, -0.4]
    flicker = [round(of[b]["flicker"], 2) for of in (more, as_is) for b in (0.4, 0.6)]
    told = "is {:.2f} and {:.2f} in place of {:.2f} and {:.2f}".format(*flicker)
    assert told in text("docs/log.md")


def test_ablation_on_three_pipelines():
    found, told = result("ablation_auto_h200"), table("docs/log.md", "variant at equal cost", "Wan")
    records = {(r["method"], r["pipeline"]): r for r in found["records"]}
    assert told.keys() == {method for method, _ in records}
    for name, cells in told.items():
        for cell, box in zip(cells, BOXES, strict=True):
            if cell == "-":
                assert (name, box) not in records
                continue
            assert are([cell], records[name, box]["psnr"]), name
            cost = records["auto", box]["effective_cost"]
            assert abs(records[name, box]["effective_cost"] - cost) < 0.02
    of = {(p["method"], p["pipeline"]): p for p in found["paired"]}
    assert not [key for key, pair in of.items() if pair["interval"][0] > 0]
    gains = [of["means of 64 tokens", box] for box in BOXES]
    assert all(pair["interval"][0] <= 0 <= pair["interval"][1] for pair in gains)
    sentence = "Means of 64 tokens are {:.1f} dB better on Wan, {:.1f} worse on HunyuanVideo"
    sentence += " and {:.1f} better on"
    wan, hunyuan, cog = (pair["psnr"] for pair in gains)
    assert sentence.format(wan, -hunyuan, cog) in text("docs/log.md")
    searches = [of["3 searches", box]["psnr"] for box in BOXES]
    told = "Three searches are {:.1f} dB better on Wan, {:.1f} and {:.1f} worse on the others"
    assert told.format(searches[0], -searches[1], -searches[2]) in text("docs/log.md")
    least = max(of["without residual", box]["psnr"] for box in BOXES)
    most = min(of["without residual", box]["psnr"] for box in BOXES)
    assert f"without a residual {-least:.1f} to {-most:.1f} dB are lost" in text("docs/log.md")
    losses = [of["without tail", box]["psnr"] for box in BOXES]
    told = f"without the tail {-max(losses):.1f} to {-min(losses):.1f}"
    assert told in text("docs/log.md")
    exact = [of["exact masks", box]["psnr"] for box in BOXES]
    told = f"exact masks, which cost more to find, {-max(exact):.1f} to {-min(exact):.1f}"
    assert told in text("docs/log.md")


def test_densities_between():
    told = table("docs/log.md", "auto over densities", "at 0.2")
    sets = {"0.09 and 0.17": "pareto_former_densities", "0.075 and 0.14": "pareto"}
    names = dict(zip(("Wan", "HunyuanVideo", "CogVideoX"), BOXES, strict=True))
    assert len(told) == len(sets) * len(names)
    for name, cells in told.items():
        model, densities = name.split(", ")
        of = best_of_budgets(sets[densities])[names[model], "auto"]
        assert are(cells, *(of[b]["psnr"] for b in (0.2, 0.3, 0.4, 0.6))), name
    before, now = (best_of_budgets(sets[s])[BOXES[0], "auto"][0.3]["config"] for s in sets)
    assert before["search_at"] == now["search_at"] and len(now["search_at"]) == 3
    assert (before["density"], now["density"]) == (0.09, 0.075)
    wan = best_of_budgets("pareto_follow")[BOXES[0], "auto"][0.4]["psnr"]
    assert f"went from 31.1 to {wan:.1f}" in text("docs/log.md")


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
