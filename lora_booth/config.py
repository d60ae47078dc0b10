"""What is trained (`LoraSpec`) and how (`TrainingConfig`). Frozen; `dataclasses.replace` makes a variant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .errors import SettingsError

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
STEPS, GUIDANCE = 25, 5.0  # denoising steps and guidance scale of a picture; chosen
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class LoraSpec:
    """The shape of the adapter: which modules get a low-rank update, and its rank."""

    rank: int = 8
    alpha: float | None = None  # the update is scaled by alpha / rank; None: alpha = rank
    dropout: float = 0.0  # on the input of the update, while training
    target_modules: tuple[str, ...] = ATTENTION_TARGETS  # U-Net modules whose path ends like this
    text_encoder: bool = False  # also adapt the text encoders
    text_target_modules: tuple[str, ...] = TEXT_TARGETS

    def __post_init__(self) -> None:
        check(1 <= self.rank <= 512, f"rank {self.rank}", "a whole number from 1 to 512; 4 to 32 is usual")
        check(self.alpha is None or 0 < self.alpha <= 16 * self.rank, f"alpha {self.alpha}", "above 0, at most 16 x rank")
        check(0 <= self.dropout < 1, f"dropout {self.dropout}", "at least 0 and below 1")
        check(bool(self.target_modules), "target_modules ()", f"at least one, as in {ATTENTION_TARGETS}")

    @property
    def scale_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. `None` means chosen from the photos and the base (`docs/defaults.md` gives the reasons)."""

    steps: int | None = None  # optimizer updates
    learning_rate: float | None = None
    batch_size: int = 1  # photos; the same number of class images is added
    gradient_accumulation: int = 1  # batches per update
    pictures_at_a_time: int | None = None  # of a batch through the U-Net; fewer need less memory; None: all
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int | None = None  # updates of linear warm-up from 0
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0  # math.inf: no clipping
    prior_loss_weight: float = 1.0  # 0: no prior preservation
    class_images: int | None = None  # how many pictures of the plain class preserve the prior
    min_snr_gamma: float | None = None  # 5.0 is usual; None: all timesteps count equally
    flip: bool = False  # also train on mirrored photos (not for text or faces)
    resolution: int | None = None  # pixels; None: the base's own
    seed: int = 0
    attention: Literal["auto", "sdpa", "plain", "xformers"] = "auto"  # auto: the fastest, by a short measurement
    gradient_checkpointing: bool = False  # less memory, about a third slower
    lean: bool = True  # frozen layers store nothing that only their weights' gradients would need
    capture: Literal["auto", "on", "off"] = "auto"  # replay a recorded step; auto: where that is possible
    compile: bool = False  # torch.compile the U-Net's repeated blocks; the first step takes a minute or more
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8-bit state by bitsandbytes
    checkpoint_every: int = 50  # updates between two checkpoints of a run with a folder
    checkpoint_minutes: float = 2.0  # or minutes, whichever comes first
    sample_every: int | None = None  # updates between two rounds of sample pictures; None: no samples
    sample_prompt: str | tuple[str, ...] | None = None  # None: the subject, the subject in the snow, the plain class
    sample_seeds: int = 1  # pictures of each prompt, with `seed` and the seeds after it

    def __post_init__(self) -> None:
        check(self.steps is None or self.steps >= 1, f"steps {self.steps}", "at least 1")
        rate = self.learning_rate
        check(rate is None or 0 < rate <= 0.1, f"learning_rate {rate}", "above 0, at most 0.1; 1e-4 to 2e-3 is usual for LoRA")
        check(self.batch_size >= 1, f"batch_size {self.batch_size}", "at least 1")
        check(self.gradient_accumulation >= 1, f"gradient_accumulation {self.gradient_accumulation}", "at least 1")
        few = self.pictures_at_a_time
        check(few is None or few >= 1, f"pictures_at_a_time {few}", "at least 1")
        check(self.lr_schedule in ("constant", "cosine"), f"lr_schedule {self.lr_schedule!r}", "constant or cosine")
        check(self.warmup_steps is None or self.warmup_steps >= 0, f"warmup_steps {self.warmup_steps}", "at least 0")
        check(self.max_grad_norm > 0, f"max_grad_norm {self.max_grad_norm}", "above 0 (math.inf: no clipping)")
        check(
            math.isfinite(self.prior_loss_weight) and self.prior_loss_weight >= 0,
            f"prior_loss_weight {self.prior_loss_weight}",
            "at least 0 (0: no prior preservation)",
        )
        check(self.class_images is None or self.class_images >= 1, f"class_images {self.class_images}", "at least 1")
        check(self.min_snr_gamma is None or self.min_snr_gamma > 0, f"min_snr_gamma {self.min_snr_gamma}", "above 0")
        check(self.resolution is None or self.resolution >= 8, f"resolution {self.resolution}", "a multiple of 8")
        kernels = ("auto", "sdpa", "plain", "xformers")
        check(self.attention in kernels, f"attention {self.attention!r}", "auto, plain, sdpa or xformers")
        check(self.capture in ("auto", "on", "off"), f"capture {self.capture!r}", "auto, on or off")
        check(self.optimizer in ("adamw", "adamw8bit"), f"optimizer {self.optimizer!r}", "adamw or adamw8bit")
        check(self.checkpoint_every >= 1, f"checkpoint_every {self.checkpoint_every}", "at least 1")
        check(
            self.checkpoint_minutes > 0, f"checkpoint_minutes {self.checkpoint_minutes}", "above 0 (math.inf: by steps alone)"
        )
        check(self.sample_every is None or self.sample_every >= 1, f"sample_every {self.sample_every}", "at least 1")
        check(self.sample_seeds >= 1, f"sample_seeds {self.sample_seeds}", "at least 1")


def check(ok: bool, value: str, allowed: str) -> None:
    if not ok:
        raise SettingsError(f"{value} is out of range; allowed: {allowed}")
