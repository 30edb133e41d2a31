"""How figures are written."""

from PIL import Image


def save_figure(figure, path):
    """As a PNG of few colours: a third of the bytes."""
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
