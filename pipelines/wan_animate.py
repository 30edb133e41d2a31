"""Wan Animate: face blocks slice the tokens by frame, and a reference frame stands in front."""

from collections.abc import Iterable
from typing import Any

from .family import CurrentCall, Family, Undo
from .wan import WanSparseAttnProcessor, prepare, self_attentions


def hooks(transformer: Any, call: CurrentCall) -> Iterable[Undo]:
    """None: between the layers the tokens stay in raster order, for the face blocks."""
    call.order_in_layers()
    return ()


WAN_ANIMATE = Family(
    name="Wan Animate",
    transformers=("WanAnimateTransformer3DModel",),
    pipelines=("WanAnimatePipeline",),
    guidance="two calls",
    text="in a cross-attention",
    fps=30,
    stock_processor="WanAttnProcessor",
    processor=WanSparseAttnProcessor,
    prepare=prepare,
    self_attentions=self_attentions,
    hooks=hooks,
    splits=False,
)
