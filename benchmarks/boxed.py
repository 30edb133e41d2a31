"""Open a small trained pipeline for a benchmark, compile it; the noise floor of its videos."""

from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


@contextmanager
def compiled_blocks(transformer):
    """The blocks compiled, one by one. Entered again, it finds the graphs of the last time."""
    torch._dynamo.config.recompile_limit = 64  # a graph for each shape, dense or sparse
    torch._dynamo.config.automatic_dynamic_shapes = False
    lists = ("blocks", "transformer_blocks", "single_transformer_blocks")
    blocks = [block for name in lists for block in getattr(transformer, name, ())]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def two_dense_runs(generate):
    """What `generate` gives under cuDNN's attention, and under FlashAttention-2 or, where there is
    a mask, torch's plain mathematics: between them lies what rounding alone changes."""
    plain = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    choices = [SDPBackend.CUDNN_ATTENTION, *plain], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    for kernels in choices:
        with sdpa_kernel(kernels, set_priority=True):
            yield generate()
