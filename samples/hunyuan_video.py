"""Text or image to video with HunyuanVideo or HunyuanVideo-1.5, sparse.

    python samples/hunyuan_video.py --prompt "a cat walks on the grass, realistic"
    python samples/hunyuan_video.py --model hunyuanvideo-community/HunyuanVideo-I2V --image cat.png
    python samples/hunyuan_video.py --method dense          # stock attention, to compare

HunyuanVideo-1.5 is hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v and its siblings.
Settings are those of the model cards, to the best of our knowledge; scheduler, flow shift and the
guidance of 1.5 come with the model. 720 x 1280 x 129 frames want 80 GB of GPU memory, or --offload.

Run by us: HunyuanVideo text-to-video on random weights, as this repository has no small trained
model of this family. Not run by us: image-to-video and 1.5 with this script, any of CARDS.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import ImageOps

from dit_sparse import enable_sparse_attention
from dit_sparse.method_spec import parse_method
from dit_sparse.video import write_mp4

HUB = "hunyuanvideo-community/"
HUNYUAN = {"height": 720, "width": 1280, "num_frames": 129, "num_inference_steps": 50}
HUNYUAN |= {"guidance_scale": 6.0}  # embedded: one call a step
# 1.5 takes its size from the model, or from the image, and keeps its guidance in pipe.guider.
HUNYUAN_15 = {"num_frames": 121, "num_inference_steps": 50}
CARDS = {
    "HunyuanVideo": HUNYUAN,
    "HunyuanVideo-I2V": HUNYUAN,
    "HunyuanVideo-I2V-33ch": HUNYUAN | {"guidance_scale": 1.0},
    "HunyuanVideo-1.5-Diffusers-480p_t2v": HUNYUAN_15,
    "HunyuanVideo-1.5-Diffusers-720p_t2v": HUNYUAN_15,
    "HunyuanVideo-1.5-Diffusers-480p_i2v": HUNYUAN_15,
    "HunyuanVideo-1.5-Diffusers-720p_i2v": HUNYUAN_15,
}


def parse_arguments() -> argparse.Namespace:
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--model", default=HUB + "HunyuanVideo", help=f"folder or hub id: {HUB} and one of CARDS")
    add("--method", default="auto", help='such as adaspa, adaspa:density=0.3, or "dense"')
    add("--prompt", default="A cat walks on the grass, realistic")
    add("--image", help="file or URL to start from; HunyuanVideo-I2V crops it to the size")
    add("--height", type=int)
    add("--width", type=int)
    add("--frames", type=int, dest="num_frames", help="4 k + 1")
    add("--steps", type=int, dest="num_inference_steps")
    add("--seed", type=int, default=0)
    add("--offload", action="store_true", help="keep on the GPU only the part that runs")
    add("--out", default="hunyuan_video.mp4")
    return parser.parse_args()


def settings(args: argparse.Namespace, kind: str) -> dict:
    """The card's, and over them what was given."""
    call = CARDS.get(Path(args.model).name, HUNYUAN_15 if "Video15" in kind else HUNYUAN)
    names = "height", "width", "num_frames", "num_inference_steps"
    call = call | {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.image:
        call["image"] = load_image(args.image)
        if "height" in call:
            call["image"] = ImageOps.fit(call["image"], (call["width"], call["height"]))
    return call


def load(args: argparse.Namespace) -> DiffusionPipeline:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    # torch_dtype is called dtype since diffusers 0.42.1, and earlier ones ignore that name.
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    pipe.vae.enable_tiling()
    if args.offload:
        pipe.enable_model_cpu_offload()
        return pipe
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    args = parse_arguments()
    method = parse_method(args.method, allow_dense=True)
    kind = DiffusionPipeline.load_config(args.model)["_class_name"]
    if ("ImageToVideo" in kind) != bool(args.image):
        raise SystemExit(f"{kind} {'takes no' if args.image else 'needs an'} --image")
    call = settings(args, kind)
    pipe = load(args)
    sparse = None
    if method.name != "dense":
        sparse = enable_sparse_attention(pipe, method.name, **method.options)
    generator = torch.Generator("cpu").manual_seed(args.seed)
    frames = pipe(prompt=args.prompt, generator=generator, output_type="np", **call).frames[0]
    write_mp4(args.out, frames, fps=24)
    print(sparse.report() if sparse else "dense attention")
    print(args.out)


if __name__ == "__main__":
    main()
