"""Step and branch where diffusers' context does not tell them."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from dit_sparse.denoising import Denoising


class Pipeline:
    """As much of a pipeline as is looked at; its scheduler counts from the second step on."""

    def __init__(self, steps=4):
        self.scheduler = SimpleNamespace(step_index=None, timesteps=torch.zeros(4))
        self._num_timesteps = steps
        self._current_timestep = None

    def run(self, models, calls=2, fail_at=None):
        """What each model in `models` (one for each step) reads at its calls."""
        start = len(self.scheduler.timesteps) - self._num_timesteps
        self.scheduler.step_index, seen = None, []
        for step, model in enumerate(models):
            self._current_timestep = torch.tensor(900.0 - 100 * step)
            seen += [model.read(self._current_timestep.expand(1)) for _ in range(calls)]
            if step == fail_at:
                return seen
            self.scheduler.step_index = start + step + 1
        return seen


def test_second_transformer_starts_in_the_middle():
    pipe = Pipeline()
    high, low = Denoising(pipe, None), Denoising(pipe, None)
    seen = pipe.run([high, high, low, low], calls=1)
    assert seen == [(step, 4, "call_0") for step in range(4)]


def test_a_run_that_failed_at_its_first_step_does_not_count():
    pipe = Pipeline()
    model = Denoising(pipe, None)
    expected = pipe.run([model] * 4)
    assert pipe.run([model] * 4, fail_at=0) == expected[:2]
    assert pipe.run([model] * 4) == expected
    assert [branch for _, _, branch in expected[:2]] == ["call_0", "call_1"]


def test_video_to_video_begins_inside_the_schedule():
    pipe = Pipeline(steps=2)
    model = Denoising(pipe, None)
    assert pipe.run([model] * 2, calls=1) == [(0, 2, "call_0"), (1, 2, "call_0")]


def test_steps_are_counted_where_the_scheduler_does_not():
    pipe = Pipeline()
    del pipe.scheduler
    model = Denoising(pipe, None)
    for _ in range(2):
        steps = []
        for step in range(4):
            pipe._current_timestep = torch.tensor(900.0 - 100 * step)
            steps.append(model.read(pipe._current_timestep)[0])
        assert steps == [0, 1, 2, 3]


def test_a_failed_first_step_does_not_count_where_the_scheduler_has_no_step_index():
    pipe = Pipeline()
    timesteps = torch.tensor([900.0, 800.0, 700.0, 600.0])
    pipe.scheduler = SimpleNamespace(timesteps=timesteps)  # as CogVideoX's schedulers
    model = Denoising(pipe, None)
    for stop in (1, 4):
        steps = []
        for pipe._current_timestep in timesteps[:stop]:
            steps.append(model.read(pipe._current_timestep)[0])
        assert steps == list(range(stop))


def test_video_to_video_begins_inside_a_schedule_without_step_index():
    pipe = Pipeline(steps=2)
    timesteps = torch.tensor([900.0, 800.0, 700.0, 600.0])
    pipe.scheduler = SimpleNamespace(timesteps=timesteps)
    model, seen = Denoising(pipe, None), []
    for pipe._current_timestep in timesteps[2:]:
        seen.append(model.read(pipe._current_timestep))
    assert seen == [(0, 2, "call_0"), (1, 2, "call_0")]


def test_a_timestep_that_a_schedule_has_twice_is_two_steps():
    pipe = Pipeline()
    timesteps = torch.tensor([900.0, 800.0, 800.0, 700.0])
    pipe.scheduler = SimpleNamespace(timesteps=timesteps)  # as PNDM's
    model = Denoising(pipe, None)
    for _ in range(2):
        seen = []
        for pipe._current_timestep in timesteps:
            seen += [model.read(pipe._current_timestep.expand(1)) for _ in range(2)]
        assert seen == [(step, 4, f"call_{call}") for step in range(4) for call in range(2)]


def test_a_run_of_another_pipeline_is_refused():
    pipe = Pipeline()
    model = Denoising(pipe, None)
    pipe.run([model] * 4)
    pipe._current_timestep = None  # its run has ended
    with pytest.raises(RuntimeError, match="enable it on the pipeline that you call"):
        model.read(torch.tensor([900.0]))


def test_a_run_of_another_pipeline_after_one_that_failed_is_refused():
    pipe, transformer = Pipeline(), Transformer()
    model = Denoising(pipe, None)
    model.watch(transformer, on_call=lambda: None, on_end=lambda: None)
    pipe._current_timestep = torch.tensor(900.0)
    with pytest.raises(KeyError), transformer.cache_context("cond"):
        model.read(pipe._current_timestep)
        raise KeyError
    with pytest.raises(RuntimeError, match="enable it on the pipeline that you call"):
        model.read(torch.tensor([900.0]))
    assert pipe.run([model] * 4, calls=1) == [(step, 4, "call_0") for step in range(4)]


class Transformer:
    """A bare transformer, with what every cacheable model of diffusers has."""

    @contextlib.contextmanager
    def cache_context(self, name, **fields):
        yield

    def _reset_stateful_cache(self):
        self.was_reset = True


def test_a_context_that_tells_step_and_steps_needs_nothing_else():
    transformer, seen = Transformer(), []
    model = Denoising(transformer, None)
    model.watch(transformer, on_call=lambda: None, on_end=lambda: None)
    asked = [(step, branch) for step in (1, 3) for branch in ("cond", "uncond")]
    for step, branch in asked:
        with transformer.cache_context(branch, step_index=step, num_inference_steps=4):
            seen.append(model.read(torch.tensor([500.0])))
    assert seen == [(step, 4, branch) for step, branch in asked]


@pytest.mark.parametrize(
    ("num_steps", "told"), [(4, {}), (None, {"step_index": 0, "num_inference_steps": 4})]
)
def test_a_loop_of_ones_own_that_says_how_many_steps_it_makes_is_not_refused(num_steps, told):
    pipe, transformer = Pipeline(), Transformer()
    model = Denoising(pipe, num_steps)
    model.watch(transformer, on_call=lambda: None, on_end=lambda: None)
    with transformer.cache_context("cond", **told):
        assert model.read(torch.tensor([900.0])) == (0, 4, "cond")


def test_watching_tells_of_each_call_and_each_end_and_leaves_nothing_behind():
    transformer, told = Transformer(), []
    model = Denoising(transformer, 4)
    undo = model.watch(transformer, lambda: told.append("call"), lambda: told.append("end"))
    for time in (900.0, 800.0):
        with transformer.cache_context("cond"):
            read = model.read(torch.tensor([time]))
    assert read == (1, 4, "cond")
    transformer._reset_stateful_cache()
    assert told == ["call", "call", "end"] and transformer.was_reset
    assert model.read(torch.tensor([700.0])) == (0, 4, "call_0")  # a new run, outside of a context
    with pytest.raises(KeyError), transformer.cache_context("cond"):
        raise KeyError
    assert told[3:] == ["call", "end"]
    assert model.read(torch.tensor([600.0]))[0] == 0
    undo()
    assert set(vars(transformer)) == {"was_reset"}


def test_a_timestep_of_its_own_for_each_guidance_call_is_one_step():
    model = Denoising(Transformer(), 3)
    for _ in range(2):
        seen = [model.read(torch.tensor([900.0 - 100 * step])) for step in (0, 0, 1, 1, 2, 2)]
        assert [(step, branch) for step, _, branch in seen] == [
            (step, f"call_{call}") for step in range(3) for call in range(2)
        ]


def test_guidance_calls_of_a_loop_of_ones_own_beside_the_scheduler_of_a_pipeline():
    pipe = Pipeline()
    del pipe._num_timesteps, pipe._current_timestep  # as pipelines made of blocks
    times = [900.0, 800.0, 800.0, 700.0]  # as Heun's, of second order
    model = Denoising(pipe, 4)
    for _ in range(2):
        seen = []
        for step, time in enumerate(times):
            pipe.scheduler.step_index = step
            seen += [model.read(torch.tensor([time])) for _ in range(2)]
        assert seen == [(step, 4, f"call_{call}") for step in range(4) for call in range(2)]


def test_a_timestep_that_is_written_to_at_every_step():
    model, timestep = Denoising(Transformer(), 3), torch.empty(1)
    for _ in range(2):
        seen = []
        for step in range(3):
            timestep.fill_(900.0 - 100 * step)
            seen += [model.read(timestep) for _ in range(2)]
        assert seen == [(step, 3, f"call_{call}") for step in range(3) for call in range(2)]


def test_runs_of_one_step_each_begin_anew():
    model = Denoising(Transformer(), 1)
    for time in (500.0, 500.0, 400.0):
        assert model.read(torch.tensor([time])) == (0, 1, "call_0")


def test_one_timestep_for_both_guidance_calls_of_a_single_step():
    model, time = Denoising(Transformer(), 1), torch.tensor([500.0])
    assert [model.read(time)[2] for _ in range(2)] == ["call_0", "call_1"]


def test_more_steps_than_were_said_are_refused():
    model = Denoising(Transformer(), 2)
    for time in (900.0, 800.0):
        model.read(torch.tensor([time]))
    with pytest.raises(RuntimeError, match="step 3 of a run of 2: give num_steps="):
        model.read(torch.tensor([700.0]))
