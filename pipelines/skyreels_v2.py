"""SkyReels-V2 text- and image-to-video: Wan's layers under other names.

Diffusion forcing is refused: each frame has a noise level of its own there, and a scheduler, so
that no step of the run can be told.
"""

from typing import Any

from .family import Family, Prepared
from .wan import WanSparseAttnProcessor, hooks, self_attentions
from .wan import prepare as prepare_wan


def prepare(transformer: Any, given: dict[str, Any], keep_padding: bool) -> Prepared:
    if given.get("enable_diffusion_forcing") or transformer.config.num_frame_per_block > 1:
        raise ValueError(
            "sparse attention for SkyReels-V2 needs one noise level for all frames and attention"
            " without a mask, which diffusion forcing has not: use SkyReelsV2Pipeline or"
            " SkyReelsV2ImageToVideoPipeline, or disable sparse attention"
        )
    return prepare_wan(transformer, given, keep_padding)


SKYREELS_V2 = Family(
    name="SkyReels-V2",
    transformers=("SkyReelsV2Transformer3DModel",),
    pipelines=("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
    guidance="two calls",
    text="in a cross-attention",
    fps=24,
    stock_processor="SkyReelsV2AttnProcessor",
    processor=WanSparseAttnProcessor,
    prepare=prepare,
    self_attentions=self_attentions,
    hooks=hooks,
)
