"""Every pipeline that runs on a Wan transformer, tiny, with a call that suits it, built offline.

Text and CLIP encoders are stubs: they have no part in what is tested.
"""

from functools import partial

import torch
from diffusers import (
    AutoencoderKLWan,
    LucyEditPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image

WIDTH, HEIGHT, FRAMES = 80, 48, 13  # 4 x 6 x 10 tokens, and frames more where some are put in front
IMAGE_TOKENS = 5  # of each image of the CLIP encoder that is not there
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
    "in_channels": 4,
    "out_channels": 4,
}
CLIP = {"image_dim": 8, "added_kv_proj_dim": 32}
MOTION = {
    "inject_face_latents_blocks": 1,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 8,
    "face_encoder_num_heads": 2,
}


def shared_parts():
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4,
        scale_factor_spatial=4,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return {"tokenizer": None, "text_encoder": None, "vae": vae.eval(), "scheduler": scheduler}


def build(cls, transformer=WanTransformer3DModel, sizes=None, experts=1, **config):
    torch.manual_seed(0)
    names = ("transformer", "transformer_2")[:experts]
    models = {name: transformer(**SIZES | (sizes or {})).eval() for name in names}
    pipe = cls(**shared_parts(), **models, **config)
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_prompt = encode_prompt
    pipe.encode_image = encode_image
    return pipe


def encode_prompt(num_videos_per_prompt, prompt_embeds, negative_prompt_embeds, **_):
    both = prompt_embeds, negative_prompt_embeds
    return [x.repeat_interleave(num_videos_per_prompt, 0) for x in both]


def encode_image(image, device):
    """What CLIP would give: one entry for each image."""
    count = len(image) if isinstance(image, list) else 1
    return torch.linspace(-1, 1, count * IMAGE_TOKENS * 8).view(count, IMAGE_TOKENS, 8)


def images(count=FRAMES, size=(WIDTH, HEIGHT)):
    return [Image.effect_noise(size, 40 + 9 * i).convert("RGB") for i in range(count)]


def text(batch=1, length=16):
    generator = torch.Generator().manual_seed(7)
    both = torch.randn(2, batch, length, 32, generator=generator)
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}


def text_to_video(**config):
    return build(WanPipeline, **config), {"num_frames": FRAMES}


def image_to_video(last=False, channels=12, clip=False, **config):
    sizes = {"in_channels": channels}
    if clip:
        sizes |= CLIP | ({"pos_embed_seq_len": 2 * IMAGE_TOKENS} if last else {})
    pipe = build(
        WanImageToVideoPipeline, sizes=sizes, image_processor=None, image_encoder=None, **config
    )
    first_and_last = images(2)
    call = {"image": first_and_last[0], "num_frames": FRAMES}
    call |= text(length=512) if clip else {}  # 512 is written into the processor of diffusers
    return pipe, call | ({"last_image": first_and_last[1]} if last else {})


def skyreels(image=False):
    """Without `image_dim`, its text-to-video has no place for CLIP embeddings."""
    if not image:
        return build(SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel), {"num_frames": FRAMES}
    sizes = {"in_channels": 12} | CLIP
    parts = {"image_processor": None, "image_encoder": None}
    pipe = build(SkyReelsV2ImageToVideoPipeline, SkyReelsV2Transformer3DModel, sizes, **parts)
    return pipe, {"image": images(1)[0], "num_frames": FRAMES} | text(length=512)


def video_to_video():
    call = {"video": images(), "strength": 0.8, "num_inference_steps": 5}  # the last 4 of 5
    return build(WanVideoToVideoPipeline), call


def vace(references=0, **config):
    sizes = {"vace_layers": [0, 1], "vace_in_channels": 2 * 4 + 4 * 4}
    pipe = build(WanVACEPipeline, WanVACETransformer3DModel, sizes, **config)
    mask = [Image.new("L", (WIDTH, HEIGHT), 255 * (i > 2)) for i in range(FRAMES)]
    call = {"video": images(), "mask": mask, "num_frames": FRAMES}
    return pipe, call | ({"reference_images": [images(references)]} if references else {})


def animate(segments=1, **call):
    sizes = {"in_channels": 12, "latent_channels": 4} | CLIP | MOTION
    pipe = build(
        WanAnimatePipeline,
        WanAnimateTransformer3DModel,
        sizes,
        image_processor=None,
        image_encoder=None,
    )
    frames = segments * (FRAMES - 1) + 1
    call |= {"image": images(1)[0], "segment_frame_length": FRAMES} | text(length=512)
    return pipe, call | {"pose_video": images(frames), "face_video": images(frames, (16, 16))}


def animate_replace():
    mask = [Image.new("L", (WIDTH, HEIGHT), 255)] * FRAMES
    return animate(mode="replace", background_video=images(), mask_video=mask)


def lucy_edit():
    pipe = build(LucyEditPipeline, sizes={"in_channels": 8}, expand_timesteps=True)
    return pipe, {"video": images(), "num_frames": FRAMES}


TWO_EXPERTS = {"experts": 2, "boundary_ratio": 0.9}
PIPELINES = {  # name: how to make it, leading frames that are given
    "T2V": (text_to_video, 0),
    "T2V 2.2": (partial(text_to_video, **TWO_EXPERTS), 0),
    "T2V 5B": (partial(text_to_video, expand_timesteps=True), 0),
    "I2V 2.1": (partial(image_to_video, clip=True), 1),
    "I2V 2.2": (partial(image_to_video, **TWO_EXPERTS), 1),
    "TI2V 5B": (partial(image_to_video, channels=4, expand_timesteps=True), 1),
    "FLF2V": (partial(image_to_video, last=True, clip=True), 1),
    "V2V": (video_to_video, 0),
    "VACE": (vace, 0),
    "VACE, references": (partial(vace, references=2), 2),
    "VACE 2.2": (partial(vace, references=1, **TWO_EXPERTS), 1),
    "Animate": (animate, 1),
    "Animate, segments": (partial(animate, segments=2), 2),
    "Animate, replace": (animate_replace, 1),
    "Lucy": (lucy_edit, 0),
    "SkyReels-V2": (skyreels, 0),
    "SkyReels-V2 I2V": (partial(skyreels, image=True), 1),
}


def generate(pipe, call, steps=4, guidance=3.0, seed=0, output_type="latent", **changes):
    size = {"height": HEIGHT, "width": WIDTH}
    options = size | {"guidance_scale": guidance, "num_inference_steps": steps} | text() | call
    with torch.no_grad():
        return pipe(
            **options | changes,
            generator=torch.Generator().manual_seed(seed),
            output_type=output_type,
        ).frames
