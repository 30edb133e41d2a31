"""Two processes that share a transformer's calls by Ulysses, against one."""

from functools import cache, partial

import pytest
import torch
from composed import not_in_0_36
from diffusers import ContextParallelConfig
from test_joint_pipelines import PIPELINES as JOINT
from test_joint_pipelines import apart, build
from test_joint_pipelines import latents as generate_joint
from tiny_ltx_video import ltx_call, ltx_pipeline
from tiny_wan_family import PIPELINES as WAN
from tiny_wan_family import generate as generate_wan
from tiny_wan_family import text_to_video
from two_processes import on_two

from dit_sparse import available_methods, enable_sparse_attention
from dit_sparse.patterns.gates import first_gates
from dit_sparse.patterns.mode_table import ModeTable
from dit_sparse.ulysses import balanced

SPARSE = {"density": 0.4, "block_size": 32, "search_at": (0.25, 0.5)}
MADE = {name: case[0] for name, case in WAN.items()} | {
    "three heads": partial(text_to_video, sizes={"num_attention_heads": 3}),
    "four heads": partial(text_to_video, sizes={"num_attention_heads": 4}),
}


@cache  # a forked process takes over what is made: some noise in images cannot be seeded
def make(name):
    """A pipeline, and how to generate latents with it."""
    torch.manual_seed(0)
    if name == "LTX-Video":
        pipe = ltx_pipeline("LTXPipeline")
        return pipe, partial(generate_joint, pipe, ltx_call(1, True))
    if name in JOINT:
        pipe, call = build(name)
        return pipe, partial(generate_joint, pipe, call)
    pipe, call = MADE[name]()
    return pipe, partial(generate_wan, pipe, call)


def outcome(handle, generate):
    """Latents, the last masks of all layers and branches, and the report."""
    states = [installed.state for installed in handle._installed]
    for state in states:
        state.masks = {}
    torch.manual_seed(1)
    latents = generate()
    masks = [mask.to_dense() for state in states for _, (_, mask) in sorted(state.masks.items())]
    return latents, masks, handle.report()


def one(name, method="adaspa", **options):
    pipe, generate = make(name)
    with enable_sparse_attention(pipe, method, **options) as handle:
        return outcome(handle, generate)


def transformers(pipe):
    return [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part]


def parallelise(pipe, **plan):
    for transformer in transformers(pipe):
        config = ContextParallelConfig(ulysses_degree=2)
        transformer.enable_parallelism(config=config, **plan)


def shared(rank, name, first, method="adaspa", **options):
    """`first` is what is enabled first, "parallel" or "sparse"."""
    pipe, generate = make(name)
    if first == "parallel":
        parallelise(pipe, **{} if pipe.transformer._cp_plan else {"cp_plan": {}})
    handle = enable_sparse_attention(pipe, method, **options)
    if first == "sparse":
        parallelise(pipe)
    return outcome(handle, generate)


def assert_same(alone, together):
    """Latents within rounding; the masks of all heads, and what is told of them, alike."""
    latents, masks, report = alone
    for other, _, told in together:
        assert apart(other, latents) < 1e-4
        assert other.equal(together[0][0])
        assert told.effective_cost == pytest.approx(report.effective_cost)
        assert told.kept_mass == pytest.approx(report.kept_mass, abs=1e-5)
        assert told.planned_cache_bytes == report.planned_cache_bytes
        assert report.peak_cache_bytes <= told.peak_cache_bytes <= 2 * report.peak_cache_bytes
        for mine, theirs in zip(told.trace, report.trace, strict=True):
            assert mine["kind"] == theirs["kind"]
            assert mine["density"] == pytest.approx(theirs["density"])
    for number, mask in enumerate(masks):
        parts = [other[1][number] for other in together]
        assert torch.cat(parts, 1).equal(mask) if mask.shape[1] > 1 else parts[0].equal(mask)


@pytest.mark.parametrize("first", ["parallel", "sparse"])
@pytest.mark.parametrize("name", ["T2V", "HunyuanVideo", "CogVideoX"])
def test_two_processes_find_the_masks_and_latents_of_one(tmp_path, name, first):
    alone = one(name, **SPARSE)
    assert alone[1] and alone[2].reuse_calls and alone[2].effective_cost < 1
    assert_same(alone, on_two(tmp_path, partial(shared, name=name, first=first, **SPARSE)))


OTHERS = sorted({*JOINT, *WAN, "LTX-Video"} - {"T2V", "HunyuanVideo", "CogVideoX"})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if "Animate" not in name])
def test_so_do_those_of_every_other_pipeline(tmp_path, name):
    alone = one(name, **SPARSE)
    assert_same(alone, on_two(tmp_path, partial(shared, name=name, first="sparse", **SPARSE)))


def options_of(method, tmp_path):
    """Of the pipeline "four heads"."""
    more = {
        "adaspa": {"recall_threshold": 0.0},  # half of the heads give, whoever they are with
        "biformer": {"region": 1},
        "misa": {"region": 1},
    }.get(method, {})
    if method == "seerattention":
        first_gates(2, 4, 16, "curve", 32).save(tmp_path / "gates.safetensors")
        more = {"gate": str(tmp_path / "gates.safetensors")}
    if method == "sparse-vdit":
        rows = [["0134", "4213"]] * 4
        modes = {branch: rows for branch in ("cond", "uncond")}
        place = "WanTransformer3DModel", 2, 4, (4, 6, 10), 4
        table = ModeTable(*place, 0.4, "raster", 32, 0.5, 0.25, 1, modes)
        table.save(tmp_path / "table.json")
        more = {"table": str(tmp_path / "table.json")}
    return SPARSE | {"method": method} | more


