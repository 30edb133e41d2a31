"""PSNR, SSIM and LPIPS against plain formulas, and what happens where LPIPS cannot be had."""

import importlib.util
import math
import os

import numpy as np
import pytest
import torch

from dit_sparse import metrics
from dit_sparse.metrics import Lpips, compare_clips, torch_home

# torchvision's CUDA build does not load beside a CPU torch, unless its operators have a schema.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
if importlib.util.find_spec("torchvision"):
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")


def clip(seed: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((frames, 24, 20, 3), dtype=np.float32)


def test_psnr_is_that_of_the_whole_clip_and_of_each_frame():
    reference, candidate = clip(0), clip(1)
    result = compare_clips(reference, candidate)
    errors = ((reference.astype(np.float64) - candidate) ** 2).mean((1, 2, 3))
    assert result.psnr == pytest.approx(-10 * math.log10(errors.mean()), abs=1e-5)
    assert result.psnr_per_frame == pytest.approx([-10 * math.log10(e) for e in errors], abs=1e-5)


def test_one_equal_frame_has_no_psnr_and_the_clip_has():
    reference, candidate = clip(0), clip(0)
    candidate[1] = 0
    result = compare_clips(reference, candidate)
    assert result.psnr_per_frame[0] is None and result.psnr_per_frame[1] is not None
    assert result.psnr is not None and not result.identical


def test_identical_clips_have_no_psnr():
    result = compare_clips(clip(0), clip(0))
    assert result.psnr is None and result.identical
    assert result.ssim == pytest.approx(1)


def test_uint8_frames_are_the_same_as_their_floats():
    first, second = ((clip(seed) * 255).astype(np.uint8) for seed in (0, 1))
    floats = compare_clips(first.astype(np.float32) / 255, second.astype(np.float32) / 255)
    assert compare_clips(first, second).psnr == pytest.approx(floats.psnr)


def test_ssim_follows_its_definition():
    reference, candidate = clip(2, frames=2), clip(3, frames=2)
    candidate = 0.7 * reference + 0.3 * candidate
    expected = np.mean([slow_ssim(a, b) for a, b in zip(reference, candidate)])
    assert compare_clips(reference, candidate).ssim == pytest.approx(expected, abs=1e-4)


def slow_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Gaussian window 11, sigma 1.5, frames continued by reflection."""
    axis = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2
    first, second = (
        np.pad(frame, ((5, 5), (5, 5), (0, 0)), mode="reflect") for frame in (first, second)
    )
    values = []
    for channel in range(3):
        a, b = first[..., channel].astype(np.float64), second[..., channel].astype(np.float64)
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * p**2).sum() - mean_p**2, (window * q**2).sum() - mean_q**2
                covariance = (window * p * q).sum() - mean_p * mean_q
                values.append(
                    (2 * mean_p * mean_q + 0.01**2)
                    * (2 * covariance + 0.03**2)
                    / ((mean_p**2 + mean_q**2 + 0.01**2) * (var_p + var_q + 0.03**2))
                )
    return float(np.mean(values))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (clip(0), clip(0, frames=2), "equal shapes"),
        (clip(0)[..., :2], clip(0)[..., :2], r"\(T, H, W, 3\)"),
        (clip(0)[:, :8], clip(0)[:, :8], "at least 11"),
    ],
)
def test_frames_that_do_not_fit_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        compare_clips(first, second)


def test_lpips_that_cannot_be_had_is_none_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    lpips = Lpips()
    assert compare_clips(clip(0), clip(1), lpips).lpips is None
    assert "torchvision" in lpips.reason


def test_a_weights_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="lpips-weights"):
        Lpips(weights=tmp_path)


def test_an_unknown_lpips_net_is_refused():
    with pytest.raises(ValueError, match="alex, vgg"):
        Lpips(net="alexnet")


def test_a_broken_torchvision_is_told_in_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(metrics.__dict__, "torchvision", raising=False)
    monkeypatch.delitem(__import__("sys").modules, "torchvision", raising=False)
    problem = metrics.torchvision_problem()
    assert "operator nms does not exist" in problem and "uninstall" in problem


def test_torch_home_is_put_back(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", "before")
    with torch_home(tmp_path):
        assert os.environ["TORCH_HOME"] == str(tmp_path.resolve())
    assert os.environ["TORCH_HOME"] == "before"


def test_torch_home_that_was_not_set_is_not_set_again(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_HOME", raising=False)
    with torch_home(tmp_path):
        assert os.environ["TORCH_HOME"] == str(tmp_path)
    assert "TORCH_HOME" not in os.environ


class MeanDistance:
    """Stands for torchmetrics' LPIPS: a mean over what it was given since its last reset."""

    def reset(self):
        self.found = []

    def update(self, first, second):
        assert first.shape == second.shape == (1, 3, 16, 16)
        assert first.min() == -1 and first.max() == 1
        self.found.append((first - second).abs().mean())

    def compute(self):
        return torch.stack(self.found).mean()


def test_lpips_takes_frames_one_by_one_scaled_from_minus_one_to_one(monkeypatch):
    monkeypatch.setattr(metrics, "torchvision_problem", lambda: None)
    monkeypatch.setattr(Lpips, "_load", lambda self: None)
    lpips = Lpips(net="vgg")
    assert lpips.net == "vgg" and lpips.reason is None
    lpips.metric = MeanDistance()
    dark, light = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.25)
    for frames in (dark, light):  # the whole range in each
        frames[..., 0, 0], frames[..., 0, 1] = 0, 1
    expected = float((light - dark).abs().mean()) * 2
    for _ in range(2):
        assert lpips(dark, light) == pytest.approx(expected)


def test_a_clip_is_told_the_mean_lpips_of_its_frames():
    values, told = iter([0.1, 0.2, 0.6]), []
    found = compare_clips(clip(0), clip(1), lambda a, b: next(values), lambda: told.append(1))
    assert found.lpips == pytest.approx(0.3) and len(told) == 3
    assert compare_clips(clip(0), clip(1)).lpips is None
    assert compare_clips(clip(0), clip(1), lambda a, b: None).lpips is None


def test_frames_as_large_as_the_window_of_ssim_are_compared():
    frames = clip(0)[:, :11, :11]
    assert compare_clips(frames, frames).ssim == pytest.approx(1)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_lpips_with_weights_from_a_folder(tmp_path):
    """Random weights under the real file's name: the value means nothing, its order does."""
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    url = torchvision.models.AlexNet_Weights.DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), folder / url.rsplit("/", 1)[-1])
    lpips = Lpips(weights=tmp_path)
    large = np.repeat(np.repeat(clip(0), 4, 1), 4, 2)
    near, far = large + 0.01, np.repeat(np.repeat(clip(1), 4, 1), 4, 2)
    assert lpips.reason is None
    assert compare_clips(large, large, lpips).lpips == pytest.approx(0, abs=1e-6)
    near, far = (compare_clips(large, other.clip(0, 1), lpips).lpips for other in (near, far))
    assert 0 < near < far
