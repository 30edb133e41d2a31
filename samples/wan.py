"""Text or image to video with Wan 2.1 or 2.2, sparse.

    python samples/wan.py                                   # the small model of this repository
    python samples/wan.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat on a surfboard"
    python samples/wan.py --model Wan-AI/Wan2.2-TI2V-5B-Diffusers --image cat.png --prompt "it runs"
    python samples/wan.py --model ... --method dense        # stock attention, to compare

Settings are those of the model cards, to the best of our knowledge; the flow shift is set for 2.1
and left as shipped for 2.2. The 14B models want 80 GB of GPU memory, or --offload.

Run by us: samples/wan_tiny, and both pipelines on random weights. Not run by us: any of CARDS.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline
from diffusers.schedulers import UniPCMultistepScheduler
from diffusers.utils import load_image

from dit_sparse import enable_sparse_attention
from dit_sparse.method_spec import parse_method
from dit_sparse.video import write_mp4

NEGATIVE = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings,"
    " images, static, overall gray, worst quality, low quality, JPEG compression residue, ugly,"
    " incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured,"
    " misshapen limbs, fused fingers, still picture, messy background, three legs, many people in"
    " the background, walking backwards"
)
SIZE_480P, SIZE_720P = {"height": 480, "width": 832}, {"height": 720, "width": 1280}
WAN = {"num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0, "fps": 16}
WAN |= {"negative_prompt": NEGATIVE}
WAN_480P = WAN | SIZE_480P | {"flow_shift": 3.0}
WAN_720P = WAN | SIZE_720P | {"flow_shift": 5.0}
WAN_22 = WAN | SIZE_720P | {"num_inference_steps": 40}
CARDS = {
    "Wan2.1-T2V-1.3B-Diffusers": WAN_480P,
    "Wan2.1-T2V-14B-Diffusers": WAN_720P,
    "Wan2.1-I2V-14B-480P-Diffusers": WAN_480P,
    "Wan2.1-I2V-14B-720P-Diffusers": WAN_720P,
    "Wan2.2-T2V-A14B-Diffusers": WAN_22 | {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
    "Wan2.2-I2V-A14B-Diffusers": WAN_22 | SIZE_480P | {"guidance_scale": 3.5},
    "Wan2.2-TI2V-5B-Diffusers": WAN | {"height": 704, "width": 1280, "num_frames": 121, "fps": 24},
}
BOX = Path(__file__).parent / "wan_tiny"


def parse_arguments() -> argparse.Namespace:
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--model", default=str(BOX), help="folder or hub id: Wan-AI/ and one of CARDS")
    add("--method", default="auto", help='such as adaspa, adaspa:density=0.3, or "dense"')
    add("--prompt", default="a red circle moving left")
    add("--image", help="file or URL to start from; the video takes its aspect")
    add("--height", type=int)
    add("--width", type=int)
    add("--frames", type=int, dest="num_frames", help="4 k + 1")
    add("--steps", type=int, dest="num_inference_steps")
    add("--seed", type=int, default=0)
    add("--offload", action="store_true", help="keep on the GPU only the part that runs")
    add("--out", default="wan.mp4")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict:
    """The card's, or those that lie beside the model; over them what was given."""
    call = WAN_480P | CARDS.get(Path(args.model).name, {"flow_shift": None})
    own = Path(args.model) / "dit_sparse.json"
    if own.is_file():
        stored = json.loads(own.read_text())
        call = stored["call"] | {"fps": stored["fps"]}
    names = "height", "width", "num_frames", "num_inference_steps"
    return call | {name: value for name in names if (value := getattr(args, name)) is not None}


def load(args: argparse.Namespace, flow_shift: float | None) -> DiffusionPipeline:
    kind = DiffusionPipeline.load_config(args.model)["_class_name"]
    if kind == "WanImageToVideoPipeline" and not args.image:
        raise SystemExit(f"{args.model} makes video from an image: name one with --image")
    dtype = {"vae": torch.float32, "image_encoder": torch.float32, "default": torch.bfloat16}
    if not torch.cuda.is_available():
        dtype = torch.float32
    cls = WanImageToVideoPipeline if args.image else WanPipeline
    # torch_dtype is called dtype since diffusers 0.42.1, and earlier ones ignore that name.
    pipe = cls.from_pretrained(args.model, torch_dtype=dtype)
    if flow_shift is not None:
        config = pipe.scheduler.config
        pipe.scheduler = UniPCMultistepScheduler.from_config(config, flow_shift=flow_shift)
    if args.offload:
        pipe.enable_model_cpu_offload()
        return pipe
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def sized(pipe: DiffusionPipeline, image, area: int) -> dict:
    """The image and its aspect at about `area` pixels."""
    step = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
    scale = (area / (image.height * image.width)) ** 0.5 / step
    height, width = (round(side * scale) * step for side in (image.height, image.width))
    return {"height": height, "width": width, "image": image.resize((width, height))}


def main() -> None:
    args = parse_arguments()
    method = parse_method(args.method, allow_dense=True)
    call = settings(args)
    fps = call.pop("fps")
    pipe = load(args, call.pop("flow_shift", None))
    if args.image:
        call |= sized(pipe, load_image(args.image), call["height"] * call["width"])
    sparse = None
    if method.name != "dense":
        sparse = enable_sparse_attention(pipe, method.name, **method.options)
    generator = torch.Generator("cpu").manual_seed(args.seed)
    frames = pipe(prompt=args.prompt, generator=generator, output_type="np", **call).frames[0]
    write_mp4(args.out, frames, fps)
    print(sparse.report() if sparse else "dense attention")
    print(args.out)


if __name__ == "__main__":
    main()
