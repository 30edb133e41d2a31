"""Figures of docs/ are those of benchmarks/results: kernels."""

import re

from told import NUMBER, SHAPES, are, result, table, text


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


def test_counters():
    kernels = {"Gluon": "gluon", "Triton": "triton", "flash-attn-4": "fa4", "FP8": "fp8"}
    kernels |= {"tail_fwd": "tail", "block_mass": "mass", "sampled_mass": "sampled mass"}
    columns = "tensor", "l2", "exponentials", "issued", "memory"
    records = result("counters_h200")["records"]
    for name, cells in table("docs/log.md", "kernel, blocks").items():
        kernel, block = name.removesuffix(" (Triton)").split(", ")
        kernel, _, model = kernel.partition(" at ")
        shape = {"CogVideoX": "cogvideox-5b", "HunyuanVideo": "hunyuanvideo-720p"}.get(model)
        shape = shape or "wan-1.3b"
        triton = "triton " if name.endswith(" (Triton)") else ""
        case = f"{shape} {triton}{kernels[kernel]} {block.split()[-1]}"
        longest = max((r for r in records if r["case"] == case), key=lambda r: r["us"])
        assert are(cells, *(longest[column] for column in columns))


def test_fp8_in_gluon():
    told = table("docs/log.md", "ms with quantisation", "16 bits", "FP8, Triton")
    names = {"Wan 1.3B": "wan-1.3b", "CogVideoX": "cogvideox-5b"}
    found = result("fp8_gluon_h200")["records"]
    records = [r for r in found if "density" in r]
    assert len(told) == 12
    gains, limits = {}, []
    for name, cells in told.items():
        model, block, density = re.fullmatch(r"(.+), blocks of (\d+), density (.+)", name).groups()
        place = names.get(model, "hunyuanvideo-720p"), int(block), float(density)
        of = [r for r in records if (r["shape"], r["block"], r["density"]) == place]
        most = {64: 128, 128: 168}[int(block)] if model == "CogVideoX" else None
        full, triton, gluon = (
            next(r["ms"] for r in of if r["what"] == what and r.get("registers", most) == most)
            for what in ("bf16", "triton fp8", "gluon fp8")
        )
        assert are(cells, full, triton, gluon, full / gluon), name
        gains[model, int(block), float(density)] = full / gluon
        if model == "CogVideoX":
            limits.append(next(r["ms"] for r in of if r.get("registers", 0) is None) / gluon)
    page, choosing = text("docs/log.md"), text("docs/choosing.md")
    alone = sum(r["ms"] for r in found if "density" not in r)
    first = [r["ms"] for r in records[:3] if r.get("registers", None) is None]  # of Wan, 64, 0.2
    told = f"{alone:.2f} ms at Wan, {alone / first[2]:.2f} of the call at density 0.2; without it"
    assert told + f" Wan would be at {first[0] / (first[2] - alone):.2f}" in page
    assert f"which is {min(limits):.2f} to {max(limits):.2f} times as fast as without" in page
    told = "are {:.2f} times as fast with blocks of 64 and {:.2f} with 128, of Wan 1.3B 480p {:.2f}"
    told += " and {:.2f}, of CogVideoX-5B, at head dim 64, {:.2f} and {:.2f}"
    models = "HunyuanVideo", "Wan 1.3B", "CogVideoX"
    assert told.format(*(gains[m, b, 0.2] for m in models for b in (64, 128))) in choosing


def test_single_calls_of_fp8_and_sageattention():
    ms = {
        (r["shape"], r.get("block", [0])[0], r.get("density"), r["engine"]): r
        for r in result("kernels_fp8_h200")["records"]
    }
    gains = {
        key[:3]: r["ms"] / ms[*key[:3], "triton fp8"]["ms"]
        for key, r in ms.items()
        if key[3] == "triton"
    }
    wan = [gains["wan-1.3b", block, density] for block in (64, 128) for density in (0.2, 0.5)]
    others = [
        [gain for key, gain in gains.items() if key[0] == shape]
        for shape in ("cogvideox-5b", "hunyuanvideo-720p")
    ]
    ends = [end for of in others for end in (min(of), max(of))]
    told = (
        "{:.2f} and {:.2f} at Wan with blocks of 64, {:.2f} and {:.2f} with 128, {:.2f} to {:.2f}"
    )
    told += " at CogVideoX, {:.2f} to {:.2f} at HunyuanVideo"
    page = text("docs/log.md")
    assert told.format(*wan, *ends) in page
    errors = [r["relative_error"] for key, r in ms.items() if key[3] == "triton fp8"]
    assert f"{100 * min(errors):.1f} to {100 * max(errors):.1f}% from those of 16 bits" in page
    of = ms["wan-1.3b", 64, 0.2, "triton fp8"]
    told = f"{of['error_to_dense']:.2f} and {of['error_of_16_bits_to_dense']:.2f} at density 0.2"
    assert told in page
    dense = [
        ms[shape, 0, 1.0, engine]
        for engine in ("sageattention", "sdpa-cudnn")
        for shape in ("wan-1.3b", "cogvideox-5b", "hunyuanvideo-720p")
    ]
    told = "takes {:.1f}, {:.1f} and {:.0f} ms at Wan, CogVideoX and HunyuanVideo, cuDNN {:.1f}"
    assert (told + ", {:.1f} and {:.0f}").format(*(r["ms"] for r in dense)) in page
    errors = [r["relative_error"] for r in dense[:3]]
    assert f"{100 * min(errors):.1f} to {100 * max(errors):.1f}% from dense" in page


def test_uneven_rows():
    ms = {
        (r["block"][0], r["mask"], r["engine"]): r["ms"]
        for r in result("kernels_peers_h200")["records"]
        if r.get("density") == 0.2 and r["run"] == 0
    }
    told = (
        "uneven masks take {:.2f} ms with blocks of 128 and {:.2f} with 64, random ones {:.2f} and"
    )
    uneven, random = ([ms[b, kind, "triton"] for b in (128, 64)] for kind in ("uneven", "random"))
    page = text("docs/log.md")
    assert (told + " {:.2f}").format(*uneven, *random) in page
    assert f"FlexAttention takes {ms[128, 'random', 'flex']:.2f} with blocks of 128" in page