QUICK = ("adaspa", "auto", "random", "sparse-vdit")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[] if method in QUICK else pytest.mark.slow)
        for method, config in available_methods().items()
        if not config.compares_heads
    ],
)
def test_every_method_finds_the_masks_of_one_process(tmp_path, method):
    options = options_of(method, tmp_path)
    alone = one("four heads", **options)
    run = partial(shared, name="four heads", first="sparse", **options)
    assert_same(alone, on_two(tmp_path, run))
    levels = {len({*entry["density"]}) for entry in alone[2].trace if entry["density"]}
    assert levels == {2} or method != "adaspa"


def shares_of(rank, **options):
    """Of each mask that is kept during a run: in which order heads are shared, and what is here."""
    pipe, generate = make("four heads")
    handle = enable_sparse_attention(pipe, **options)
    parallelise(pipe)
    found = []

    def look(*args):
        for state in (installed.state for installed in handle._installed):
            for place, kept in state.kept.items():
                found.append((state.heads.get(place), float(kept.mask.density.sum())))

    for transformer in transformers(pipe):
        transformer.register_forward_hook(look)
    generate()
    assert not any(installed.state.heads for installed in handle._installed)
    return found


def test_processes_get_heads_that_cost_as_much(tmp_path):
    options = SPARSE | {"method": "adaspa", "recall_threshold": 0.0, "search_at": (0.0, 0.5)}
    first, second = on_two(tmp_path, partial(shares_of, **options))
    assert first and any(order for order, _ in first)
    for (order, mine), (other, theirs) in zip(first, second, strict=True):
        assert order == other and (order is None or sorted(order) == [0, 1, 2, 3])
        assert mine == pytest.approx(theirs, rel=0.02)


def test_the_dearest_heads_are_apart():
    assert balanced([3, 3, 1, 1], 2) == [0, 2, 1, 3]
    assert balanced([3, 1, 3, 1], 2) == [0, 1, 2, 3]  # as they are
    costs = [1.5, 1.5, 1.5, 1.5, 1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1]
    for degree in (2, 3, 4, 6):
        order = balanced(costs, degree)
        parts = torch.tensor(costs)[order].unflatten(0, (degree, -1)).sum(1)
        assert sorted(order) == list(range(12)) and parts.max() == parts.min()


def dense_then_disabled(rank, name, first):
    """Latents at density 1, and those of what is left when sparse attention is disabled."""
    pipe, generate = make(name)
    if first == "parallel":
        parallelise(pipe, **{} if pipe.transformer._cp_plan else {"cp_plan": {}})
    handle = enable_sparse_attention(pipe, "adaspa", density=1.0, keep_padding=True)
    if first == "sparse":
        parallelise(pipe)
    latents = outcome(handle, generate)[0]
    calls = handle.report().dense_calls
    handle.disable()
    torch.manual_seed(1)
    return latents, calls, generate()


@pytest.mark.parametrize("first", ["parallel", "sparse"])
@pytest.mark.parametrize(
    "name", ["T2V", pytest.param("HunyuanVideo", marks=not_in_0_36), "CogVideoX"]
)
def test_density_one_equals_stock_and_so_does_what_is_left_when_disabled(tmp_path, name, first):
    pipe, generate = make(name)
    torch.manual_seed(1)
    stock = generate()
    for latents, calls, left in on_two(
        tmp_path, partial(dense_then_disabled, name=name, first=first)
    ):
        assert apart(latents, stock) < 1e-5 and apart(left, stock) < 1e-5
        assert calls > 0


def refusals(rank):
    """What is said to each, before or after `enable_sparse_attention`."""

    def said(first, name="T2V", method="adaspa", **config):
        pipe, _ = make.__wrapped__(name)  # what is shared stays so
        parallel = ContextParallelConfig(**{"ulysses_degree": 2} | config)
        try:
            if first == "parallel":
                pipe.transformer.enable_parallelism(config=parallel, cp_plan={})
            enable_sparse_attention(pipe, method)
            pipe.transformer.enable_parallelism(config=parallel)
        except (RuntimeError, ValueError) as error:
            return str(error), pipe.transformer._parallel_config is None
        return "not refused", None

    return {
        (what, first): said(first, **given)
        for first in ("parallel", "sparse")
        for what, given in {
            "ring": {"ring_degree": 2, "ulysses_degree": 1},
            "heads": {"name": "three heads"},
            "frames": {"name": "Animate"},
            "compared": {"method": "lycheedecode"},
        }.items()
    }


def test_what_cannot_be_shared_is_refused_before_anything_changes(tmp_path):
    expected = {
        "ring": "does not support ring attention",
        "heads": "ulysses_degree=2 does not divide the 3 heads of this transformer: use one of 3",
        "frames": "Wan Animate does not run sparse on several GPUs",
        "compared": "lycheedecode compares the heads of a layer",
    }
    for told in on_two(tmp_path, refusals):
        for (what, first), (message, alone) in told.items():
            assert expected[what] in message, (what, first, message)
            assert alone == (first == "sparse")
