"""Run a pipeline densely and look at the attention of every layer."""

from collections.abc import Callable
from typing import Any

from .api import enable_sparse_attention
from .state import Call, State
from .step import DenseAttention

MakeProbe = Callable[[State, int, DenseAttention], DenseAttention]


def run_with_probes(pipe: Any, run: Callable[[], Any], probe: MakeProbe) -> tuple[Call, int]:
    """Let probes stand in for the dense attention of all layers while `run` generates.

    Args:
        pipe: a supported pipeline; afterwards it is as it was.
        probe: makes one of a transformer's state, the layer's index and its dense attention.

    Returns:
        The last call of the first transformer that ran, and the most layers of any.
    """
    with enable_sparse_attention(pipe, density=1.0) as handle:
        for installed in handle._installed:
            for layer in installed.layers:
                layer.dense = probe(installed.state, layer.layer, layer.dense)
        run()
        states = [installed.state for installed in handle._installed]
        call = next(state.call for state in states if state.call is not None)
        return call, max(state.layers for state in states)
