"""The command line: every command is one call into the API. Exit code 2 and one plain line for a user's mistake."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from .errors import LoraBoothError, SettingsError

if TYPE_CHECKING:
    from .base_model import BaseModel

app = typer.Typer(
    help="DreamBooth with LoRA: teach Stable Diffusion one subject from a few photos.",
    rich_markup_mode=None,  # plain text: the brackets in a help line are its defaults, not markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Base = Annotated[str, typer.Option(help="'toybox', a Hub id, a diffusers folder or a .safetensors checkpoint")]
Photos = Annotated[Path, typer.Argument(help="folder of photos")]


def say(text: str) -> None:
    print(text, flush=True)


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
    sheet: Annotated[Path | None, typer.Option(help="where to write a contact sheet of the crops (.png, .jpg, .webp)")] = None,
) -> None:
    """Show which photos will be used, which not and why."""
    from .photos import contact_sheet, crop_and_resize, find_photos, note_enlarged, open_photo

    if sheet is not None and sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise SettingsError(f"{sheet}: contact sheets are saved as .png, .jpg or .webp")
    found = find_photos(folder, minimum=1, maximum=10_000)
    for photo in (note_enlarged(p, resolution) for p in found.photos):
        say(f"used     {photo.name}  {photo.width} x {photo.height}" + (f"  ({photo.note})" if photo.note else ""))
    for skipped in found.skipped:
        say(f"skipped  {skipped.name}  {skipped.reason}")
    say(f"{len(found.photos)} used, {len(found.skipped)} skipped")
    if sheet is not None and found.photos:
        crops = [crop_and_resize(open_photo(p), resolution, p.crop)[0] for p in found.photos]
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(crops, labels=[p.name for p in found.photos]).save(sheet)
        say(f"wrote {sheet}")


@app.command()
def token(
    base: Base = "toybox",
    check: Annotated[str | None, typer.Option(help="judge this token instead of proposing some")] = None,
    count: Annotated[int, typer.Option(min=1, help="how many to propose")] = 8,
) -> None:
    """Propose rare tokens of a base, or judge one (exit code 1: it cannot be used)."""
    from .base_model import rare_tokens
    from .subject import check_token, propose_tokens

    loaded = load_base(base)
    if check is None:
        say("\n".join(propose_tokens(loaded.tokenizer, count, known_rare=rare_tokens(loaded))))
        return
    report = check_token(check, loaded.tokenizer, known_rare=rare_tokens(loaded))
    say(f"{check}: {len(report.pieces)} piece(s): {' '.join(report.pieces)}")
    for line in (*report.problems, *report.warnings):
        say(line)
    if not report.ok:
        raise typer.Exit(1)
    say("free to mean something new")


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
    attention: Annotated[str, typer.Option(help="sdpa or xformers")] = "sdpa",
    sample_every: Annotated[int | None, typer.Option(help="updates between two sample pictures [none]")] = None,
    layout: Annotated[str, typer.Option(help="kohya (diffusers, ComfyUI, A1111) or peft")] = "kohya",
    min_photos: Annotated[int, typer.Option(help="go on with as few as this")] = 3,
    max_photos: Annotated[int, typer.Option(help="go on with as many as this")] = 100,
    seed: Annotated[int, typer.Option(help="of every random draw: the same seed gives the same adapter")] = 0,
) -> None:
    """Train an adapter on a folder of photos. The same command again continues an interrupted run."""
    from .config import LoraSpec, TrainingConfig
    from .subject import Subject
    from .training import train as train_adapter

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
        attention=attention,  # type: ignore[arg-type]  # checked by TrainingConfig
        sample_every=sample_every,
        seed=seed,
    )
    lora = LoraSpec(rank=rank, alpha=alpha, text_encoder=text_encoder)
    subject = Subject.from_folder(folder, token=token, class_noun=class_noun, minimum=min_photos, maximum=max_photos)
    for skipped in subject.skipped:
        print(f"not used: {skipped.name}: {skipped.reason}", file=sys.stderr)
    loaded = load_base(base)
    adapter = train_adapter(loaded, subject, lora=lora, config=config, out=run or out.with_suffix(""))
    file = adapter.save(out, layout=layout)  # type: ignore[arg-type]
    say(f"wrote {file} ({file.stat().st_size / 1e6:.2f} MB); prompt: {adapter.card.prompt}")


@app.command()
def generate(
    adapters: Annotated[list[str], typer.Argument(help="adapter files, each with an optional :WEIGHT")],
    prompt: Annotated[str, typer.Option(help="what to draw; the adapter's token belongs in it")],
    base: Base = "toybox",
    seeds: Annotated[str, typer.Option(help="as 0-3 or 1,5,8; one picture each")] = "0-3",
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("pictures"),
    negative_prompt: Annotated[str | None, typer.Option(help="what the pictures shall not show")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale")] = 5.0,
    size: Annotated[int | None, typer.Option(help="side in pixels [the base's own]")] = None,
    batch_size: Annotated[int, typer.Option(help="pictures at a time")] = 1,
) -> None:
    """Draw pictures with one or several adapters, and a gallery page of them."""
    from .adapters import Adapter
    from .composition import Composition
    from .gallery import Gallery

    wanted = parse_seeds(seeds)
    files = [file_and_weight(text) for text in adapters]
    loaded = [(Adapter.load(path), weight) for path, weight in files]
    chosen = [(adapter, adapter.card.weight if weight is None else weight) for adapter, weight in loaded]
    pictures = Composition(load_base(base), chosen).generate(
        prompt,
        seeds=wanted,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        size=size,
        batch_size=batch_size,
        on_image=lambda done: print(f"picture {done}/{len(wanted)}", file=sys.stderr, flush=True),
    )
    for picture in pictures:
        say(str(picture.save(out / f"{picture.seed:06d}.png")))
    say(str(Gallery(pictures, title=prompt).save(out / "gallery.html")))


@app.command()
def show(adapter: Annotated[Path, typer.Argument(help="adapter file")]) -> None:
    """Print an adapter's card, ranks and size."""
    from dataclasses import asdict

    from .adapters import Adapter
    from .photos import shown

    loaded = Adapter.load(adapter)
    for key, value in asdict(loaded.card).items():
        if value is not None:
            say(f"{key:16} {shown(value)}")
    ranks = sorted({f.rank for f in loaded.modules.values()})
    say(f"{'modules':16} {len(loaded.modules)}, rank {', '.join(map(str, ranks))}")
    say(f"{'tensors':16} {loaded.nbytes / 1e6:.2f} MB, sha256 {loaded.digest()[:16]}")


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="adapter file to read")],
    out: Annotated[Path, typer.Argument(help="adapter file to write")],
    layout: Annotated[str, typer.Option(help="kohya (diffusers, ComfyUI, A1111) or peft")] = "kohya",
) -> None:
    """Rewrite an adapter in another naming."""
    from .adapters import Adapter

    check_layout(layout)
    say(f"wrote {Adapter.load(adapter).save(out, layout=layout)}")  # type: ignore[arg-type]


