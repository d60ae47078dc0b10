"""What the cells of docs/notebooks/dreambooth.ipynb show: upload, live progress, curves, playground; also without widgets."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraBoothError, SettingsError, first_line, shown

if TYPE_CHECKING:
    from PIL import Image

    from ..base.base_model import BaseModel
    from ..pictures.composition import Weighted
    from ..pictures.grids import Grid
    from ..pictures.picture import Picture
    from ..training.progress import Step

# what notebook services import before the first cell, so that an installation changes it too late
IMPORTED_EARLY = {
    "PIL": "pillow",
    "numpy": "numpy",
    "torch": "torch",
    "huggingface_hub": "huggingface_hub",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "safetensors": "safetensors",
}
RESTART = "restart the session (on Colab: Runtime > Restart session; elsewhere: restart the kernel) and run from the top again"
DRIVE = Path("/content/drive")  # where Colab shows a Google Drive
FOLDER = "booth"  # in it
MOST_COLUMNS = 8  # of a strip of samples
SIDE = 256  # pixels of a picture on a sheet, at most
CHART = (  # how a curve looks outside of the report's page
    ".lb{background:#fff}.lb path{fill:none}.lb text{font:12px sans-serif;fill:#3a3f4b}.lb .grid{stroke:#e6e8ee}"
    ".lb .raw{stroke:#c3c9d6}.lb .mean{stroke:#3b5bdb;stroke-width:1.5}.lb .mark{stroke:#e8590c;stroke-dasharray:3 3}"
)


_began = time.monotonic()  # the session, as far as it is known here
LEAST = 0.001  # minutes: enough for train to save what it has

# --- the session -----------------------------------------------------------------------------------------------------


def begin() -> None:
    """Say what there is to work with. From here a mistake is told in one line, without a traceback.

    Raises SettingsError if the session still has older versions in memory than those that are installed.
    """
    LoraBoothError._render_traceback_ = lambda error: [f"{type(error).__name__}: {error}"]  # type: ignore[attr-defined]
    stale = outdated()
    if stale:
        raise SettingsError(f"{', '.join(stale)} was loaded before it was renewed; {RESTART}")
    import torch

    from .. import __version__
    from ..base.base_model import default_device
    from ..planning.devices import GB, device_name, free_bytes

    device = default_device()
    print(f"lora_booth {__version__}, torch {torch.__version__}")
    print(f"{device_name(device)}, {free_bytes(device) / GB:.1f} GB free")
    if device.type == "cpu":
        print("No GPU: enough for a trial. For the real thing choose one (on Colab: Runtime > Change runtime type > T4 GPU).")


def minutes_left(minutes: float | None) -> float | None:
    """Of the `minutes` that the session may take, what is left for the next `train(time_limit=...)`: services count the
    session, not the call. When they are over, enough for one more update, which saves and gives back the adapter so far.
    """
    if minutes is None:
        return None
    return max(LEAST, minutes - (time.monotonic() - _began) / 60)


def outdated() -> list[str]:
    """Modules in memory that are of another version than the installed one."""
    found = []
    for module, package in IMPORTED_EARLY.items():
        loaded = getattr(sys.modules.get(module), "__version__", None)
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if loaded is not None and loaded != installed:
            found.append(f"{module} {loaded}")
    return found


def storage(keep: str | Path = "auto") -> Path | None:
    """A folder that outlives the session; None: there is none.

    keep  "auto": the user's Google Drive on Colab, which asks first; a folder; "": none
    """
    if keep != "auto":
        folder = Path(keep) if str(keep) else None
    else:
        folder = DRIVE / "MyDrive" / FOLDER if mounted() else None
    if folder is None:
        print("Only in this session's files: download what you want to keep.")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Kept in {folder}")
    return folder


def mounted() -> bool:
    try:
        from google.colab import drive
    except ImportError:
        return False
    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # the user said no, or the service has no browser to ask
        print(f"No Google Drive ({first_line(error)}).")
        return False
    return True


def upload(folder: str | Path) -> None:
    """A button that puts photos into `folder`; without widgets, the words how to get them there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.is_file() for path in folder.iterdir())
    print(f"{there} file(s) in {folder}")
    widgets = ipywidgets()
    if widgets is None:
        print("Put your photos there with the file browser, then go on.")
        return
    from IPython.display import display

    button = widgets.FileUpload(multiple=True, description="Add photos")
    said = widgets.Label("Choose the photos, wait until they are listed here, then run the next cell.")

    def arrived(change: Any) -> None:
        said.value = keep_uploads(folder, change["new"])

    button.observe(arrived, names="value")
    display(widgets.VBox([button, said]))


