"""Which layers refresh at a step, from how far their outputs were from dense at the step before."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Drift:
    """Of one branch in one run.

    Attributes:
        errors: of the last step, by layer, each 0-d on the device.
        due: layers that refresh at this step.
        spent: refreshes so far.
    """

    errors: dict[int, Tensor] = field(default_factory=dict)
    due: frozenset[int] = frozenset()
    spent: int = 0
    step: int = -1

    def judge(self, step: int, limit: float, most: int) -> None:
        """At the first call of a step: those above `limit`, the worst first, `most` in a run.

        The only wait for the device, between steps.
        """
        if step == self.step:
            return
        self.step, errors, self.errors = step, self.errors, {}
        found = torch.stack(list(errors.values())).tolist() if errors else []
        above = sorted((-error, layer) for error, layer in zip(found, errors) if error >= limit)
        self.due = frozenset(layer for _, layer in above[: most - self.spent])
        self.spent += len(self.due)
