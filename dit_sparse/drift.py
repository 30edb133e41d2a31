"""Whether the layers refresh at a step, from how far their outputs were from dense before it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Drift:
    """Of one branch in one run. Layers refresh together: what a layer that does not would pass on
    is old to those that do.

    Attributes:
        errors: of the layers at the last step, each 0-d on the device.
        due: whether this step refreshes.
        spent: refreshes so far.
    """

    errors: list[Tensor] = field(default_factory=list)
    due: bool = False
    spent: int = 0
    step: int = -1

    def judge(self, step: int, limit: float, most: int) -> None:
        """At the first call of a step: where the mean error is `limit` or more, `most` in a run.

        The only wait for the device, between steps.
        """
        if step == self.step:
            return
        self.step, self.due = step, False
        if self.errors and self.spent < most:
            self.due = float(torch.stack(self.errors).mean()) >= limit
        self.spent += self.due
        self.errors.clear()