def keep_uploads(folder: Path, uploads: Any) -> str:
    """Write what a FileUpload holds: (name, content)s of ipywidgets 8, or name -> content of 7. What to say of it."""
    files = uploads.items() if isinstance(uploads, dict) else [(one["name"], one) for one in uploads]
    names = []
    for name, one in files:
        bare = str(name).replace("\\", "/").rpartition("/")[2]  # a browser's word is no path
        if bare.strip(". "):
            (folder / bare).write_bytes(bytes(one["content"]))
            names.append(shown(bare))
    return f"{len(names)} added: {', '.join(names)}"


def download(*files: str | Path) -> None:
    """Hand files to the browser on Colab; elsewhere show where they lie."""
    from IPython.display import FileLink, display

    try:
        from google.colab import files as browser
    except ImportError:
        browser = None
    for path in map(Path, files):
        if browser is not None:
            browser.download(str(path))
            continue
        print(f"{path.name}, {path.stat().st_size / 1e6:.2f} MB:", end=" ")
        display(FileLink(str(path)))


def ipywidgets() -> Any | None:
    try:
        import ipywidgets as found
    except ImportError:
        return None
    return found


# --- before training -------------------------------------------------------------------------------------------------


def compare(*bases: str, photos: int = 5) -> None:
    """What training of each base would take here: a name as `plan` takes it, memory, time, savings."""
    from ..planning.devices import GB
    from ..planning.planning import plan

    for base in bases:
        found = plan(base, photos=photos)
        way = found.chosen
        if way is None:
            print(f"{base}: does not fit: {found.remedy}")
            continue
        steps = found.asked.steps or 0
        settings = f", with {way.words}" if way.settings else ""
        minutes = max(1, round(steps * way.seconds / 60))
        print(
            f"{base}: {way.peak / GB:.1f} GB of {found.machine.budget / GB:.1f}, about {minutes} min for {steps} steps", end=" "
        )
        print(f"at {found.asked.resolution} px{settings}")


def judge(token: str, base: BaseModel) -> None:
    """Whether the token is free to mean something new to this base, and others that are."""
    from ..base.base_model import rare_tokens
    from ..subject.tokens import check_token, propose_tokens

    rare = rare_tokens(base)
    report = check_token(token, base.tokenizer, known_rare=rare)
    print(token, "is free" if report.ok else "is not free")
    for said in (*report.problems, *report.warnings):
        print(" ", said)
    print("others:", *(one for one in propose_tokens(base.tokenizer, known_rare=rare) if one != token))


# --- training --------------------------------------------------------------------------------------------------------


def watch(run: str | Path, *, every: float = 5.0) -> Callable[[Step], None]:
    """For `train(on_step=...)`: the loss and the newest samples, drawn anew every few seconds in the same place."""
    from IPython.display import HTML, display

    from ..report.charts import chart
    from ..training.progress import clock, described

    points: list[tuple[float, float]] = []
    drawn = float("-inf")
    place = display(HTML(""), display_id=True)

    def on_step(step: Step) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn < every and step.index < step.total:
            return  # reading a loss waits for the GPU
        drawn = now
        points.append((float(step.index), step.smoothed_loss))
        found = chart(f"step {step.index} of {step.total}", [("mean", points)], last=step.total, height=160, style=CHART)
        words = f"step {step.index} of {step.total}: {described(step)}, {clock(step.seconds_left)} left"
        place.update(HTML(f"<p>{words}</p>{found or ''}{newest_samples(Path(run))}"))

    return on_step


def newest_samples(run: Path) -> str:
    from PIL import Image

    from ..pictures.gallery import FULL_QUALITY, data_url
    from ..report.reading import samples as samples_in
    from ..training.checkpoint import SAMPLES

    found = samples_in(run / SAMPLES)
    last = max((one.step for one in found), default=0)
    parts = []
    for one in found:
        if one.step == last:
            with Image.open(one.file) as opened:
                picture = opened.convert("RGB")
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            text = escape(f"step {one.step}: {one.prompt}")
            parts.append(f'<img src="{data_url(picture, FULL_QUALITY)}" alt="{text}" title="{text}" width="160">')
    return f"<p>{' '.join(parts)}</p>" if parts else ""


