"""The headline rows of the papers, with their settings as far as these are known.

None has been run here: the weights are not at hand. `published` holds the paper's own figures, not
ours: PSNR in dB, SSIM, LPIPS and speed-up against its own dense run on its own GPU.
"""

from typing import NamedTuple

HUNYUAN = ("hunyuanvideo-community/HunyuanVideo", "HunyuanVideoPipeline")
WAN = ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanPipeline")
COG_2B, COG_15 = (
    (f"zai-org/{name}", "CogVideoXPipeline") for name in ("CogVideoX-2b", "CogVideoX1.5-5B")
)
VBENCH = "VBench, prompts/augmented_prompts/gpt_enhanced_prompts"
VBENCH_200 = "VBench, prompts/prompts_per_category: animal and architecture"
PENGUIN = "Penguin Video Benchmark"


def size(height, width, frames, guidance):
    call = {"height": height, "width": width, "num_frames": frames}
    return call | {"num_inference_steps": 50, "guidance_scale": guidance}


HUNYUAN_720P, HUNYUAN_768P = size(720, 1280, 129, 6.0), size(768, 1280, 129, 6.0)
WAN_512P, WAN_720P, WAN_768P = (
    size(*sides, 81, 5.0) for sides in ((512, 768), (720, 1280), (768, 1280))
)
ADASPA = "adaspa:density=0.2,search_at=(0.2,0.6),order=raster,own_block=false"
DRAFT = "draftattention:density={},search_at=0.3,dense_layers={},row_floor=0,own_block=false"
RETTENTION = "rettention:density=0.056,order=raster,clamp=false,own_block=false"


class Row(NamedTuple):
    """One row of a table: `call` is of the pipeline, `method` as for `dit-sparse compare`.

    `{table}` in a method stands for the file of modes that has to be searched first. `scheduler`
    holds what the paper sets otherwise than the model as shipped.
    """

    paper: str
    model: str
    pipeline: str
    call: dict
    method: str
    prompts: str
    gpu: str
    published: dict
    note: str = ""
    scheduler: dict = {}
    dtype: str = "bfloat16"


def figures(psnr, ssim, lpips, speedup=None):
    found = {"psnr": psnr, "ssim": ssim, "lpips": lpips, "speedup": speedup}
    return {name: value for name, value in found.items() if value is not None}


def adaspa(model, call, *published, note="", method=ADASPA):
    return Row("2502.21079", *model, call, method, VBENCH, "A100", figures(*published), note)


def draft(model, call, density, *published):
    layers, scheduler = (2, {"shift": 7.0}) if model is HUNYUAN else (1, {"flow_shift": 5.0})
    note = "30% dense steps and the first layers, as in its scripts; the paper says 25%"
    if model is WAN:
        note += "; 14B as in its scripts, the paper names no size"
    method = DRAFT.format(density, layers)
    return Row(
        "2505.14708", *model, call, method, PENGUIN, "H100", figures(*published), note, scheduler
    )


def sparse_vdit(model, call, prompts, gpu, *published, scheduler=None):
    note = "modes are searched first, with our thresholds: the paper's have another scale"
    return Row(
        "2506.03065",
        *model,
        call,
        "sparse-vdit:table={table}",
        prompts,
        gpu,
        figures(*published),
        note,
        scheduler or {},
    )


OWN_SIZE = "the paper says 720p; the model's own size is taken"
UNIFORM = ADASPA + ",head_adaptive=false"
COG_161, COG_81 = (size(768, 1360, frames, 6.0) for frames in (161, 81))

ROWS = {
    "adaspa-hunyuanvideo": adaspa(HUNYUAN, HUNYUAN_720P, 29.07, 0.8905, 0.1478, 1.78),
    "adaspa-hunyuanvideo-uniform": adaspa(
        HUNYUAN, HUNYUAN_720P, 28.51, 0.8825, 0.1574, 1.76, method=UNIFORM
    ),
    "adaspa-cogvideox1.5": adaspa(COG_15, COG_161, 23.25, 0.8267, 0.2067, 1.66, note=OWN_SIZE),
    "adaspa-cogvideox1.5-uniform": adaspa(
        COG_15, COG_161, 22.99, 0.8133, 0.2203, 1.64, note=OWN_SIZE, method=UNIFORM
    ),
    "draftattention-wan-512p-55": draft(WAN, WAN_512P, 0.45, 25.13, 0.8477, 0.0843),
    "draftattention-wan-512p-75": draft(WAN, WAN_512P, 0.25, 23.10, 0.7907, 0.1237),
    "draftattention-wan-768p-55": draft(WAN, WAN_768P, 0.45, 29.22, 0.9216, 0.0582, 1.22),
    "draftattention-wan-768p-75": draft(WAN, WAN_768P, 0.25, 27.17, 0.8897, 0.0871, 1.42),
    "draftattention-hunyuanvideo-60": draft(
        HUNYUAN, HUNYUAN_768P, 0.4, 32.08, 0.9321, 0.0558, 1.31
    ),
    "draftattention-hunyuanvideo-80": draft(
        HUNYUAN, HUNYUAN_768P, 0.2, 29.19, 0.8932, 0.0919, 1.58
    ),
    "draftattention-hunyuanvideo-90": draft(
        HUNYUAN, HUNYUAN_768P, 0.1, 24.22, 0.7990, 0.1812, 1.75
    ),
    "rettention-cogvideox-2b": Row(
        "2505.22918",
        *COG_2B,
        size(480, 720, 49, 6.0),
        RETTENTION,
        VBENCH_200,
        "not stated",
        figures(27.96, 0.894, 0.059),
        "its 96.9% of the video, with the text and rounded up to blocks, keep 5.6%",
        dtype="float16",
    ),
    "sparse-vdit-cogvideox1.5": sparse_vdit(
        COG_15, COG_81, VBENCH, "A800", 24.13, 0.82, 0.14, 1.76
    ),
    "sparse-vdit-hunyuanvideo": sparse_vdit(
        HUNYUAN, HUNYUAN_720P, PENGUIN, "A800", 27.09, 0.87, 0.12, 1.85
    ),
    "sparse-vdit-wan": sparse_vdit(
        WAN, WAN_720P, VBENCH, "H800", 22.59, 0.80, 0.16, 1.58, scheduler={"flow_shift": 5.0}
    ),
}


def table():
    """All rows in Markdown, the paper's figures beside them."""
    lines = [
        "| row | model | frames x height x width | PSNR | SSIM | LPIPS | speed-up | GPU | here |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        shape = " x ".join(str(row.call[side]) for side in ("num_frames", "height", "width"))
        told = [row.published.get(figure, "-") for figure in ("psnr", "ssim", "lpips", "speedup")]
        cells = f"`{name}`", row.model.split("/")[1], shape, *told, row.gpu, "*not run here*"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
