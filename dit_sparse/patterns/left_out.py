"""Methods of the field that have no row of their own, and why; `dit-sparse methods` shows them."""

LEFT_OUT = {
    "DeepCache, A-SDM": (
        "reuse features of a U-Net; what they are in a transformer, diffusers has as caches"
        " (pipe.transformer.enable_cache), which run beside sparse attention"
    ),
    "MISA's routed heads": "need a trained indexer of many heads; `misa` routes regions instead",
    "Sparse VideoGen 2's permutation": (
        "an order of tokens for each head, for queries and for keys; engines take one for all, so"
        " `svg2` ranks blocks by its clusters"
    ),
    "SpargeAttn's second test": (
        "skips products with values while attention runs, inside the kernel; a block mask is made"
        " before"
    ),
    "LLSA, S2-Attention, BiFormer, LycheeDecode, RTPurbo as trained": (
        "no weights of theirs are for video models; their rules run untrained"
    ),
    "Framepack, Wan Animate 2": "pipelines whose attention is not over one grid of tokens",
}