def loss_curve(run: str | Path) -> Any:
    """The loss of a run by step, and its mean, as an SVG."""
    from IPython.display import SVG

    from ..report.reading import read_run
    from ..report.report import loss_chart

    found = loss_chart(read_run(Path(run)), style=CHART)
    if found is None:
        print("No step to show.")
        return None
    return SVG(found)


def samples(run: str | Path, *, side: int = 160) -> Image.Image | None:
    """A run's sample pictures on one sheet: a row for each prompt and seed, a column for each step. side: in pixels"""
    found = samples_of(Path(run))
    if found is None:
        print("No samples here: they stay in the session that drew them, and are drawn with TrainingConfig(sample_every=...).")
        return None
    return found.sheet(side=side)


def samples_of(run: Path) -> Grid | None:
    from PIL import Image

    from ..pictures.grids import Grid
    from ..pictures.picture import Picture
    from ..report.reading import read_run
    from ..report.report import spread

    found = read_run(run).samples
    if not found:
        return None
    at = {(one.prompt, one.seed, one.step): one.file for one in found}
    rows = list(dict.fromkeys((one.prompt, one.seed) for one in found))
    steps = spread(sorted({one.step for one in found}), MOST_COLUMNS)

    def cell(prompt: str, seed: int, step: int) -> Picture | None:
        file = at.get((prompt, seed, step))
        if file is None:
            return None
        with Image.open(file) as opened:
            return Picture(opened.convert("RGB"), prompt, seed)

    return Grid(
        tuple(prompt for prompt, _ in rows),
        tuple(f"step {step}" if step else "before" for step in steps),
        tuple(tuple(cell(*row, step) for step in steps) for row in rows),
    )


# --- pictures --------------------------------------------------------------------------------------------------------


def sheet(pictures: Sequence[Picture], *, columns: int = 4) -> Image.Image:
    """Pictures side by side with their seeds."""
    from ..photos.sheet import contact_sheet

    return contact_sheet([p.image for p in pictures], labels=[f"seed {p.seed}" for p in pictures], columns=columns, side=SIDE)


def playground(
    base: BaseModel, adapters: Sequence[Weighted], prompt: str, *, seed: int = 0, weight: float = 1.0, steps: int = 25
) -> list[Picture]:
    """Fields for prompt, seed, number of pictures and the adapters' weight, and a button that draws. Begins with one picture.

    Returns the list that all drawn pictures go into. Without widgets it is the one picture; call it again for another.
    """
    from dataclasses import replace

    from IPython.display import display

    from ..pictures.composition import Composition
    from ..pictures.grids import several

    everyone, drawn = several(list(adapters)), []

    def draw(prompt: str, seed: int, weight: float, count: int = 1) -> None:
        studio = Composition(base, [(a, replace(w, value=w.value * weight)) for a, w in everyone])
        made = studio.generate(prompt, seeds=range(seed, seed + count), steps=steps)
        drawn.extend(made)
        display(sheet(made))

    draw(prompt, seed, weight)
    widgets = ipywidgets()
    if widgets is None:
        return drawn
    wide = widgets.Layout(width="95%")
    text = widgets.Text(prompt, description="prompt", layout=wide)
    first = widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed")
    count = widgets.IntSlider(1, min=1, max=8, description="pictures")
    strength = widgets.FloatSlider(weight, min=0, max=1.5, step=0.05, description="weight")
    button, shown_in = widgets.Button(description="Draw", button_style="primary"), widgets.Output()

    def clicked(_: Any) -> None:
        button.disabled = True
        try:
            with shown_in:
                shown_in.clear_output(wait=True)
                try:
                    draw(text.value, first.value, strength.value, count.value)
                except LoraBoothError as error:
                    print(error)
        finally:
            button.disabled = False

    button.on_click(clicked)
    display(widgets.VBox([text, widgets.HBox([first, count, strength]), button, shown_in]))
    return drawn


def page(path: str | Path, *, height: int = 640) -> Any:
    """A gallery or report inside the notebook, on services, too, that do not serve files. height: in pixels"""
    from IPython.display import HTML

    inside = escape(Path(path).read_text(encoding="utf-8"))
    style = f"width:100%;height:{height}px;border:1px solid #8884"
    allowed = 'sandbox="allow-scripts allow-downloads" allow="clipboard-write *"'
    return HTML(f'<div><iframe srcdoc="{inside}" style="{style}" {allowed}></iframe></div>')
