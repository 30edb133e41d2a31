"""Open a small trained pipeline for a benchmark."""

import torch

from dit_sparse.loading import call_arguments, load_pipeline


def open_boxed(source, dtype):
    """The pipeline, its VAE in float32, and how it is called.

    Frames in 8 bits hide differences that frames in bfloat16 would add.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(source, device, getattr(torch, dtype))
    decode = pipe.vae.to(torch.float32).decode
    # CogVideoX's pipeline does not cast the latents
    pipe.vae.decode = lambda latents, **options: decode(latents.float(), **options)
    return pipe, call_arguments(pipe, source)
