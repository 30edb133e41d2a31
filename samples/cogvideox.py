"""Text or image to video with CogVideoX 1.0 or 1.5, sparse.

    python samples/cogvideox.py --prompt "a panda plays the guitar in a bamboo forest"
    python samples/cogvideox.py --model THUDM/CogVideoX-5b-I2V --image panda.png --prompt "it plays"
    python samples/cogvideox.py --model THUDM/CogVideoX1.5-5B
    python samples/cogvideox.py --method dense              # stock attention, to compare

Settings are those of the model cards, to the best of our knowledge; the scheduler comes with the
model. CogVideoX was trained on long, detailed prompts. --offload is for GPUs of less than 40 GB.

Run by us: 1.0, both pipelines on random weights, as this repository has no small trained model of
this family. Not run by us: any of CARDS.
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

COG = {"height": 480, "width": 720, "num_frames": 49, "fps": 8}  # the only size of 1.0
COG |= {"num_inference_steps": 50, "guidance_scale": 6.0}
COG_15 = COG | {"height": 768, "width": 1360, "num_frames": 81, "fps": 16}
CARDS = {
    "CogVideoX-2b": COG,
    "CogVideoX-5b": COG,
    "CogVideoX-5b-I2V": COG,
    "CogVideoX1.5-5B": COG_15,
    "CogVideoX1.5-5B-I2V": COG_15,
}


def parse_arguments() -> argparse.Namespace:
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--model", default="THUDM/CogVideoX-2b", help="folder or hub id: THUDM/ and one of CARDS")
    add("--method", default="auto", help='such as adaspa, adaspa:density=0.3, or "dense"')
    add("--prompt", default="A panda in a small red jacket plays a guitar in a bamboo forest")
    add("--image", help="file or URL to start from, cropped to the size")
    add("--height", type=int)
    add("--width", type=int)
    add("--frames", type=int, dest="num_frames", help="8 k + 1; 16 k + 1 for 1.5")
    add("--steps", type=int, dest="num_inference_steps")
    add("--seed", type=int, default=0)
    add("--offload", action="store_true", help="keep on the GPU only the part that runs")
    add("--out", default="cogvideox.mp4")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict:
    """The card's, and over them what was given."""
    call = CARDS.get(Path(args.model).name, COG)
    names = "height", "width", "num_frames", "num_inference_steps"
    call = call | {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.image:
        call["image"] = ImageOps.fit(load_image(args.image), (call["width"], call["height"]))
    return call


def load(args: argparse.Namespace) -> DiffusionPipeline:
    dtype = torch.float16 if Path(args.model).name == "CogVideoX-2b" else torch.bfloat16
    if not torch.cuda.is_available():
        dtype = torch.float32
    # torch_dtype is called dtype since diffusers 0.42.1, and earlier ones ignore that name.
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
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
    call = settings(args)
    fps = call.pop("fps")
    pipe = load(args)
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
