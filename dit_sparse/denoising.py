"""Where in the denoising loop a transformer call stands: step, steps in all, CFG branch.

diffusers tells some of it through `cache_context`, depending on pipeline and version; the rest is
read from the pipeline's own attributes. Nothing here counts attention calls.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from torch import Tensor

OTHER_PIPELINE = (
    "the transformer runs outside the pipeline that sparse attention was enabled on: enable it on"
    " the pipeline that you call, or on the transformer with num_steps="
)


class Denoising:
    """Follows one transformer through the denoising loop.

    Args:
        pipe: the pipeline, or the bare transformer where there is none.
        num_steps: steps in all, where neither context nor pipeline tells.
    """

    def __init__(self, pipe: Any, num_steps: int | None):
        self._pipe = ref(pipe)
        self._tells_steps = hasattr(type(pipe), "num_timesteps")
        self._num_steps = num_steps
        self._branch: str | None = None
        self._fields: dict[str, Any] = {}
        self._step = -1
        self._time: Tensor | None = None  # the loop's own tensor, one object a step; else a copy
        self._given: Tensor | None = None  # with the last call
        self._failed_at: Tensor | None = None  # left behind by a run that failed
        self._calls_in_step = 0
        self.in_own_loop = True  # of the user, or the pipeline's as far as it shows

    def read(self, timestep: Tensor) -> tuple[int, int, str]:
        """Step (0-based), steps in all and branch of the call that is about to run."""
        told = self._told_step()
        of_loop = self._timestep_of_pipeline(told)
        if of_loop is None and hasattr(self._pipe(), "_current_timestep"):
            self._refuse_other_pipeline()
        self.in_own_loop = of_loop is None
        if of_loop is None:  # a copy, as the user's tensor may be written to at every step
            current = timestep.clone()
            unnamed = told == self._step and self._branch is None
            one_tensor, self._given = timestep is self._given, timestep
            again = (told is None or unnamed) and self._is_time_of_last_call(current, one_tensor)
        else:
            current, again = of_loop, of_loop is self._time
        if not again and told is None:
            told = self._place_in_schedule(current)
            if told is None:
                self._count(current)
        if again:
            self._calls_in_step += 1
        else:
            self._time, self._calls_in_step = current, 0
        self._step = self._step if told is None else told
        if told is None and self._step >= self._steps_in_all():
            raise RuntimeError(
                f"step {self._step + 1} of a run of {self._steps_in_all()}: give num_steps= as many"
                " steps as the loop makes, and begin a run at a larger timestep than the last ended"
            )
        return self._step, self._steps_in_all(), self._branch or f"call_{self._calls_in_step}"

    def _timestep_of_pipeline(self, told: int | None) -> Tensor | None:
        """The loop's own timestep, None where our pipeline does not run.

        A run that failed leaves its timestep behind: where steps go on without it, another runs.
        """
        current = getattr(self._pipe(), "_current_timestep", None)
        if current is self._time and told not in (None, self._step):
            self._failed_at = current
        return None if current is self._failed_at else current

    def _is_time_of_last_call(self, current: Tensor, one_tensor: bool) -> bool:
        """Whether a timestep, not the loop's own, is that of the last call. One host sync.

        Guidance calls may bring one tensor, or each its own, which in runs of one step is a new
        run.
        """
        if self._time is None or (self._steps_in_all() == 1 and not one_tensor):
            return False
        return float(current.max()) == float(self._time.max())

    def _count(self, current: Tensor) -> None:
        """Count steps by their timesteps; a larger one than before is a new run. One host sync.

        A loop's own is another object at each step, also where a schedule has it twice, as that of
        PNDM.
        """
        if self._steps_in_all() == 1:
            self._step = 0
            return
        now, before = (None if t is None else float(t.max()) for t in (current, self._time))
        self._step = 0 if before is not None and now > before else self._step + 1

    def _told_step(self) -> int | None:
        """The step by diffusers' context, else by the pipeline's scheduler, None if neither knows.

        The scheduler's is right for a second transformer that starts in the middle of a run, and
        after a run that failed.
        """
        if self._fields.get("step_index") is not None:
            return self._fields["step_index"]
        scheduler = getattr(self._pipe(), "scheduler", None)
        if not hasattr(scheduler, "step_index"):
            return None
        if scheduler.step_index is None:  # until its first step
            return 0
        return scheduler.step_index - self._steps_left_out(scheduler.timesteps)

    def _refuse_other_pipeline(self) -> None:
        """Our pipeline is not running: its number of steps is that of an earlier run."""
        if self._num_steps is None and self._fields.get("num_inference_steps") is None:
            raise RuntimeError(OTHER_PIPELINE)

    def _place_in_schedule(self, current: Tensor) -> int | None:
        """The step by the scheduler's timesteps, None where they do not tell. One host sync."""
        timesteps = getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)
        if timesteps is None:
            return None
        places = (timesteps == current.max()).nonzero().flatten().tolist()
        return places[0] - self._steps_left_out(timesteps) if len(places) == 1 else None

    def _steps_left_out(self, timesteps: Tensor) -> int:
        """A run that starts from a video takes the last steps of the schedule."""
        return len(timesteps) - self._steps_in_all()

    def _steps_in_all(self) -> int:
        known = self._fields.get("num_inference_steps")
        known = getattr(self._pipe(), "_num_timesteps", None) if known is None else known
        known = self._num_steps if known is None else known
        if known is None and self._tells_steps:
            raise RuntimeError(OTHER_PIPELINE)
        if known is None:
            raise RuntimeError(
                "the number of denoising steps is not known here: enable sparse attention on the"
                " pipeline instead of its transformer, or give num_steps="
            )
        return known

    def reset(self) -> None:
        self._step, self._time = -1, None  # the next call is the first at its time

    def watch(
        self, transformer: Any, on_call: Callable[[], None], on_end: Callable[[], None]
    ) -> Callable[[], None]:
        """Shadow two methods on the instance; returns how to undo it.

        A diffusers hook would wrap `forward` to learn the same, and be dropped or drop others when
        offloading wraps it too.

        Args:
            on_call: called first of all at each call in a context.
            on_end: called when the pipeline says that its run has ended.
        """
        original, reset = transformer.cache_context, transformer._reset_stateful_cache

        @contextlib.contextmanager
        def cache_context(name: str, **fields: Any) -> Iterator[None]:
            on_call()
            self._branch, self._fields = name, fields
            try:
                with original(name, **fields):
                    yield
            except BaseException:  # the run failed: diffusers will not say that it has ended
                self.reset()
                self._failed_at = getattr(self._pipe(), "_current_timestep", None)
                on_end()
                raise
            finally:
                self._branch, self._fields = None, {}

        def reset_stateful_cache(*args: Any, **kwargs: Any) -> None:
            self.reset()
            on_end()
            reset(*args, **kwargs)

        shadows = {"cache_context": cache_context, "_reset_stateful_cache": reset_stateful_cache}
        vars(transformer).update(shadows)

        def undo() -> None:
            for name in shadows:
                vars(transformer).pop(name, None)

        return undo