def load_base(source: str) -> BaseModel:
    """Without the bars that diffusers and transformers show while loading; those of a download stay."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    from .base_model import BaseModel

    no_bars = are_progress_bars_disabled()
    quiet_diffusers()
    quiet_transformers()  # also turns off the Hub's
    if not no_bars:
        enable_progress_bars()
    return BaseModel.load(source)


def check_layout(layout: str) -> None:
    if layout not in ("kohya", "peft"):
        raise SettingsError(f"layout {layout!r} is unknown; allowed: kohya, peft")


def check_adapter_file(out: Path) -> None:
    """Before the training, not after it."""
    if out.suffix.lower() != ".safetensors":
        raise SettingsError(f"{out}: adapters are written as .safetensors; give --out {out.name}.safetensors")
    if out.is_dir():
        raise SettingsError(f"{out}: is a folder; give --out the name of a file")


def file_and_weight(text: str) -> tuple[Path, float | None]:
    """ "ink.safetensors:0.6" -> path and weight; without a weight None, for the one that the adapter's card suggests."""
    path, colon, weight = text.rpartition(":")
    drive = len(path) == 1 and weight[:1] in ("\\", "/")  # C:\ink.safetensors
    if not colon or drive or Path(text).exists():
        return Path(text), None
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise SettingsError(f"{text}: {weight!r} is no weight; write FILE:0.6")
    return Path(path), number


MOST_SEEDS = 10_000


def parse_seeds(text: str) -> list[int]:
    """ "0-3" or "1,5,8" -> seeds, each once."""
    seeds: dict[int, None] = {}
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last) + 1) if dash else range(int(first), int(first) + 1)
            if not 0 < len(span) <= MOST_SEEDS or len(seeds) + len(span) > MOST_SEEDS:
                raise SettingsError(f"seeds {text!r} are {len(span)} pictures; allowed: 1 to {MOST_SEEDS}, as 0-3")
            seeds.update(dict.fromkeys(span))
    except (ValueError, OverflowError):
        raise SettingsError(f"seeds {text!r}; write them as 0-3 or 1,5,8") from None
    return list(seeds)


INTERRUPTED = 130  # the shell's exit code for it


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point. Leaves with 0, 1 (a token that cannot be used), 2 (a user's mistake) or 130 (interrupted)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(args=words or ["--help"], prog_name="lora-booth", standalone_mode=False)
    except LoraBoothError as error:
        fail(str(error))
    except OSError as error:  # a file that cannot be written, a full disk
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # what every usage error has, in typer's and in click's own classes
            raise
        command = next((word for word in words if word in commands()), "")
        fail(f"{error.format_message().rstrip('.')}; see: lora-booth {command} --help".replace("  ", " "))
    if code == INTERRUPTED:
        print("interrupted; the same command again continues a training", file=sys.stderr)
    sys.exit(code or 0)


def commands() -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def fail(message: str) -> NoReturn:
    """One line, whatever the message holds."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
