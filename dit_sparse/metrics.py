"""PSNR, SSIM and LPIPS between two clips, by torchmetrics, on lossless frames.

PSNR is taken from the mean squared error of the whole clip, and per frame beside it; SSIM per frame
(Gaussian window 11, sigma 1.5) and averaged; LPIPS on inputs in [-1, 1], its network named.
Identical clips have no finite PSNR: it is None and `identical` is True.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

SSIM_WINDOW = 11
LPIPS_WEIGHTS = {"alex": ("alexnet", "AlexNet_Weights"), "vgg": ("vgg16", "VGG16_Weights")}


@dataclass(frozen=True)
class ClipMetrics:
    """How far one clip is from another; PSNR in dB, None where the frames are identical."""

    psnr: float | None
    ssim: float
    lpips: float | None
    psnr_per_frame: list[float | None]
    identical: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Lpips:
    """LPIPS for clips; calling it gives None where it cannot be had, and `reason` says why.

    The backbone's ImageNet weights are torchvision's. They are never downloaded from here.

    Args:
        weights: folder that torch uses as TORCH_HOME (weights in `hub/checkpoints/` below it);
            None for torch's own.
        net: "alex" or "vgg".

    Raises:
        ValueError: a net that is not known.
        FileNotFoundError: `weights` was given and does not hold the file.
    """

    def __init__(self, weights: str | Path | None = None, net: str = "alex"):
        if net not in LPIPS_WEIGHTS:
            raise ValueError(f"LPIPS net must be one of {', '.join(LPIPS_WEIGHTS)}, got {net!r}")
        self.net = net
        self.metric: Any = None
        self.reason = torchvision_problem()
        if self.reason is None:
            with torch_home(weights):
                self.reason = self._load()
        if self.reason is not None and weights is not None:
            raise FileNotFoundError(f"--lpips-weights {weights}: {self.reason}")

    def _load(self) -> str | None:
        import torchvision

        model, weights_name = LPIPS_WEIGHTS[self.net]
        url = getattr(torchvision.models, weights_name).DEFAULT.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
        if not path.is_file():
            return (
                f"torchvision's {model} weights are not at {path}. Download {url} to that place, "
                f"or name with --lpips-weights a folder that has it as hub/checkpoints/{path.name}"
            )
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        options: Any = {"net_type": self.net}
        self.metric = LearnedPerceptualImagePatchSimilarity(**options).eval()
        return None

    @torch.no_grad()
    def __call__(self, reference: Tensor, candidate: Tensor) -> float | None:
        """Mean over the frames of two clips (T, 3, H, W) in [0, 1]."""
        if self.metric is None:
            return None
        self.metric.reset()
        # Frame by frame: VGG features of a long clip would need gigabytes.
        for first, second in zip(reference.split(1), candidate.split(1), strict=True):
            self.metric.update(second * 2 - 1, first * 2 - 1)
        return float(self.metric.compute())


def torchvision_problem() -> str | None:
    """Why torchvision cannot be used, in one sentence, or None."""
    if importlib.util.find_spec("torchvision") is None:
        return "LPIPS needs torchvision's networks: pip install 'dit-sparse[lpips]'"
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a build made for another torch fails in many ways
        detail = str(error).strip().split("\n")[0]
        return (
            f"torchvision does not work with torch {torch.__version__} ({detail}): install the "
            "build made for this torch, or pip uninstall torchvision"
        )
    return None


@contextmanager
def torch_home(folder: str | Path | None) -> Iterator[None]:
    """TORCH_HOME set to `folder` for a while; nothing changes where it is None."""
    before = os.environ.get("TORCH_HOME")
    if folder is not None:
        os.environ["TORCH_HOME"] = str(Path(folder).expanduser().resolve())
    try:
        yield
    finally:
        if folder is not None:
            os.environ.pop("TORCH_HOME")
            if before is not None:
                os.environ["TORCH_HOME"] = before


def compare_clips(
    reference: np.ndarray | Tensor,
    candidate: np.ndarray | Tensor,
    lpips: Lpips | None = None,
    on_frame: Callable[[], None] = lambda: None,
) -> ClipMetrics:
    """PSNR, SSIM and LPIPS of `candidate` against `reference`.

    Args:
        reference, candidate: frames (T, H, W, 3), uint8 or float in [0, 1], of equal shape.
        lpips: an `Lpips`; None leaves LPIPS out.
        on_frame: called after each frame.

    Raises:
        ValueError: shapes differ, are not (T, H, W, 3), or frames are smaller than the SSIM window.
    """
    first, second = as_clip(reference), as_clip(candidate)
    if first.shape != second.shape:
        raise ValueError(
            f"clips must have equal shapes, got {list(first.shape)} and {list(second.shape)}"
        )
    if min(first.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW} pixels a side")
    psnrs, ssims, distances = [], [], []
    for a, b in zip(first.split(1), second.split(1), strict=True):
        psnrs.append(psnr(a, b))
        ssims.append(ssim(a, b))
        distances.append(lpips(a, b) if lpips else None)
        on_frame()
    known = [distance for distance in distances if distance is not None]
    return ClipMetrics(
        psnr=psnr(first, second),
        ssim=fmean(ssims),
        lpips=fmean(known) if known else None,
        psnr_per_frame=psnrs,
        identical=bool(torch.equal(first, second)),
    )


def as_clip(frames: np.ndarray | Tensor) -> Tensor:
    """(T, H, W, 3) uint8 or float in [0, 1] -> (T, 3, H, W) float32 in [0, 1]."""
    clip = torch.as_tensor(frames)
    if clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"expected frames of shape (T, H, W, 3), got {list(clip.shape)}")
    scale = 1.0 if clip.is_floating_point() else 255.0
    return clip.permute(0, 3, 1, 2).float().div(scale).contiguous()


def psnr(reference: Tensor, candidate: Tensor) -> float | None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if torch.equal(reference, candidate):
        return None
    # float64: the mean of millions of small squares in float32 moves the third decimal.
    return float(peak_signal_noise_ratio(candidate.double(), reference.double(), data_range=1.0))


def ssim(reference: Tensor, candidate: Tensor) -> float:
    """Of one frame (1, 3, H, W)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(
        structural_similarity_index_measure(  # type: ignore[arg-type]
            candidate, reference, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=1.0
        )
    )
