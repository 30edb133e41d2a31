"""The headline rows of the papers, with their exact settings as far as these are known.

None has been run here: the weights are not at hand. `published` holds the paper's own figures, not
ours: dB, SSIM, LPIPS and speed-up against its own dense run on its own GPU.
"""

from typing import NamedTuple

VBENCH = "VBench's (github.com/Vchitect/VBench, prompts/), lengthened for CogVideoX"
PENGUIN = "Penguin Video Benchmark's (github.com/Tencent-Hunyuan/HunyuanVideo, assets/)"
HUNYUAN = {"height": 720, "width": 1280, "frames": 129, "steps": 50, "guidance": 6.0}
HUNYUAN_768 = HUNYUAN | {"height": 768}
WAN = {"frames": 81, "steps": 50, "guidance": 5.0}
WAN_720 = WAN | {"height": 720, "width": 1280}
COG_15 = {"height": 768, "width": 1360, "steps": 50, "guidance": 6.0}
HUNYUAN_HUB, WAN_HUB = "hunyuanvideo-community/HunyuanVideo", "Wan-AI/Wan2.1-T2V-14B-Diffusers"


class Row(NamedTuple):
    """One row of a table: `call` and `method` are arguments of `dit-sparse compare`."""

    paper: str
    model: str
    call: dict
    method: str
    prompts: str
    gpu: str
    published: dict
    note: str = ""


def adaspa(model, call, published, note=""):
    method = "adaspa:density=0.2,search_at=(0.2,0.6),order=raster,own_block=false"
    return Row("arXiv 2502.21079", model, call, method, VBENCH, "A100", published, note)


def draft(model, call, density, dense_layers, published, prompts=PENGUIN):
    method = f"draftattention:density={density},search_at=0.3,dense_layers={dense_layers}"
    method += ",row_floor=0,own_block=false"
    note = (
        "warm-up of 30% as in its scripts; the paper says 25%. The size of Wan is not stated: 14B."
    )
    return Row("arXiv 2505.14708", model, call, method, prompts, "H100", published, note)


def sparse_vdit(model, call, published, prompts, gpu):
    method = "sparse-vdit:table={table}"
    note = (
        "make the table first: dit-sparse calibrate --pipeline MODEL --out modes.json --prompt ..."
        " at the same size. Its thresholds are not comparable with the paper's."
    )
    return Row("arXiv 2506.03065", model, call, method, prompts, gpu, published, note)


ROWS = {
    "adaspa-hunyuanvideo": adaspa(
        HUNYUAN_HUB, HUNYUAN,
        {"psnr": 29.07, "ssim": 0.8905, "lpips": 0.1478, "speedup": 1.78},
    ),
    "adaspa-cogvideox1.5": adaspa(
        "zai-org/CogVideoX1.5-5B", COG_15 | {"frames": 161},
        {"psnr": 23.25, "ssim": 0.8267, "lpips": 0.2067, "speedup": 1.66},
        "the paper's size is 720p; the model's own is taken",
    ),
    "draftattention-wan-75": draft(
        WAN_HUB, WAN | {"height": 768, "width": 1280}, 0.25, 1,
        {"psnr": 27.17, "ssim": 0.8897, "lpips": 0.0871, "speedup": 1.42},
    ),
    "draftattention-hunyuanvideo-80": draft(
        HUNYUAN_HUB, HUNYUAN_768, 0.2, 2,
        {"psnr": 29.19, "ssim": 0.8932, "lpips": 0.0919, "speedup": 1.58},
    ),
    "draftattention-hunyuanvideo-90": draft(
        HUNYUAN_HUB, HUNYUAN_768, 0.1, 2,
        {"psnr": 24.22, "ssim": 0.7990, "lpips": 0.1812, "speedup": 1.75},
    ),
    "rettention-cogvideox-2b": Row(
        "arXiv 2505.22918", "zai-org/CogVideoX-2b",
        {"height": 480, "width": 720, "frames": 49, "steps": 50, "guidance": 6.0},
        "rettention:density=0.056,order=raster,clamp=false,own_block=false",
        "VBench's of the categories animal and architecture, 200 videos", "not stated",
        {"psnr": 27.96, "ssim": 0.894, "lpips": 0.059},
        "nominal sparsity 96.9%; 5.6% of blocks are kept as its window is rounded up to blocks",
    ),
    "sparse-vdit-cogvideox1.5": sparse_vdit(
        "zai-org/CogVideoX1.5-5B", COG_15 | {"frames": 81},
        {"psnr": 24.13, "ssim": 0.82, "lpips": 0.14, "speedup": 1.76}, VBENCH, "A800",
    ),
    "sparse-vdit-hunyuanvideo": sparse_vdit(
        HUNYUAN_HUB, HUNYUAN,
        {"psnr": 27.09, "ssim": 0.87, "lpips": 0.12, "speedup": 1.85}, PENGUIN, "A800",
    ),
    "sparse-vdit-wan": sparse_vdit(
        WAN_HUB, WAN_720,
        {"psnr": 22.59, "ssim": 0.80, "lpips": 0.16, "speedup": 1.58}, VBENCH, "H800",
    ),
}  # fmt: skip
