"""Training: photos -> `LatentCache` -> optimizer updates -> Adapter."""

from .preparation import prepare
from .run import train, training_steps

__all__ = ["prepare", "train", "training_steps"]
