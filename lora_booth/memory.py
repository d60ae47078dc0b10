"""What fits into memory at a time."""

from __future__ import annotations

PIXELS_AT_A_TIME = 4 * 512 * 512  # through VAE or sampler on a GPU of 15 GB, in fp32
MOST_AT_A_TIME = 8


def pictures_at_a_time(resolution: int) -> int:
    """How many square pictures of this side (pixels) go through the VAE or the sampler together: 4 at 512, 1 at 1024."""
    return max(1, min(MOST_AT_A_TIME, PIXELS_AT_A_TIME // resolution**2))
