"""Where the eye goes: what differs from the colours at the picture's edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Values = npt.NDArray[np.float32]

LONG_SIDE = 64  # pixels of the small copy that is judged
EDGE = 0.1  # of the short side: how wide the strips along the edges are
WHITE = np.array([0.95047, 1.0, 1.08883], dtype=np.float32)  # D65
RGB_TO_XYZ = np.array(  # IEC 61966-2-1
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=np.float32
)


def small_copy(image: Image.Image, long_side: int, part: tuple[int, int, int, int] | None = None) -> Image.Image:
    """The picture (or its part x0, y0, x1, y1) with its long side at most `long_side` pixels, its short one at least 8."""
    x0, y0, x1, y1 = part or (0, 0, *image.size)
    scale = min(1.0, long_side / max(x1 - x0, y1 - y0))
    size = max(8, round((x1 - x0) * scale)), max(8, round((y1 - y0) * scale))
    return image.resize(size, Image.Resampling.LANCZOS, box=(x0, y0, x1, y1), reducing_gap=2.0)


def lab(image: Image.Image) -> Values:
    """(H, W, 3) CIE L*a*b* of an sRGB picture: equal distances look about equally different. L 0..100."""
    values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = linear @ RGB_TO_XYZ.T / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    stacked: Any = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
    return stacked.astype(np.float32)


def saliency(image: Image.Image, part: tuple[int, int, int, int] | None = None) -> Values:
    """(h, w) in 0..1, 64 long: how unlike each place is to the four edges, which are mostly background.

    part  x0, y0, x1, y1 in pixels; the picture to judge, if not the whole

    The distance to an edge's colours is Mahalanobis'; the most different edge is left out, since a subject may be cut
    by one (the backgroundness of Zhang et al., "Minimum Barrier Salient Object Detection at 80 FPS", ICCV 2015).
    """
    colours = lab(small_copy(image, LONG_SIDE, part))
    wide = max(2, round(EDGE * min(colours.shape[:2])))
    distances = []
    for strip in (colours[:wide], colours[-wide:], colours[:, :wide], colours[:, -wide:]):
        samples = strip.reshape(-1, 3)
        inverse = np.linalg.inv(np.cov(samples.T) + 10 * np.eye(3))  # 10: noise of a plain edge counts for little
        away = colours - samples.mean(axis=0)
        distance = np.sqrt(np.einsum("hwi,ij,hwj->hw", away, inverse, away))
        distances.append(distance / max(float(distance.max()), 1e-6))
    found = np.sum(distances, axis=0) - np.max(distances, axis=0)
    low, high = float(found.min()), float(found.max())
    return ((found - low) / max(high - low, 1e-6)).astype(np.float32)


def stands_alone(found: Values) -> float | None:
    """The share of the picture that a subject takes, where saliency can tell: a clear shape that touches no edge.

    None elsewhere, which is nearly everywhere: on cluttered photos its guess has nothing to do with the subject's size.
    """
    threshold, explained = otsu(found)
    inside = found > threshold
    at_edge = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]]).mean()
    return float(inside.mean()) if explained >= 0.85 and at_edge <= 0.02 else None


def otsu(values: Values) -> tuple[float, float]:
    """The threshold that best parts values (0..1) into two groups, and the share of the variance that it explains."""
    counts, edges = np.histogram(values, bins=64, range=(0, 1))
    shares, centres = counts / counts.sum(), (edges[1:] + edges[:-1]) / 2
    below, moment = np.cumsum(shares), np.cumsum(shares * centres)
    between = (moment[-1] * below - moment) ** 2 / np.maximum(below * (1 - below), 1e-9)
    best = int(np.argmax(between[:-1]))
    return float(edges[best + 1]), float(between[best] / max(float(values.var()), 1e-9))
