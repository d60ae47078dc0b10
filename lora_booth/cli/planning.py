"""The command that predicts the memory of a training."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import SettingsError
from .app import Base, app, say
from .arguments import Quantize, check_dtype, load_base


@app.command()
def plan(
    base: Base = "toybox",
    family: Annotated[str | None, typer.Option(help="instead of --base: the published shapes of sd1, sd2 or sdxl")] = None,
    vram: Annotated[float | None, typer.Option(help="memory budget in GB, e.g. 12 [what is free, or all of --gpu]")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="plan for a T4, L4, 3090, 4090, A100, H100 or H200 [without a GPU, --vram plans for a T4]"),
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank, e.g. 16")] = 8,
    text_encoder: Annotated[bool, typer.Option(help="also train the text encoders")] = False,
    resolution: Annotated[int | None, typer.Option(help="side in pixels, e.g. 512 [the base's own]")] = None,
    batch_size: Annotated[int, typer.Option(help="photos in a batch, e.g. 2; as many class images are added")] = 1,
    gradient_accumulation: Annotated[int, typer.Option(help="batches for one optimizer update, e.g. 4")] = 1,
    prior_loss_weight: Annotated[float, typer.Option(help="weight of the class images, e.g. 0.5; 0: none")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="precision of the base: fp16, bf16 or fp32 [by the device]")] = None,
    photos: Annotated[int, typer.Option(min=1, help="number of photos, e.g. 8")] = 5,
    quantize: Quantize = None,
    measure: Annotated[bool, typer.Option(help="load --base and time a few training steps on this machine")] = False,
    json: Annotated[bool, typer.Option(help="print everything as JSON, in bytes and seconds")] = False,
) -> None:
    """Predict the memory of a training and choose the fastest settings that fit (exit code 2 when nothing does)."""
    from ..base.families import FAMILIES
    from ..config import LoraSpec, TrainingConfig

    if family is not None and family not in FAMILIES:
        raise SettingsError(f"family {family!r} is unknown; allowed: {', '.join(FAMILIES)}")
    if dtype is not None:
        check_dtype(dtype)
    config = TrainingConfig(
        resolution=resolution,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        prior_loss_weight=prior_loss_weight,
    )
    lora = LoraSpec(rank=rank, text_encoder=text_encoder)
    from json import dumps

    import torch

    from ..planning.planning import plan as make_plan

    precision = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype or "")
    if measure and (family or vram or gpu or dtype):
        raise SettingsError("--measure times --base on this machine; leave out --family, --vram, --gpu and --dtype")
    source = load_base(base, quantize=quantize) if measure else family or base
    found = make_plan(
        source,
        lora=lora,
        config=config,
        vram_gb=vram,
        gpu=gpu,
        dtype=precision,
        photos=photos,
        quantize=None if measure else quantize,
        measure=measure,
    )
    say(dumps(found.to_json(), indent=1) if json else str(found))
    _ = found.config  # raises DoesNotFit
