"""The training scripts in samples/: what they draw and build is what the pipelines then use."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_sparse.loading import call_arguments, load_pipeline

SAMPLES = Path(__file__).parents[1] / "samples"
FAMILIES = ("train_wan", "train_hunyuan_video", "train_cogvideox")
CAPTIONS = ["a red circle moving left", "over a dark green background, an orange ring moves up"]


@pytest.fixture
def module(monkeypatch):
    """Imports a script of samples/ by name."""
    monkeypatch.syspath_prepend(str(SAMPLES))
    return importlib.import_module


def pipeline_of(family):
    torch.manual_seed(0)
    tokenizer = family.build_tokenizer()
    text_encoder = family.build_text_encoder(len(tokenizer)).eval()
    transformer = family.build_transformer(2).eval()
    for parameter in transformer.parameters():  # some begin as zero
        torch.nn.init.normal_(parameter, std=0.1)
    return family.assemble(family.build_vae().eval(), text_encoder, transformer)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_training_embeds_text_as_the_pipeline_does(module, name):
    family = module(name)
    pipe = pipeline_of(family)
    ids = family.tokenize(family.build_tokenizer(), CAPTIONS)
    found = family.embed_text(pipe.text_encoder, ids)
    options = {"do_classifier_free_guidance": False, "max_sequence_length": family.TEXT_SLOTS}
    if name == "train_hunyuan_video":
        options = {}
    wanted, *others = pipe.encode_prompt(CAPTIONS, **options)
    known = torch.ones_like(wanted[..., :1])
    if name == "train_hunyuan_video":
        pooled, mask = others
        known = mask[..., None]
        assert pooled.count_nonzero() == 0 and mask.sum(1).tolist() == [6, 12]
    length = min(found.shape[1], wanted.shape[1])
    torch.testing.assert_close(
        (found * known[:, :length])[:, :length], (wanted * known)[:, :length]
    )


def test_hunyuan_videos_template_is_as_long_as_the_pipeline_crops(module):
    family = module("train_hunyuan_video")
    tokenizer = family.build_tokenizer()
    words = tokenizer.convert_ids_to_tokens(family.tokenize(tokenizer, CAPTIONS[:1])[0])
    assert words[:95] == ["template"] * 95 and words[95:101] == [*CAPTIONS[0].split(), "</s>"]


@torch.no_grad()
def test_attention_without_a_mask_equals_hunyuan_videos_own(module):
    family = module("train_hunyuan_video")
    transformer = pipeline_of(family).transformer
    ids = family.tokenize(family.build_tokenizer(), CAPTIONS)
    noisy, text = torch.randn(2, 8, 3, 8, 8), torch.randn(2, 64, 96)
    step, guidance = torch.tensor([500.0, 700.0]), torch.tensor([1.0, 3.0])
    found = family.predict(transformer, noisy, step, text, ids, guidance)
    mask = (ids[:, 95:] > 0).float()
    wanted = transformer(noisy, step, text, mask, torch.zeros(2, 8), guidance * 1000)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_levels_are_the_schedulers(module, name):
    """At the noise of the sampler's step, the predicted target leads back to the clean latents."""
    family = module(name)
    scheduler = pipeline_of(family).scheduler
    scheduler.set_timesteps(10)
    step = scheduler.timesteps[4]
    levels = family.levels((step / 1000).double().view(1).float() + 1e-6)
    clean, noise = torch.randn(2, 1, 8, 3, 4, 4)
    noisy = levels.keep * clean + levels.add * noise
    target = levels.up * noise - levels.down * clean
    if hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas[4]
        torch.testing.assert_close(noisy - sigma * target, clean, rtol=0, atol=2e-2)
    else:
        stepped = scheduler.step(target, int(step), noisy).pred_original_sample
        torch.testing.assert_close(stepped, clean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_stock_code_decodes_frame_by_frame_too(module, name):
    """Equal frames: how many are normalised together does not matter then."""
    family, parts = module(name), module("train_models")
    vae = pipeline_of(family).vae
    parts.zero_past_taps(vae)
    equal, other = torch.randn(1, 8, 1, 4, 4).expand(-1, -1, 7, -1, -1), torch.randn(1, 8, 7, 4, 4)

    def decode_both(latents):
        with parts.per_frame(vae, family.PATCHES):
            found = family.decode(vae, latents)
        wanted = vae.decode(latents).sample
        return found, wanted[:, :, :: (wanted.shape[2] - 1) // 6]

    found, wanted = decode_both(equal)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found, wanted = decode_both(other)
    at_its_place, one_late = (found - wanted).abs().mean(), (found - wanted.roll(1, 2)).abs().mean()
    assert at_its_place < 0.7 * one_late


@pytest.mark.parametrize("name", FAMILIES[1:])
@torch.no_grad()
def test_with_the_text_masked_a_prompt_says_nothing(module, name):
    family, check = module(name), module("prompt_check")
    pipe = pipeline_of(family)
    pipe.set_progress_bar_config(disable=True)
    call = family.CALL | family.SMOKE_CALL | {"num_inference_steps": 1}

    def generate():
        return check.generate(pipe, CAPTIONS, [5, 5], call)

    first, second = generate()
    assert not torch.allclose(first, second, atol=1e-3)
    check.mask_text(pipe.transformer)
    first, second = generate()
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert first.shape == (3, 3, 32, 32)


def test_weights_that_are_kept_stay_as_they_are_beside_what_is_trained(module, tmp_path):
    check, family = module("prompt_check"), module("train_wan")
    given, out = SAMPLES / "prompt_checker.safetensors", tmp_path / "checker.safetensors"
    weights = load_file(given)
    kept = {name: x for name, x in weights.items() if not name.startswith("speed")}
    save_file(kept, tmp_path / "kept.safetensors")
    pipe = load_pipeline(SAMPLES / "wan_tiny", "cpu", torch.float32)
    options = {"frames": 3, "size": 32, "batch": 2, "keep": tmp_path / "kept.safetensors"}
    check.train_checker(out, pipe.vae, family, 0.1, log=lambda **values: None, **options)
    trained = load_file(out)
    assert set(trained) == set(weights)
    assert all(torch.equal(trained[name], x) for name, x in kept.items())


def test_a_prompt_that_asks_no_speed_is_not_wrong_about_it(module):
    check = module("prompt_check")
    wanted = torch.tensor([[0, 1, 2, -1], [0, 1, 2, 1]])
    assert check.accuracy(wanted.clamp_min(0), wanted)["speed"] == 1
    assert check.accuracy(wanted.clamp(0, 0), wanted) == dict(
        zip(check.ATTRIBUTES, (1.0, 0.0, 0.0, 0.0), strict=True)
    )
    assert "speed" not in check.accuracy(wanted[:1], wanted[:1])
    assert check.accuracy(wanted[:0], wanted[:0]) is None
    prompts, labels, _ = check.make_test_prompts(60)
    for prompt, label in zip(prompts, labels[:, 3].tolist(), strict=True):
        assert ("quickly" in prompt, "slowly" in prompt) == (label == 1, label == 0)


def test_a_report_of_prompts_that_all_ask_no_speed_leaves_speed_out(module, monkeypatch):
    check = module("prompt_check")
    monkeypatch.setattr(
        check, "generate", lambda _, prompts, *__: torch.rand(len(prompts), 5, 3, 32, 32)
    )
    monkeypatch.setattr(check, "score_drawn", lambda *_, **__: {})
    assert (check.make_test_prompts(3)[1][:, 3] == -1).all()
    report, _ = check.check_pipeline(None, check.Checker(), {}, 3)
    assert list(report["accuracy_shuffled_prompts"]) == ["colour", "shape", "direction"]


def test_a_report_of_one_prompt_knows_no_chance(module, monkeypatch):
    check = module("prompt_check")
    monkeypatch.setattr(check, "generate", lambda *_: torch.rand(1, 5, 3, 32, 32))
    monkeypatch.setattr(check, "score_drawn", lambda *_, **__: {})
    report, _ = check.check_pipeline(None, check.Checker(), {}, 1)
    assert report["accuracy_shuffled_prompts"] is None and report["prompts"] == 1
    assert report["accuracy"] == report["accuracy_held_out"]


def test_a_report_of_no_prompt_is_refused(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prompt_check.py", "--prompts", "0"])
    with pytest.raises(SystemExit):
        module("prompt_check").main()
    assert "--prompts is at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 181])
def test_more_prompts_than_there_are_are_refused(module, count):
    check = module("prompt_check")
    with pytest.raises(SystemExit, match=f"no {count} different prompts: ask for 1 to 180"):
        check.make_test_prompts(count)
    assert len(set(check.make_test_prompts(180)[0])) == 180


def test_solids_without_a_sheet_say_what_is_missing(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["solids.py"])
    with pytest.raises(SystemExit):
        module("solids").main()
    assert "required: sheet" in capsys.readouterr().err


def test_solids_are_drawn_with_the_same_labels_and_say_so(module):
    clips, solids = module("clips"), module("solids")
    flat = clips.draw_clips(4, 3, 32, 32, torch.Generator().manual_seed(1))
    thick = solids.draw_solids(4, 3, 32, 32, torch.Generator().manual_seed(1))
    assert torch.equal(flat[2], thick[2])
    assert thick[1] == [caption + ", in the light" for caption in flat[1]]
    words = {word for caption in thick[1] for word in caption.replace(",", " ,").split()}
    assert words <= set(clips.vocabulary())
    assert thick[0].isfinite().all() and thick[0].shape == flat[0].shape
    assert 0.01 < (thick[0] - flat[0]).abs().mean() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_smoke_run_saves_a_pipeline_that_loads_bit_for_bit(tmp_path, name):
    out = tmp_path / "box"
    stages = "vae,transformer,guidance,save" if "hunyuan" in name else "vae,transformer,save"
    command = [sys.executable, SAMPLES / f"{name}.py", "--smoke", "--stage", stages]
    folders = ["--out", out, "--work", tmp_path / "work", "--checker", tmp_path / "checker"]
    subprocess.run([*map(str, command + folders)], check=True, timeout=280)
    lines = [json.loads(line) for line in open(f"{out}_training.jsonl")]
    smoke = next(line for line in lines if line["stage"] == "smoke")
    assert smoke["finite"] and smoke["equal"]
    assert all((out / name).exists() for name in ("model_index.json", "dit_sparse.json"))


@pytest.mark.slow
def test_lora_walks_as_it_was_trained(module, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    lora, lora_folder = module("train_lora"), tmp_path / "lora"
    monkeypatch.setattr(sys, "argv", ["train_lora.py", "--smoke", "--out", str(lora_folder)])
    monkeypatch.chdir(SAMPLES.parent)
    distiller = lora.Distiller(lora.parse_arguments())
    for _ in range(lora.STEPS):
        distiller.update(CAPTIONS, 1e-2)
    distiller.average = [p.detach().half().float() for p in distiller.parameters]
    distiller.save()
    (tmp_path / "wan_tiny").symlink_to(SAMPLES / "wan_tiny")
    pipe = load_pipeline(lora_folder, "cpu", torch.float32)
    call = call_arguments(pipe, lora_folder).call | {"height": 32, "width": 32, "num_frames": 2}
    noise = torch.randn(1, 8, 3, 8, 8)
    found = pipe(CAPTIONS[0], latents=noise.clone(), output_type="latent", **call).frames
    assert (lora_folder / "pytorch_lora_weights.safetensors").stat().st_size < 2e6
    wanted = distiller.walk(noise, distiller.embed(CAPTIONS[:1]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_training_fits_the_pipeline_generates(module, name):
    """Two clips of one colour each, told apart by their captions alone."""
    family = module(name)
    torch.manual_seed(0)
    ids = family.tokenize(family.build_tokenizer(), CAPTIONS)
    text_encoder = family.build_text_encoder(len(family.build_tokenizer()))
    transformer = family.build_transformer(2)
    clean = torch.randn(2, 8, 1, 1, 1).expand(2, 8, 3, 8, 8)
    parameters = [*transformer.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], 2e-3)
    for _ in range(150):
        levels, noise = family.levels(family.draw_times(2, 3.0, "cpu")), torch.randn_like(clean)
        keep, add, up, down = (level.view(-1, 1, 1, 1, 1) for level in levels[:4])
        text = family.embed_text(text_encoder, ids)
        noisy = keep * clean + add * noise
        found = family.predict(transformer, noisy, levels.timestep, text, ids)
        loss = (found - (up * noise - down * clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    pipe = family.assemble(family.build_vae(), text_encoder.eval(), transformer.eval())
    call = family.CALL | family.SMOKE_CALL | {"num_inference_steps": 12, "guidance_scale": 1.0}
    found = pipe(CAPTIONS, output_type="latent", **call).frames
    found = found if found.shape == clean.shape else found.transpose(1, 2)
    right, wrong = ((found - other).square().mean() for other in (clean, clean.flip(0)))
    assert right < 0.3 * wrong
