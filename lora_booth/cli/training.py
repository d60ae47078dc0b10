"""Commands from photos to an adapter, and what a training takes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..config import LoraSpec, PhotoShape, TrainingConfig
from ..errors import AdapterError, SettingsError, counted
from .app import interruptible, note, say, say_json
from .arguments import check_adapter_file, check_folder, check_place, remember
from .options import Base, Crop, Json, Loading, Names, Photos, Precision, Quantize, Settings, command, is_given, torch_dtype


@command
def demo(
    *,
    out: Path = Path("demo"),  # folder to write to, e.g. demo
) -> None:
    """Try everything on the embedded base, offline: train four subjects, compare before and after, print scores."""
    from .demo import run_demo

    check_folder(out)
    run_demo(Loading().base("toybox"), out, say=say)
    say(f"look at {out}/before_after.png, {out}/together.png and {out}/gallery.html")


@command
def photos(
    folder: Photos,
    *,
    resolution: Annotated[int, typer.Option(min=8, max=4096, help="side in pixels that the base trains at, e.g. 64")] = 512,
    shape: PhotoShape = "square",  # as for `train`: square or buckets
    sheet: Path | None = None,  # write a contact sheet of the crops here, e.g. crops.png
    crop: Crop = "smart",
    auto_masks: bool = False,  # mask photos that have no mask where rembg is sure, as --auto-masks of train does
    make_masks: bool = False,  # first write NAME.mask.png beside photos that have none (needs lora-booth[masks])
    json: Json = False,
) -> None:
    """Show which photos will be used, which will not and why, and what may be wrong with them."""
    from ..base.ai_mark import kind_of, save_picture
    from ..photos.audit import audit_photos
    from ..photos.finding import MANY, find_photos
    from ..photos.segmenting import make_masks as write_masks

    if sheet is not None:
        kind_of(sheet)
        check_place(sheet, "--sheet")
    tell = note if json else say
    if make_masks:
        write_masks(folder, say=lambda line: tell(f"mask     {line}"))
    found = find_photos(folder, crop=crop, masks="auto" if auto_masks else None, minimum=1, maximum=MANY)
    if sheet is not None and any(sheet.exists() and sheet.samefile(photo.path) for photo in found.photos):
        raise SettingsError(f"{sheet}: one of the photos; pass another file")
    audit = audit_photos(found.photos, found.skipped, resolution=resolution, shape=shape)
    if json:
        say_json(audit.as_dict())
    else:
        say(audit)
    if sheet is not None:
        save_picture(audit.sheet(), sheet, generated=False)
        tell(f"wrote {sheet}")


@command
def token(
    *,
    base: Base = "toybox",
    loading: Loading,
    check: str | None = None,  # check this token instead of proposing some, e.g. zwx
    count: Annotated[int, typer.Option(min=1, help="number of tokens to propose, e.g. 8")] = 8,
) -> None:
    """Propose rare tokens for a base, or check one (exit code 1: it cannot be used)."""
    from ..subject.tokens import check_token, propose_tokens
    from ..training.encoding import token_reading

    loaded = loading.base(base)
    read = token_reading(loaded)
    if check is None:
        proposed = propose_tokens(loaded.tokenizer, count, **read)
        say("\n".join(proposed) or "no rare token says anything to its text encoder; --check your own")
        return
    report = check_token(check, loaded.tokenizer, **read)
    say(f"{check}: {counted(len(report.pieces), 'piece')}: {' '.join(report.pieces)}")
    for line in (*report.problems, *report.warnings):
        say(line)
    if not report.ok:
        raise typer.Exit(1)
    say("it can be used; leave out --check to see better ones" if report.warnings else "free to take a new meaning")


@command
def train(
    folder: Photos,
    *,
    token: str,  # rare word that stands for the subject, e.g. ohwx
    class_noun: str,  # what the subject is, e.g. dog
    out: Path,  # adapter file to write, e.g. rex.safetensors
    base: Base = "toybox",
    loading: Loading,
    lora: LoraSpec,
    config: TrainingConfig,
    init: Path | None = None,  # adapter file to begin with, e.g. rex.safetensors [a new adapter]
    auto_masks: bool = False,  # mask photos that have no mask where rembg is sure of the subject (needs lora-booth[masks])
    caption_model: str | None = None,  # captions photos without one, e.g. Salesforce/blip-image-captioning-base
    template: list[str] | None = None,  # prompts of the photos, in turn, e.g. 'a photo of a {token} {class_noun}'; repeatable
    class_folder: Path | None = None,  # your own pictures of the plain class, instead of drawn ones, e.g. photos/dogs
    run: Path | None = None,  # folder for checkpoints and the report, e.g. runs/rex [OUT without its ending]
    track: list[str] | None = None,  # log to tensorboard (files in --run) or wandb (uploads samples too); repeatable
    layout: Names = "kohya",
    crop: Crop = "smart",
    min_photos: int = 3,  # fewest photos to accept, e.g. 1
    max_photos: int = 100,  # most photos to accept, e.g. 200
    time_limit: float | None = None,  # minutes, e.g. 25, after which the adapter so far is saved
    mirror: str | None = None,  # folder for copies of the checkpoints, or its URL, e.g. /mnt/drive/rex or s3://bucket/rex
    restart: bool = False,  # discard an earlier run in the same folder
    settings: Settings = None,
    context: typer.Context,
) -> None:
    """Train an adapter on a folder of photos. Run the same command again to continue an interrupted run."""
    from ..photos.captioning import caption_model as photo_captioner
    from ..runs.one import train as train_adapter
    from ..subject.subject import INSTANCE_TEMPLATE, Subject
    from ..training.checkpoint import ADAPTER
    from ..training.distributed import is_main, own_gpu
    from ..training.lock import locked_file

    check_adapter_file(out)
    subject = Subject.from_folder(
        folder,
        token=token,
        class_noun=class_noun,
        minimum=min_photos,
        maximum=max_photos,
        templates=template or (INSTANCE_TEMPLATE,),
        crop=crop,
        masks="auto" if auto_masks else None,
        captioner=None if caption_model is None else photo_captioner(caption_model),
        class_images=class_folder,
    )
    for skipped in subject.skipped:
        note(f"not used: {skipped.name}: {skipped.reason}")
    if run is None:  # beside the adapter's file, but never the folder of the photos
        run = out.with_suffix("")
        run = run if run.resolve() != folder.resolve() else out.with_name(f"{out.stem}-run")
    own_gpu()
    loaded = loading.base(base)
    if base == "toybox":
        note("the toybox is a tiny model for trials: 64 x 64 pixels, drawn scenes; for real photos pass --base, e.g. a Hub id")
    remember(loaded, base)
    with locked_file(out) if is_main() else nullcontext():
        with interruptible():
            adapter = train_adapter(
                loaded,
                subject,
                lora=lora if init is None or is_given(context, LoraSpec) else None,  # None: as that adapter has it
                config=config,
                init=init,
                out=run,
                mirror=mirror,
                time_limit=time_limit,
                restart=restart,
                track=track or (),
            )
        if not is_main():
            return
        try:
            file = adapter.save(out, layout=layout)
        except AdapterError as error:
            raise AdapterError(f"{error}; the finished adapter is {run / ADAPTER}") from error
    say(f"wrote {file} ({file.stat().st_size / 1e6:.2f} MB); prompt: {adapter.card.prompt}")


@command
def cache(
    *,
    clear: bool = False,  # delete the cache
) -> None:
    """Print where encoded photos and class images of earlier runs are cached, and their size; or delete them."""
    from ..cache import NOWHERE, cache_folder, cache_size, clear_cache

    if cache_folder() == NOWHERE:
        say("nothing is cached: you have no home folder; set LORA_BOOTH_CACHE to a folder, e.g. /tmp/lora_booth")
    elif clear:
        say(f"{cache_folder()}: deleted {clear_cache() / 1e6:.1f} MB")
    else:
        say(f"{cache_folder()}: {cache_size() / 1e6:.1f} MB")


@command
def plan(
    *,
    base: str = "toybox",  # base model, as for `train`; or sd1, sd2 or sdxl, for their published shapes
    vram: float | None = None,  # memory budget in GB, e.g. 12 [what is free, or all of --gpu]
    gpu: str | None = None,  # plan for a T4, L4, 3090, 4090, A100, H100 or H200 [without a GPU, --vram plans for a T4]
    dtype: Precision = None,
    photos: Annotated[int, typer.Option(min=1, help="number of photos, e.g. 8")] = 5,
    quantize: Quantize = None,
    lora: LoraSpec,
    config: TrainingConfig,
    measure: bool = False,  # load --base and time a few training steps on this machine
    json: bool = False,  # print everything as JSON, in bytes and seconds
) -> None:
    """Predict the memory of a training and choose the fastest settings that fit (exit code 2 when nothing does)."""
    from ..base.families import FAMILIES
    from ..planning.planning import plan as make_plan

    if measure and (vram or gpu or dtype or base in FAMILIES):
        raise SettingsError("--measure times a base on this machine: pass one as --base, without --vram, --gpu and --dtype")
    found = make_plan(
        Loading(quantize=quantize).base(base) if measure else base,
        lora=lora,
        config=config,
        vram_gb=vram,
        gpu=gpu,
        dtype=torch_dtype(dtype),
        photos=photos,
        quantize=None if measure else quantize,
        measure=measure,
    )
    if json:
        say_json(found.to_json())
    else:
        say(found)
    _ = found.config  # raises DoesNotFit
