"""A notebook's session: its hardware, the time it has left, and files in and out."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import LoraBoothError, SettingsError, counted, reason_of, shown

# Services import these before the first cell, so the version in memory is not the newer one that a cell installs.
IMPORTED_EARLY = ("PIL", "numpy", "torch", "huggingface_hub", "transformers", "diffusers", "safetensors")
RESTART = "restart the session (on Colab: Runtime > Restart session; elsewhere: restart the kernel) and run from the top again"
DRIVE = Path("/content/drive")  # where Colab mounts a Google Drive
FOLDER = "booth"  # in the drive
LEAST = 0.001  # minutes; chosen: enough for `train` to save what it has

_began = time.monotonic()  # about when the session began: this module is imported in the first cell


def begin() -> None:
    """Print versions, device and free memory. From here on, a user's mistake is one line without a traceback.

    Raises SettingsError if modules in memory are of other versions than the installed ones.
    """
    LoraBoothError._render_traceback_ = lambda error: [f"{type(error).__name__}: {error}"]  # type: ignore[attr-defined]
    stale = outdated()
    if stale:
        raise SettingsError(f"{', '.join(stale)} was loaded before a newer version was installed; {RESTART}")
    import torch

    from .. import __version__
    from ..base.base_model import default_device
    from ..planning.budget import GB, device_name, free_bytes

    device = default_device()
    print(f"lora_booth {__version__}, torch {torch.__version__}")
    print(f"{device_name(device)}, {free_bytes(device) / GB:.1f} GB free")
    if device.type == "cpu":
        print("No GPU: fine for a trial. For real training, choose one (on Colab: Runtime > Change runtime type > T4 GPU).")


def minutes_left(minutes: float | None) -> float | None:
    """What is left of the session's `minutes`, for `train(time_limit=...)`: services limit the session, not the call.

    When they are over, one more update still fits, after which `train` saves and returns the adapter so far.
    """
    if minutes is None:
        return None
    return max(LEAST, minutes - (time.monotonic() - _began) / 60)


def outdated() -> list[str]:
    """Modules in memory of another version than the installed one, e.g. "torch 2.9.0"."""
    found = []
    for module in IMPORTED_EARLY:
        loaded = getattr(sys.modules.get(module), "__version__", None)
        try:
            installed = importlib.metadata.version("pillow" if module == "PIL" else module)
        except importlib.metadata.PackageNotFoundError:
            continue
        if loaded is not None and loaded != installed:
            found.append(f"{module} {loaded}")
    return found


def storage(keep: str | Path = "auto") -> Path | None:
    """A folder that outlives the session; None if there is none.

    keep  "auto": your Google Drive on Colab, which asks for permission; or a folder; "": none
    """
    if keep != "auto":
        folder = Path(keep) if str(keep) else None
    else:
        folder = DRIVE / "MyDrive" / FOLDER if mounted() else None
    if folder is None:
        print("Files stay in this session only: download what you want to keep.")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Files are saved in {folder}")
    return folder


def mounted() -> bool:
    try:
        from google.colab import drive
    except ImportError:
        return False
    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # permission was denied, or there is no browser to ask in
        print(f"No Google Drive ({reason_of(error)}).")
        return False
    return True


def upload(folder: str | Path) -> None:
    """A button that adds photos to `folder`; without widgets, print how to put them there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.is_file() for path in folder.iterdir())
    print(f"{counted(there, 'file')} in {folder}")
    widgets = ipywidgets()
    if widgets is None:
        print("Put your photos there with the file browser, then run the next cell.")
        return
    from IPython.display import display

    button = widgets.FileUpload(multiple=True, description="Add photos")
    status = widgets.Label("Choose the photos, wait until they are listed here, then run the next cell.")

    def arrived(change: Any) -> None:
        status.value = keep_uploads(folder, change["new"])

    button.observe(arrived, names="value")
    display(widgets.VBox([button, status]))


def keep_uploads(folder: Path, uploads: Any) -> str:
    """Write the files of a FileUpload (a sequence in ipywidgets 8, a dict in 7). Returns a line about what was added."""
    files = uploads.items() if isinstance(uploads, dict) else [(one["name"], one) for one in uploads]
    names = []
    for name, one in files:
        plain = str(name).replace("\\", "/").rpartition("/")[2]  # drop the path: never trust a browser with one
        if plain.strip(". "):
            (folder / plain).write_bytes(bytes(one["content"]))
            names.append(shown(plain))
    return f"{len(names)} added: {', '.join(names)}"


def download(*files: str | Path) -> None:
    """Download files through the browser on Colab; elsewhere show a link to each."""
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
