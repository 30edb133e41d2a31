"""Where in the denoising loop a transformer call stands: step, steps in all, CFG branch.

diffusers tells some of it through `cache_context`, depending on pipeline and version; the rest is
read from the pipeline's own attributes. Nothing here counts attention calls.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from torch import Tensor, nn


class Denoising:
    """Follows one transformer through the denoising loop.

    Args:
        transformer: its `cache_context` and end-of-run reset are watched until `remove`.
        pipe: the pipeline, None where only a transformer was given.
        num_steps: steps in all, where neither context nor pipeline tells.
        on_end: called when the pipeline says that its run has ended.
    """

    def __init__(
        self, transformer: nn.Module, pipe: Any, num_steps: int | None, on_end: Callable[[], None]
    ):
        self._pipe = (lambda: None) if pipe is None else ref(pipe)
        self._num_steps = num_steps
        self._on_end = on_end
        self._transformer = transformer
        self._branch: str | None = None
        self._fields: dict = {}
        self._step = -1
        self._time: Tensor | None = None  # the loop's own tensor: one object a step
        self._calls_in_step = 0
        self._watch()

    def read(self, timestep: Tensor) -> tuple[int, int, str]:
        """Step (0-based), steps in all and branch of the call that is about to run."""
        self._count(timestep)
        step = self._fields.get("step_index")
        branch = self._branch or f"call_{self._calls_in_step}"
        return self._step if step is None else step, self._steps_in_all(), branch

    def _count(self, timestep: Tensor) -> None:
        """Steps by the identity of the loop's timestep; a larger one than before is a new run."""
        current = getattr(self._pipe(), "_current_timestep", None)
        current = timestep if current is None else current
        if current is self._time:
            self._calls_in_step += 1
            return
        if self._fields.get("step_index") is None:  # else nobody needs the count: spare the sync
            rising = self._time is not None and float(current.max()) > float(self._time.max())
            self._step = 0 if rising else self._step + 1
        self._time, self._calls_in_step = current, 0

    def _steps_in_all(self) -> int:
        known = self._fields.get("num_inference_steps")
        known = getattr(self._pipe(), "_num_timesteps", None) if known is None else known
        known = self._num_steps if known is None else known
        if known is None:
            raise RuntimeError(
                "the number of denoising steps is not known here: enable sparse attention on the"
                " pipeline instead of its transformer, or give num_steps="
            )
        return known

    def reset(self) -> None:
        self._step, self._time, self._calls_in_step = -1, None, 0

    def _watch(self) -> None:
        """Shadow two methods on the instance.

        A diffusers hook would wrap `forward` to learn the same, and be dropped or drop others when
        offloading wraps it too.
        """
        original = getattr(self._transformer, "cache_context", None)
        if original is None:
            return

        @contextlib.contextmanager
        def cache_context(name: str, **fields: Any) -> Iterator[None]:
            self._branch, self._fields = name, fields
            try:
                with original(name, **fields):
                    yield
            finally:
                self._branch, self._fields = None, {}

        reset = self._transformer._reset_stateful_cache

        def reset_stateful_cache(*args: Any, **kwargs: Any) -> None:
            self.reset()
            self._on_end()
            reset(*args, **kwargs)

        self._transformer.cache_context = cache_context  # type: ignore[method-assign]
        self._transformer._reset_stateful_cache = reset_stateful_cache  # type: ignore

    def remove(self) -> None:
        for name in ("cache_context", "_reset_stateful_cache"):
            self._transformer.__dict__.pop(name, None)
