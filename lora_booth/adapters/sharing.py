"""Sharing an adapter: a thumbnail in its file, a folder for the Hub, and the upload."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from .. import __version__
from ..base.ai_mark import picture_bytes, save_picture
from ..base.weight_files import read_header
from ..config import typed
from ..errors import AdapterError, LoraBoothError, SettingsError, reason_of
from ..files import open_regular, replacing
from ..photos.cropping import crop_and_resize
from ..photos.opening import read_picture
from .contents import AdapterContents, Dtype, Layout, file_stem
from .metadata import THUMBNAIL_KEY
from .model_card import PICTURE, model_card
from .writing import save

# ModelSpec recommends 256 x 256; a busy picture is made coarser, then smaller, until it is short enough
THUMBNAIL_SIDES = (256, 192, 128, 64)  # pixels
THUMBNAIL_QUALITIES = (85, 70, 50)  # JPEG
MAX_THUMBNAIL = 20 * 2**10  # characters: a third of the metadata that `Adapter.load` accepts
README = "README.md"
MARK = "<!-- lora_booth wrote this folder: "  # before its digest, in the last line of README.md


# --- a picture in the header ---------------------------------------------------------------------------------------


def thumbnail_url(image: Image.Image | str | Path) -> str:
    """A data URL of a small JPEG: the pixels of the upright centre square, without anything else that the picture carries."""
    rgb = read_picture(typed("thumbnail", image, Path | Image.Image))
    sizes = ((side, quality) for side in THUMBNAIL_SIDES for quality in THUMBNAIL_QUALITIES)
    return next(url for side, quality in sizes if len(url := small_jpeg(rgb, side, quality)) <= MAX_THUMBNAIL)


def small_jpeg(rgb: Image.Image, side: int, quality: int) -> str:
    side = min(side, *rgb.size)
    square = crop_and_resize(rgb, (side, side))
    content = picture_bytes(square, "JPEG", generated=False, quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content).decode("ascii")


def thumbnail_of(path: Path) -> Image.Image | None:
    """The picture in an adapter file's header; None if it has none, or none that can be decoded."""
    try:
        with open_regular(path) as file:
            url = read_header(file, os.fstat(file.fileno()).st_size, path).metadata.get(THUMBNAIL_KEY, "")
        return read_picture(base64.b64decode(url.partition(",")[2], validate=True)) if url.startswith("data:image/") else None
    except (LoraBoothError, OSError, ValueError):
        return None


# --- a folder ------------------------------------------------------------------------------------------------------


def save_folder(adapter: AdapterContents, folder: Path, pictures: Sequence[Any], *, layout: Layout, dtype: Dtype) -> Path:
    """See `Adapter.save_folder`."""
    check_free(folder)
    place = Path(os.path.abspath(folder))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as temporary:
            temporary.mkdir()
            fill(adapter, temporary, pictures, layout=layout, dtype=dtype)
            write_page(adapter, temporary, pictures, layout=layout, source=".")
    except OSError as error:
        raise AdapterError(f"cannot be written: {error.strerror}; nothing was changed", folder) from error
    return folder


def fill(adapter: AdapterContents, folder: Path, pictures: Sequence[Any], *, layout: Layout, dtype: Dtype) -> None:
    """Everything but the page."""
    save(adapter, folder / file_name(adapter), layout=layout, dtype=dtype)
    for number, picture in enumerate(pictures, 1):
        if not hasattr(picture, "prompt"):
            raise SettingsError(f"a {type(picture).__name__} has no prompt and seed; share pictures of Composition.generate")
        save_picture(read_picture(picture.image), folder / PICTURE.format(number))


def write_page(adapter: AdapterContents, folder: Path, pictures: Sequence[Any], *, layout: Layout, source: str) -> None:
    page = model_card(adapter, file_name(adapter), layout, pictures, source) + "\n"
    (folder / README).write_text(page + mark(folder, page), encoding="utf-8", newline="\n")


def file_name(adapter: AdapterContents) -> str:
    return f"{file_stem(adapter.name)}.safetensors"


def check_free(folder: Path) -> None:
    """Raise AdapterError if a folder would be lost: any that is not exactly as an earlier call left it."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise AdapterError("is not a folder; pass another name", folder)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise AdapterError("is the current folder, or contains it; pass the name of a new one", folder)
    if any(folder.iterdir()) and not is_ours(folder):
        raise AdapterError("holds files that lora_booth did not write, or that were changed since; pass another name", folder)


def is_ours(folder: Path) -> bool:
    try:
        text = (folder / README).read_text(encoding="utf-8")
        page, marked, _ = text.rpartition(MARK)
        return bool(marked) and text == page + mark(folder, page)
    except (OSError, ValueError):
        return False


def mark(folder: Path, page: str) -> str:
    """The last line of README.md, by which a later call knows that the folder is unchanged."""
    digest = hashlib.sha256(page.encode("utf-8"))
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise OSError("a link, which save_folder never makes")
        if path != folder / README and not path.is_dir():
            digest.update(f"\0{path.relative_to(folder).as_posix()}\0".encode("utf-8", "surrogateescape"))
            with open_regular(path) as file:
                digest.update(hashlib.sha256(file.read()).digest())
    return f"{MARK}{digest.hexdigest()} -->\n"


# --- the Hub -------------------------------------------------------------------------------------------------------

REMEDIES = {  # HTTP status -> what it means here, and what helps
    401: "the Hub does not accept this login; log in with `hf auth login` or set HF_TOKEN",
    403: "this token may not write there; create another at https://huggingface.co/settings/tokens, or choose another name",
    404: "no such user or organisation, or this token may not see it; check the name",
    413: "larger than the Hub accepts",
    429: "the Hub is receiving too many requests; try again later",
}


def push_to_hub(
    adapter: AdapterContents,
    repo_id: str,
    pictures: Sequence[Any],
    *,
    private: bool,
    token: str | None,
    layout: Layout,
    dtype: Dtype,
) -> str:
    """See `Adapter.push_to_hub`."""
    from huggingface_hub import HfApi, get_token

    if token is None and get_token() is None:
        raise AdapterError("not logged in to the Hub; log in with `hf auth login` or set HF_TOKEN", repo_id)
    api = HfApi(token=token, library_name="lora_booth", library_version=__version__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # what can fail here fails before anything is made on the Hub
        fill(adapter, folder, pictures, layout=layout, dtype=dtype)
        with hub_errors(repo_id):
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
        write_page(adapter, folder, pictures, layout=layout, source=repo.repo_id)
        with hub_errors(repo_id):
            api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=f"{file_name(adapter)} by lora_booth")
    return str(repo)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub, its client or the network raise into an AdapterError with a remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise AdapterError("the Hub is switched off here (HF_HUB_OFFLINE); unset that and try again", repo_id) from error
    except HFValidationError as error:
        raise AdapterError(f"not the name of a repository ({reason_of(error)}); write it as user/name", repo_id) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = REMEDIES.get(status, f"the Hub answered {status}: {reason_of(error)}")
        raise AdapterError(reason, repo_id) from error
    except ValueError as error:  # of the page's front matter
        raise AdapterError(f"the Hub does not accept it: {' '.join(str(error).split())[:300]}", repo_id) from error
    except Exception as error:
        # the network's errors come from another library with each version of the client (requests, httpx, httpx2)
        if not isinstance(error, OSError) and "http" not in type(error).__module__:
            raise
        raise AdapterError(f"the Hub cannot be reached ({reason_of(error)}); check the connection", repo_id) from error
