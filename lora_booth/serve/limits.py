"""What callers may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check, check_types


@dataclass(frozen=True)
class Limits:
    """Sizes are limited by the base: a picture has at most twice the area that it was trained for."""

    max_steps: int = 50  # most denoising steps of a picture, e.g. 50
    queue: int = 64  # most pictures that wait, e.g. 64; a request beyond them is answered with 429
    timeout: float = 300.0  # seconds until a request is given up, e.g. 300
    loaded: int = 100  # adapters in memory, e.g. 100; beyond them, the one that was not used for longest goes

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_steps", "queue", "loaded"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}", "at least 1")
        check(self.timeout > 0, f"timeout {self.timeout:g}", "above 0 (seconds)")
