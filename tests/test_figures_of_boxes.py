"""Figures of docs/ and samples/ are those of benchmarks/results: the small pipelines."""

from statistics import mean

import pytest
from told import BOXES, result, table, text


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
