"""Random sequences of what a user may do: dense output stays that of a pipeline never enabled."""

import gc
import random

import diffusers
import pytest
import torch
from composed import DIFFUSERS_0_36, FAMILIES, arguments, generate, make

from dit_sparse import disable_sparse_attention, enable_sparse_attention
from dit_sparse.block_mask import BlockMask
from dit_sparse.patterns.correct import Correction
from dit_sparse.state import Kept, State

OURS = ("cache_context", "_reset_stateful_cache", "fuse_qkv_projections", "unfuse_qkv_projections")
METHODS = "adaspa", "adaspa-sampled", "window", "random", "auto", "rettention"


class Stopped(Exception):
    pass


class Twins:
    """A pipeline that is enabled now and then, and one that never is; the rest they share."""

    def __init__(self, seed):
        self.random, self.family = random.Random(seed), FAMILIES[seed % len(FAMILIES)]
        self.pipe, self.twin = make(self.family), make(self.family)
        self.both = self.pipe, self.twin
        self.size, self.options = {}, None
        self.fused = self.offloaded = self.compiled = False
        self.held = held()

    def enable(self):
        method = self.random.choice(METHODS)
        density = self.random.choice((0.2, 0.5, 1.0))
        self.options = {"method": method, "density": density, "block_size": 32}
        self.put_on()

    def put_on(self):
        if self.compiled:
            with pytest.raises(RuntimeError, match="enable first, compile second"):
                enable_sparse_attention(self.pipe, **self.options)
            self.options = None
        else:
            enable_sparse_attention(self.pipe, **self.options)

    def disable(self):
        self.options = None
        disable_sparse_attention(self.pipe)

    def generate(self):
        self.run(self.pipe)

    def run(self, pipe, **call):
        return generate(pipe, self.family, num_inference_steps=3, **self.size, **call)

    def change_size(self):
        given = arguments(self.family)
        half = given["height"] // 2
        half -= half % 16  # what HunyuanVideo divides a side by
        self.size = self.random.choice(({}, {"height": half}, {"num_frames": 17}))

    def raise_inside_a_step(self):
        """In a layer or in a callback, at a call by chance."""
        calls = iter(range(100))
        last = self.random.randrange(3)

        def stop(*args):
            if next(calls) == last:
                raise Stopped

        for pipe in self.both:
            calls = iter(range(100))
            if self.random.random() < 0.5:
                with pytest.raises(Stopped):
                    self.run(pipe, callback_on_step_end=lambda *args: stop() or {})
                continue
            block = next(iter(blocks(pipe.transformer)))
            hook = block.register_forward_pre_hook(stop)
            with pytest.raises(Stopped):
                self.run(pipe)
            hook.remove()

    def swap_scheduler(self):
        if self.family == "CogVideoX":
            name = self.random.choice(("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"))
        else:
            name = "FlowMatchEulerDiscreteScheduler"
        for pipe in self.both:
            old = pipe.scheduler.config
            pipe.scheduler = getattr(diffusers, name).from_config(old)

    def fuse(self):
        self.fused = not self.fused
        for pipe in self.both:
            change = "fuse_qkv_projections" if self.fused else "unfuse_qkv_projections"
            getattr(pipe.transformer, change)()

    def offload(self):
        if self.offloaded or self.compiled or DIFFUSERS_0_36:
            return
        self.offloaded, cpu = True, torch.device("cpu")
        for pipe in self.both:
            pipe.transformer.enable_group_offload(
                onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
            )

    def compile(self):
        if self.compiled or self.offloaded:
            return
        self.compiled = True
        for pipe in self.both:
            for block in blocks(pipe.transformer):
                block.compile(backend="eager")
        self.generate()

    def check(self):
        """Dense output and what is left of ours; on again afterwards, where it was."""
        options = self.options
        disable_sparse_attention(self.pipe)
        left = set(OURS) & set(vars(self.pipe.transformer)), left_of_ours(self.pipe.transformer)
        assert left == (set(), []) and held() <= self.held
        assert self.run(self.pipe).equal(self.run(self.twin))
        if options is not None and not self.compiled:
            self.put_on()
        elif self.compiled:
            self.options = None


def blocks(transformer):
    found = getattr(transformer, "blocks", None)
    return transformer.transformer_blocks if found is None else found


def held():
    """How much of what lives between steps is in memory."""
    gc.collect()
    return sum(type(thing) in (BlockMask, Correction, Kept, State) for thing in gc.get_objects())


def left_of_ours(transformer):
    """Hooks, processors and attributes whose code is in dit_sparse."""
    found = []
    for module in transformer.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        values = [*hooks, *vars(module).values(), getattr(module, "processor", None)]
        of = (getattr(value, "__module__", None) or type(value).__module__ for value in values)
        found += [name for name in of if str(name).startswith("dit_sparse")]
    return found


ACTIONS = (
    "enable enable disable generate change_size raise_inside_a_step swap_scheduler fuse offload"
).split()


def play(seed, length, actions=ACTIONS):
    twins, done = Twins(seed), []
    try:
        for _ in range(length):
            done.append(twins.random.choice(actions))
            getattr(twins, done[-1])()
            if done[-1] not in ("enable", "disable"):
                if twins.options is not None:
                    twins.generate()
            twins.check()
    except Exception as error:
        error.add_note(f"seed {seed}, {twins.family}: {', '.join(done)}")
        raise


@pytest.mark.parametrize("seed", range(12))
def test_a_dozen_sequences(seed):
    play(seed, length=4)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("first", range(100, 400, 50))
def test_hundreds_of_sequences(first):
    for seed in range(first, first + 50):
        torch._dynamo.reset()
        play(seed, 6, [*ACTIONS, "compile"])
