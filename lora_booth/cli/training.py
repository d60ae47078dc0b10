"""Commands from photos to an adapter, and what a training takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SettingsError
from .app import Base, Photos, app, say
from .arguments import Quantize, check_adapter_file, check_dtype, check_layout, load_base

Crop = Annotated[str, typer.Option(help="which square of a photo to use: smart (keeps the subject, no black bars) or center")]


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder to write to, e.g. demo")] = Path("demo")) -> None:
    """Try everything on the embedded base, offline: train two subjects, compare before and after, print scores."""
    from .demo import run_demo

    run_demo(load_base("toybox"), out, say=say)
    say(f"look at {out}/before_after.png, {out}/together.png and {out}/gallery.html")


@app.command()
def photos(
    folder: Photos,
    resolution: Annotated[int, typer.Option(min=8, help="side of the training pictures in pixels, e.g. 512")] = 512,
    sheet: Annotated[Path | None, typer.Option(help="write a contact sheet of the crops here, e.g. crops.png")] = None,
    crop: Crop = "smart",
    make_masks: Annotated[
        bool, typer.Option(help="first write NAME.mask.png beside photos that have none (needs lora-booth[masks])")
    ] = False,
    json: Annotated[bool, typer.Option(help="print everything as JSON")] = False,
) -> None:
    """Show which photos will be used, which will not and why, and what may be wrong with them."""
    from json import dumps

    from ..photos.audit import audit_photos
    from ..photos.finding import find_photos
    from ..photos.segmenting import make_masks as write_masks

    if sheet is not None and sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise SettingsError(f"{sheet}: contact sheets are saved as .png, .jpg or .webp")
    if make_masks:
        write_masks(folder, say=lambda line: print(f"mask     {line}", file=sys.stderr if json else sys.stdout, flush=True))
    found = find_photos(folder, crop=crop, minimum=1, maximum=1000)  # type: ignore[arg-type]  # checked by it
    audit = audit_photos(found.photos, found.skipped, resolution=resolution)
    say(dumps(audit.as_dict(), indent=2) if json else str(audit))
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        audit.sheet().save(sheet)
        print(f"wrote {sheet}", file=sys.stderr if json else sys.stdout, flush=True)


@app.command()
def token(
    base: Base = "toybox",
    check: Annotated[str | None, typer.Option(help="check this token instead of proposing some, e.g. zwx")] = None,
    count: Annotated[int, typer.Option(min=1, help="number of tokens to propose, e.g. 8")] = 8,
) -> None:
    """Propose rare tokens for a base, or check one (exit code 1: it cannot be used)."""
    from ..subject.tokens import check_token, propose_tokens

    loaded = load_base(base)
    if check is None:
        say("\n".join(propose_tokens(loaded.tokenizer, count, known_rare=loaded.rare_tokens)))
        return
    report = check_token(check, loaded.tokenizer, known_rare=loaded.rare_tokens)
    say(f"{check}: {len(report.pieces)} piece(s): {' '.join(report.pieces)}")
    for line in (*report.problems, *report.warnings):
        say(line)
    if not report.ok:
        raise typer.Exit(1)
    say("free to take a new meaning")


@app.command()
def train(
    folder: Photos,
    token: Annotated[str, typer.Option(help="rare word that stands for the subject, e.g. sks")],
    class_noun: Annotated[str, typer.Option(help="what the subject is, e.g. dog")],
    out: Annotated[Path, typer.Option(help="adapter file to write, e.g. rex.safetensors")],
    base: Base = "toybox",
    run: Annotated[
        Path | None, typer.Option(help="folder for checkpoints and the report, e.g. runs/rex [OUT without its ending]")
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank, e.g. 16; 4 to 32 is usual")] = 8,
    alpha: Annotated[float | None, typer.Option(help="scales the change by alpha / rank, e.g. 16 [rank]")] = None,
    text_encoder: Annotated[bool, typer.Option(help="also train the text encoders")] = False,
    steps: Annotated[int | None, typer.Option(help="optimizer updates, e.g. 800 [from the number of photos]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="learning rate at its highest, e.g. 1e-4 [from the base]")] = None,
    batch_size: Annotated[int, typer.Option(help="photos in a forward pass, e.g. 2; as many class images are added")] = 1,
    gradient_accumulation: Annotated[int, typer.Option(help="forward passes for one optimizer update, e.g. 4")] = 1,
    prior_loss_weight: Annotated[float, typer.Option(help="weight of the class images, e.g. 0.5; 0: none")] = 1.0,
    class_images: Annotated[
        int | None, typer.Option(help="pictures of the plain class to train on as well, e.g. 100 [from the number of photos]")
    ] = None,
    min_snr_gamma: Annotated[float | None, typer.Option(help="gamma of min-SNR loss weighting, e.g. 5 [off]")] = None,
    flip: Annotated[bool, typer.Option(help="also train on mirrored photos")] = False,
    resolution: Annotated[int | None, typer.Option(help="side in pixels, e.g. 512 [the base's own]")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="recompute activations: less memory, slower")] = False,
    pictures_at_a_time: Annotated[
        int | None, typer.Option(help="pictures of a batch in memory at a time, e.g. 1 [all]")
    ] = None,
    quantize: Quantize = None,
    attention: Annotated[str, typer.Option(help="attention kernel: auto (the fastest here), plain, sdpa or xformers")] = "auto",
    sample_every: Annotated[int | None, typer.Option(help="updates between sample pictures, e.g. 100 [no samples]")] = None,
    sample_prompt: Annotated[
        list[str] | None,
        typer.Option(help="prompt of the samples, e.g. 'sks dog at sea'; repeatable [subject, subject in snow, class]"),
    ] = None,
    sample_seeds: Annotated[int, typer.Option(help="sample pictures of each prompt, e.g. 2")] = 1,
    track: Annotated[
        list[str] | None, typer.Option(help="log to tensorboard (files in --run) or wandb (uploads samples too)")
    ] = None,
    layout: Annotated[str, typer.Option(help="names of the tensors: kohya (diffusers, ComfyUI, A1111) or peft")] = "kohya",
    crop: Crop = "smart",
    min_photos: Annotated[int, typer.Option(help="fewest photos to accept, e.g. 1")] = 3,
    max_photos: Annotated[int, typer.Option(help="most photos to accept, e.g. 200")] = 100,
    seed: Annotated[int, typer.Option(help="seed of every random draw, e.g. 7; the same seed gives the same adapter")] = 0,
    time_limit: Annotated[float | None, typer.Option(help="minutes, e.g. 25, after which the adapter so far is saved")] = None,
    mirror: Annotated[Path | None, typer.Option(help="folder for copies of the checkpoints, e.g. /mnt/drive/rex")] = None,
    restart: Annotated[bool, typer.Option(help="discard an earlier run in the same folder")] = False,
) -> None:
    """Train an adapter on a folder of photos. Run the same command again to continue an interrupted run."""
    from ..config import LoraSpec, TrainingConfig
    from ..run import train as train_adapter
    from ..subject.subject import Subject
    from ..training.distributed import is_main, own_gpu

    check_layout(layout)
    check_adapter_file(out)
    config = TrainingConfig(
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        prior_loss_weight=prior_loss_weight,
        class_images=class_images,
        min_snr_gamma=min_snr_gamma,
        flip=flip,
        resolution=resolution,
        gradient_checkpointing=gradient_checkpointing,
        pictures_at_a_time=pictures_at_a_time,
        attention=attention,  # type: ignore[arg-type]  # checked by TrainingConfig
        sample_every=sample_every,
        sample_prompt=tuple(sample_prompt) if sample_prompt else None,
        sample_seeds=sample_seeds,
        seed=seed,
    )
    lora = LoraSpec(rank=rank, alpha=alpha, text_encoder=text_encoder)
    subject = Subject.from_folder(
        folder,
        token=token,
        class_noun=class_noun,
        crop=crop,  # type: ignore[arg-type]  # checked by it
        minimum=min_photos,
        maximum=max_photos,
    )
    for skipped in subject.skipped:
        print(f"not used: {skipped.name}: {skipped.reason}", file=sys.stderr)
    own_gpu()
    loaded = load_base(base, quantize=quantize)
    place = {"out": run or out.with_suffix(""), "mirror": mirror, "restart": restart, "track": track or ()}
    adapter = train_adapter(loaded, subject, lora=lora, config=config, time_limit=time_limit, **place)  # type: ignore[arg-type]
    if not is_main():
        return
    file = adapter.save(out, layout=layout)  # type: ignore[arg-type]
    say(f"wrote {file} ({file.stat().st_size / 1e6:.2f} MB); prompt: {adapter.card.prompt}")


@app.command()
def cache(clear: Annotated[bool, typer.Option(help="delete the cache")] = False) -> None:
    """Print where encoded photos and class images of earlier runs are cached, and their size; or delete them."""
    from ..cache import cache_folder, cache_size, clear_cache

    if clear:
        say(f"{cache_folder()}: deleted {clear_cache() / 1e6:.1f} MB")
    else:
        say(f"{cache_folder()}: {cache_size() / 1e6:.1f} MB")


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
