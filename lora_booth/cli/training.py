"""Commands from photos to an adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SettingsError
from .app import Base, Photos, app, say
from .arguments import Quantize, check_adapter_file, check_layout, load_base

Crop = Annotated[str, typer.Option(help="the square of each photo: smart (keeps the subject, no black bars) or center")]


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for everything that it makes")] = Path("demo")) -> None:
    """The whole job on the embedded base, offline: train two subjects, compare before and after, print scores."""
    from .demo import run_demo

    run_demo(load_base("toybox"), out, say=say)
    say(f"look at {out}/before_after.png, {out}/together.png and {out}/gallery.html")


@app.command()
def photos(
    folder: Photos,
    resolution: Annotated[int, typer.Option(min=8, help="side of the training pictures, in pixels")] = 512,
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
    count: Annotated[int, typer.Option(min=1, help="how many tokens to propose")] = 8,
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
    token: Annotated[str, typer.Option(help="a rare word that shall mean the subject, as 'sks'")],
    class_noun: Annotated[str, typer.Option(help="what the subject is, as 'dog'")],
    out: Annotated[Path, typer.Option(help="the adapter file to write")],
    base: Base = "toybox",
    run: Annotated[
        Path | None, typer.Option(help="folder of the run, to continue when interrupted [OUT without ending]")
    ] = None,
    rank: Annotated[int, typer.Option(help="of the change to each layer; 4 to 32 is usual")] = 8,
    alpha: Annotated[float | None, typer.Option(help="the change is scaled by alpha / rank [rank]")] = None,
    text_encoder: Annotated[bool, typer.Option(help="adapt the text encoders as well")] = False,
    steps: Annotated[int | None, typer.Option(help="optimizer updates [from the number of photos]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[from the base]")] = None,
    batch_size: Annotated[int, typer.Option(help="photos a forward pass; as many class images come on top")] = 1,
    gradient_accumulation: Annotated[int, typer.Option(help="forward passes for one update")] = 1,
    prior_loss_weight: Annotated[float, typer.Option(help="0: no prior preservation")] = 1.0,
    class_images: Annotated[
        int | None, typer.Option(help="how many pictures of the bare class keep the prior [from the number of photos]")
    ] = None,
    min_snr_gamma: Annotated[float | None, typer.Option(help="5 is usual [off]")] = None,
    flip: Annotated[bool, typer.Option(help="also train on mirrored photos")] = False,
    resolution: Annotated[int | None, typer.Option(help="pixels [the base's own]")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="less memory, slower")] = False,
    pictures_at_a_time: Annotated[int | None, typer.Option(help="of a batch; 1 takes the least memory [all]")] = None,
    quantize: Quantize = None,
    attention: Annotated[str, typer.Option(help="auto (measured here), plain, sdpa or xformers")] = "auto",
    sample_every: Annotated[int | None, typer.Option(help="updates between two rounds of sample pictures [none]")] = None,
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="of the samples; once for each [the subject, that in the snow, the bare class]")
    ] = None,
    sample_seeds: Annotated[int, typer.Option(help="sample pictures of each prompt")] = 1,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard (files in the run's folder) or wandb, which sends away samples too")
    ] = None,
    layout: Annotated[str, typer.Option(help="kohya (diffusers, ComfyUI, A1111) or peft")] = "kohya",
    crop: Crop = "smart",
    min_photos: Annotated[int, typer.Option(help="go on with as few as this")] = 3,
    max_photos: Annotated[int, typer.Option(help="go on with as many as this")] = 100,
    seed: Annotated[int, typer.Option(help="of every random draw: the same seed gives the same adapter")] = 0,
    time_limit: Annotated[float | None, typer.Option(help="minutes; writes the adapter so far before they are over")] = None,
    mirror: Annotated[Path | None, typer.Option(help="folder on other storage for copies of the checkpoints")] = None,
    restart: Annotated[bool, typer.Option(help="forget an earlier run in the same folder")] = False,
) -> None:
    """Train an adapter on a folder of photos. The same command again continues an interrupted run."""
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
def cache(clear: Annotated[bool, typer.Option(help="delete it")] = False) -> None:
    """Say where encoded photos and class images of earlier runs are kept on this disk, and how much; or delete them."""
    from ..cache import cache_folder, cache_size, clear_cache

    if clear:
        say(f"{cache_folder()}: deleted {clear_cache() / 1e6:.1f} MB")
    else:
        say(f"{cache_folder()}: {cache_size() / 1e6:.1f} MB")
