"""The error of a transformer's predictions along the trajectory of dense attention.

PSNR of a video is made in the first steps, and a small error there moves it far. Here every step
starts from dense's own latents, so that each is judged alone.
"""

from collections import deque
from contextlib import contextmanager

import torch


class DenseTrajectory:
    """Latents after each step and predictions of each call, of one dense run.

    Args:
        generate: runs the pipeline, passing on keyword arguments to it.
    """

    def __init__(self, transformer, generate):
        self.transformer, self.generate = transformer, generate
        self.latents = deque()
        with predictions(transformer) as self.predicted:
            generate(callback_on_step_end=self.keep)

    def keep(self, pipe, step, timestep, values):
        self.latents.append(values["latents"].clone())
        return values

    def go_back(self, pipe, step, timestep, values):
        self.latents.rotate(-1)  # `generate` may run the pipeline several times
        return values | {"latents": self.latents[-1].clone()}

    def error(self):
        """Root of the mean squared error of all predictions, over their root mean square."""
        with predictions(self.transformer) as found:
            self.generate(callback_on_step_end=self.go_back)
        pairs = list(zip(found, self.predicted, strict=True))
        apart = sum((a - b).square().mean() for a, b in pairs)
        return float((apart / sum(b.square().mean() for _, b in pairs)).sqrt())


@contextmanager
def predictions(transformer):
    """A list that takes the output of each call of a transformer, in float32."""
    found = []
    hook = transformer.register_forward_hook(
        lambda module, given, output: found.append(torch.as_tensor(output[0]).float())
    )
    try:
        yield found
    finally:
        hook.remove()
