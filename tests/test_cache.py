"""The cache on disk: a run with it computes the same bits as one without, and nothing that happens to it stops a run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline, tokenizer

from lora_booth import cache
from lora_booth.base.base_model import BaseModel
from lora_booth.cache import (
    cache_folder,
    cache_size,
    checksum,
    clear_cache,
    key_of,
    place_of,
    prune_cache,
    read_entry,
    write_entry,
)
from lora_booth.cli.arguments import KIND
from lora_booth.config import LoraSpec, TrainingConfig, typed
from lora_booth.errors import BaseModelError, SettingsError
from lora_booth.injection.trainable import trainable
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training import class_images as of_class
from lora_booth.training.class_images import class_images, image_key
from lora_booth.training.encoding import (
    dependencies,
    digest_on_disk,
    encode_prompts,
    prepare,
    text_dependencies,
)
from lora_booth.training.latents import LatentCache

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=2, class_images=2, warmup_steps=0, flip=True)
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORA_BOOTH_CACHE", str(folder))
    monkeypatch.setattr(of_class, "CLASS_IMAGE_STEPS", 2)
    yield folder


def load(source: Path, dtype: torch.dtype = torch.float32) -> BaseModel:
    return BaseModel.load(source, dtype=dtype, device="cpu")


def same(a: LatentCache, b: LatentCache) -> bool:
    pairs = [
        (x, y)
        for one, other in zip(a.buckets, b.buckets, strict=True)
        for p, q in ((one.photos, other.photos), (one.class_images, other.class_images))
        for x, y in zip(sets(p), sets(q), strict=True)
    ]
    pairs += [(a.text[k].states, b.text[k].states) for k in a.text]
    return a.text.keys() == b.text.keys() and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def sets(items: Any) -> list[torch.Tensor]:
    return [] if items is None else [t for t in (items.mean, items.std, items.time_ids) if t is not None]


def computed(base: BaseModel) -> list[str]:
    """Filled with a name at every call of the VAE's encoder or of a text encoder."""
    calls: list[str] = []
    for name in ("vae", "text_encoder", "text_encoder_2"):
        module = getattr(base.shell, name, None)
        if module is not None:
            part = module.encoder if name == "vae" else module
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("sd1", torch.bfloat16), ("sdxl", torch.float32)])
def test_a_run_from_the_cache_is_the_run_without_it(
    kind: str, dtype: torch.dtype, rex: Subject, folders: dict[str, Path], own_cache: Path
) -> None:
    base = load(folders[kind], dtype)
    calls = computed(base)
    first = prepare(base, [rex], lora=LORA, config=CONFIG)
    assert calls.count("vae") == 2 * (3 + 2) and "text_encoder" in calls

    again = load(folders[kind], dtype)
    calls = computed(again)
    second = prepare(again, [rex], lora=LORA, config=CONFIG)
    assert not calls and same(first, second)
    assert {name for name in again.weights if again.unread(name) is None} == set()

    own_cache.rename(own_cache.with_name("put away"))
    assert same(prepare(load(folders[kind], dtype), [rex], lora=LORA, config=CONFIG), first)


@pytest.mark.slow
def test_a_pipeline_of_the_user_shares_the_entries_of_a_base_on_disk(rex: Subject, folders: dict[str, Path]) -> None:
    first = prepare(load(folders["sd1"]), [rex], lora=LORA, config=CONFIG)
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    calls = computed(base)
    assert same(prepare(base, [rex], lora=LORA, config=CONFIG), first)
    assert "vae" not in calls


@pytest.mark.slow
def test_training_with_and_without(rex: Subject, folders: dict[str, Path], own_cache: Path) -> None:
    digests = {train(load(folders["sd1"]), rex, lora=LORA, config=CONFIG, progress=False).digest() for _ in range(2)}
    shutil.rmtree(own_cache)
    own_cache.write_text("a file where the folder should be")
    digests.add(train(load(folders["sd1"]), rex, lora=LORA, config=CONFIG, progress=False).digest())
    assert len(digests) == 1


@pytest.mark.slow
def test_every_picture_has_its_own_entry(rex: Subject, folders: dict[str, Path]) -> None:
    """One photo more is one picture more to encode, and its company changes nothing."""
    few = Subject(rex.photos[:2], "sks", "dog")
    config = TrainingConfig(steps=2, prior_loss_weight=0.0)
    prepare(load(folders["sd1"]), [few], lora=LORA, config=config)
    base = load(folders["sd1"])
    calls = computed(base)
    part = prepare(base, [rex], lora=LORA, config=config)
    assert calls == ["vae"]
    clear_cache()
    assert same(prepare(load(folders["sd1"]), [rex], lora=LORA, config=config), part)


def test_an_interrupted_preparation_goes_on_where_it_was(rex: Subject, folders: dict[str, Path]) -> None:
    base = load(folders["sd1"])
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = base.shell.vae.encoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(base, [rex], lora=LORA, config=CONFIG)
    hook.remove()
    rest = computed(base)
    prepare(base, [rex], lora=LORA, config=CONFIG)
    assert rest.count("vae") == 2 * (3 + 2) - 2


# --- what an entry depends on ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_weights_settings_or_precision_are_other_entries(folders: dict[str, Path]) -> None:
    def keys(change: Any = lambda base: None, kind: str = "sd1", dtype: torch.dtype = torch.float32) -> tuple[str, str]:
        base = load(folders[kind], dtype)
        change(base)
        return key_of(facts=dependencies(base, "vae")), key_of(facts=text_dependencies(base))

    plain = keys()
    assert keys() == plain

    @torch.no_grad()
    def nudge(module: Any) -> None:
        last = list(module.parameters())[-1]
        last.view(-1)[-1] += 1e-3

    vaes = {plain[0], keys(lambda base: nudge(base.vae))[0], keys(lambda base: base.vae.enable_tiling())[0]}
    vaes |= {keys(dtype=torch.bfloat16)[0], keys(lambda base: base.vae.enable_slicing())[0]}
    assert len(vaes) == 5
    texts = {plain[1], keys(lambda base: nudge(base.text_encoders["text_encoder"]))[1], keys(dtype=torch.bfloat16)[1]}
    assert len(texts | {keys(kind="sdxl")[1]}) == 4


def test_other_words_are_other_entries(folders: dict[str, Path]) -> None:
    base = load(folders["sd1"])
    before = encode_prompts(base, ["a dog"])["a dog"].states
    assert not torch.equal(encode_prompts(base, ["a cat"])["a cat"].states, before)
    base.shell.tokenizer = tokenizer("!")  # the same prompt, other tokens
    assert not torch.equal(encode_prompts(base, ["a dog"])["a dog"].states, before)


def test_adapters_in_a_module_switch_its_cache_off(folders: dict[str, Path], own_cache: Path) -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    with trainable(base, LoraSpec(rank=2, text_encoder=True)):
        assert text_dependencies(base) is None and dependencies(base, "vae") is not None
        encode_prompts(base, ["a dog"])
    assert not (own_cache / "text").exists()
    assert text_dependencies(base) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_disk_have_the_digest_that_they_have_in_memory(dtype: torch.dtype, folders: dict[str, Path]) -> None:
    base = load(folders["sd1"], dtype)
    unread = base.unread("vae")
    assert unread is not None
    assert digest_on_disk(unread) == digest_on_disk(unread) == checksum(sorted(base.vae.state_dict().items()))


@pytest.mark.slow
def test_a_vae_that_is_written_over_is_another_one(rex: Subject, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(folders["sd1"], folder)
    config = TrainingConfig(steps=2, prior_loss_weight=0.0)
    first = prepare(load(folder), [rex], lora=LORA, config=config)
    other = make_pipeline("sd1").vae
    with torch.no_grad():
        other.quant_conv.weight.mul_(1.5)
    other.save_pretrained(folder / "vae")
    second = prepare(load(folder), [rex], lora=LORA, config=config)
    assert not torch.equal(first.buckets[0].photos.mean, second.buckets[0].photos.mean)


# --- entries --------------------------------------------------------------------------------------------------------


def test_written_and_read() -> None:
    key = key_of(of="test")
    assert read_entry("latents", key) is None
    assert write_entry("latents", key, TENSORS)
    found = read_entry("latents", key)
    assert found is not None and found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    assert key_of(a=1, b=2) == key_of(b=2, a=1) != key_of(a=1, b=3)


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "header", "another entry", "folder"])
def test_a_damaged_entry_is_computed_again(damage: str) -> None:
    key, other = key_of(of="one"), key_of(of="two")
    write_entry("latents", key, TENSORS)
    write_entry("latents", other, {"a": torch.zeros(2)})
    path = place_of("latents", key)
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-3] ^= 4
    elif damage == "header":
        content[20] ^= 1
    path.write_bytes({"empty": b"", "cut": bytes(content[:-4])}.get(damage, bytes(content)))
    if damage == "another entry":
        shutil.copy(place_of("latents", other), path)
    if damage == "folder":
        path.unlink()
        path.mkdir()
    assert read_entry("latents", key) is None
    assert write_entry("latents", key, TENSORS) == (damage != "folder")
    assert (read_entry("latents", key) is not None) == (damage != "folder")
    assert not list(cache_folder().rglob("*.tmp"))


def test_a_write_that_is_cut_off_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_entry("latents", key_of(of="one"), TENSORS)
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


def test_a_full_disk_stops_nobody() -> None:
    """No file may grow beyond what the system allows, as on a full disk."""
    resource = pytest.importorskip("resource")
    key, before = key_of(of="one"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert not write_entry("latents", key, TENSORS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_entry("latents", key) is None
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_stops_nobody(own_cache: Path, folders: dict[str, Path]) -> None:
    own_cache.write_text("no folder")
    assert not write_entry("latents", key_of(of="one"), TENSORS)
    assert read_entry("latents", key_of(of="one")) is None
    assert cache_size() == prune_cache(0) == clear_cache() == 0
    [[drawn]] = class_images(load(folders["sd1"]), [("dog", (64, 64), 1)])
    assert drawn.image.size == (64, 64)


def write_many(folder: str, number: int) -> int:
    os.environ["LORA_BOOTH_CACHE"] = folder
    torch.set_num_threads(1)
    bad = 0
    for i in range(40):
        key = key_of(of="shared", i=i % 5)
        write_entry("latents", key, {"a": torch.full((1000,), float(i % 5))})
        found = read_entry("latents", key)
        bad += found is not None and not torch.equal(found["a"], torch.full((1000,), float(i % 5)))
        if i % 10 == number:
            prune_cache(0, unused_for=-1)
    return bad


def test_processes_at_the_same_time(own_cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.starmap(write_many, [(str(own_cache), i) for i in range(3)]) == [0, 0, 0]
    assert not list(own_cache.rglob("*.tmp"))


@pytest.mark.slow
def test_nobody_else_can_look_into_it(rex: Subject, folders: dict[str, Path], own_cache: Path) -> None:
    (own_cache / "latents").mkdir(parents=True)
    (own_cache / "latents").chmod(0o755)  # a folder of yours keeps its mode
    prepare(load(folders["sd1"]), [rex], lora=LORA, config=CONFIG)
    assert stat.S_IMODE((own_cache / "latents").stat().st_mode) == 0o755
    entries = list(own_cache.rglob("*.safetensors"))
    assert {path.relative_to(own_cache).parts[0] for path in entries} == {"latents", "text", "digests", "class_images"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in entries} == {0o600}
    told = b"".join(path.read_bytes() + bytes(path) for path in own_cache.rglob("*.safetensors"))
    for private in ("photos", "rex", "sks", "dog", ".jpg"):
        assert private.encode() not in told.replace(bytes(own_cache), b"")


# --- its size -------------------------------------------------------------------------------------------------------


def test_what_was_used_long_ago_goes_first(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key_of(i=i) for i in range(4)]
    for key in keys:
        write_entry("latents", key, {"a": torch.zeros(1000)})
    each = place_of("latents", keys[0]).stat().st_size
    long_ago = time.time() - 10 * cache.FRESH
    for i, key in enumerate(keys):
        os.utime(place_of("latents", key), (long_ago + i, long_ago + i))
    assert cache_size() == 4 * each
    assert read_entry("latents", keys[0]) is not None  # used now
    assert prune_cache(2 * each) == 2 * each
    assert [read_entry("latents", key) is not None for key in keys] == [True, False, False, True]
    assert prune_cache(0) == 0  # all were used within the hour
    monkeypatch.setenv("LORA_BOOTH_CACHE_GB", "0")
    assert prune_cache(unused_for=-1) == 2 * each and cache_size() == 0
    monkeypatch.setenv("LORA_BOOTH_CACHE_GB", "much")
    assert cache.limit() == 2_000_000_000


@pytest.mark.slow
def test_class_images_count_and_are_cleared(rex: Subject, folders: dict[str, Path], own_cache: Path) -> None:
    base = load(folders["sd1"])
    prepare(base, [rex], lora=LORA, config=CONFIG)
    pictures = list((own_cache / "class_images").rglob("*.safetensors"))
    assert len(pictures) == 2 and cache_size() > sum(path.stat().st_size for path in pictures)
    (own_cache / "mine.txt").write_text("of somebody else")
    size = cache_size()
    assert clear_cache() == size and cache_size() == 0
    assert [path.name for path in own_cache.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "change", ["bit", "other", "black", "size", "type", "no mask", "another mask", "nothing", "picture", "pipe", "link"]
)
def test_a_class_image_is_checked_before_it_is_trained_on(
    change: str, folders: dict[str, Path], own_cache: Path, tmp_path: Path
) -> None:
    base = load(folders["sd1"])
    [right] = class_images(base, [("dog", (64, 64), 2)])
    key = image_key(base, "dog", "cat", (64, 64), 0)
    path = place_of("class_images", key)
    other = place_of("class_images", image_key(base, "dog", "mug", (64, 64), 1))
    mask, pixels = torch.zeros(64, 64, dtype=torch.uint8), torch.full((64, 64, 3), 7, dtype=torch.uint8)
    content = path.read_bytes()
    path.unlink()
    if change == "bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "other":
        shutil.copy(other, path)
    elif change == "picture":
        right[1].image.save(path, "PNG")
    elif change == "pipe":
        os.mkfifo(path)
    elif change == "link":
        path.symlink_to(other)
    else:  # with a checksum that is right
        made = {
            "black": {"pixels": pixels * 0, "mask": mask},
            "size": {"pixels": pixels[:32], "mask": mask},
            "type": {"pixels": pixels.float(), "mask": mask},
            "no mask": {"pixels": pixels},
            "another mask": {"pixels": pixels, "mask": mask[:32]},
        }
        write_entry("class_images", key, made.get(change, {}))
    [again] = class_images(base, [("dog", (64, 64), 2)])
    for a, b in zip(again, right, strict=True):
        assert a.thing == b.thing and a.image.size == a.mask.size == (64, 64)
        assert (a.image.tobytes(), a.mask.tobytes()) == (b.image.tobytes(), b.mask.tobytes())
    assert other.read_bytes() != content  # what the link led to is as it was


HOMELESS = {"HOME": "", "XDG_CACHE_HOME": ""}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LORA_BOOTH_CACHE": "~/mine"}, "/home/jane/mine"),
        ({"LORA_BOOTH_CACHE": "/data/mine"}, "/data/mine"),
        ({"LORA_BOOTH_CACHE": "~nobody-of-that-name/mine"}, None),
        ({"LORA_BOOTH_CACHE": ""}, "/home/jane/.cache/lora_booth"),
        ({"XDG_CACHE_HOME": "/scratch"}, "/scratch/lora_booth"),
        ({"XDG_CACHE_HOME": ""}, "/home/jane/.cache/lora_booth"),
        ({"XDG_CACHE_HOME": "here"}, "/home/jane/.cache/lora_booth"),
        ({"XDG_CACHE_HOME": "~/.cache"}, "/home/jane/.cache/lora_booth"),
        (HOMELESS, None),
        (HOMELESS | {"HOME": "."}, None),
        ({"HOME": None}, None),
        ({"HOME": None, "LORA_BOOTH_CACHE": "~/mine"}, None),
        ({"HOME": None, "XDG_CACHE_HOME": "/scratch"}, "/scratch/lora_booth"),
        (HOMELESS | {"LORA_BOOTH_CACHE": "/data/mine"}, "/data/mine"),
    ],
)
def test_the_place_of_the_cache(
    variables: dict[str, str | None], expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Never a folder in a strange place: without a home folder (no HOME, no entry in passwd) there is no cache."""
    pwd = pytest.importorskip("pwd")

    def nobody(user: int) -> Any:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    for name, value in {"HOME": "/home/jane", "XDG_CACHE_HOME": "", "LORA_BOOTH_CACHE": "", **variables}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    assert cache_folder() == (cache.NOWHERE if expected is None else Path(expected))
    if expected is None:
        assert not write_entry("latents", key_of(of="one"), TENSORS) and read_entry("latents", key_of(of="one")) is None
        assert cache_size() == prune_cache(0) == clear_cache() == 0 and not list(tmp_path.iterdir())


def test_without_a_home_folder_its_sign_is_no_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pwd = pytest.importorskip("pwd")

    def nobody(user: int) -> Any:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    monkeypatch.chdir(tmp_path)
    for source in ("~", "~/model", "~nobody-of-that-name/model", "~/model.safetensors"):
        with pytest.raises(BaseModelError):
            BaseModel.load(source)
    for place in ("~", "~/runs"):
        with pytest.raises(SettingsError, match="needed: a path"):
            typed("out", place, Path)
    assert typed("out", "~draft", Path) == Path("~draft") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache", "x" * 300, "/" + "x/" * 3000])
def test_a_cache_that_cannot_be_made_stops_nobody(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_BOOTH_CACHE", place)
    assert not write_entry("latents", key_of(of="one"), TENSORS) and read_entry("latents", key_of(of="one")) is None
    assert cache_size() == prune_cache(0) == clear_cache() == 0


@pytest.mark.parametrize("size", ["inf", "nan", "", "2 GB", "1e400"])
def test_a_limit_that_cannot_be_read_is_the_usual_one(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BOOTH_CACHE_GB", size)
    assert cache.limit() == 2_000_000_000


def test_where_a_local_base_lies_is_deleted_too(own_cache: Path) -> None:
    write_entry(KIND, key_of(of="one"), TENSORS)
    assert cache_size() > 0 and clear_cache() > 0
    assert cache_size() == 0 and not list(own_cache.iterdir())


def test_only_what_it_wrote_is_counted_or_deleted(own_cache: Path, tmp_path: Path) -> None:
    """In a folder that holds other things, even under our names for folders, and whatever links lead to."""
    key, elsewhere = key_of(of="one"), tmp_path / "elsewhere"
    write_entry("latents", key, TENSORS)
    size = cache_size()
    theirs = ["mine.txt", "latents/notes.txt", ".hidden", "text/ab/essay.txt", "latents/ab/model.safetensors"]
    theirs += ["latents/.0123456789abcdef.tmp", f"models/{key[:2]}/{key}.safetensors", f"{key}.safetensors"]
    theirs += [".git/config", f"class_images/{key[:2]}/.{'a' * 16}.tmp"]
    for name in theirs:
        (own_cache / name).parent.mkdir(parents=True, exist_ok=True)
        (own_cache / name).write_text("of somebody else")
    outside = elsewhere / key[:2] / f"{key}.safetensors"
    outside.parent.mkdir(parents=True)
    outside.write_text("of somebody else")
    (own_cache / "digests").symlink_to(elsewhere)
    (own_cache / "counts").mkdir()
    (own_cache / "counts" / key[:2]).symlink_to(outside.parent)
    (own_cache / "bases" / key[:2]).mkdir(parents=True)
    (own_cache / "bases" / key[:2] / outside.name).symlink_to(outside)
    long_ago = time.time() - 10 * cache.FRESH
    for path in own_cache.rglob("*"):
        os.utime(path, (long_ago, long_ago), follow_symlinks=False)
    assert cache_size() == size
    assert prune_cache(0) == size and read_entry("latents", key) is None
    write_entry("latents", key, TENSORS)
    assert clear_cache() == size and cache_size() == 0
    assert all((own_cache / name).read_text() == "of somebody else" for name in theirs)
    assert outside.read_text() == "of somebody else"
    write_entry("bases", key, TENSORS)  # a new file takes the link's place
    assert outside.read_text() == "of somebody else" and read_entry("bases", key) is not None


def test_the_command_says_how_much_is_kept_and_deletes_it(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_booth.cli.app import main

    write_entry("latents", "0" * 64, TENSORS)
    for words in (["cache"], ["cache", "--clear"], ["cache"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert "deleted" in said[1] and said[2].endswith(": 0.0 MB") and not list(own_cache.rglob("*.safetensors"))


@pytest.mark.parametrize("words", [["cache"], ["cache", "--clear"]])
def test_the_command_says_when_there_is_no_cache(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_booth.cli.app import main

    monkeypatch.setenv("LORA_BOOTH_CACHE", "~nobody-of-that-name/cache")
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0 and "set LORA_BOOTH_CACHE to a folder" in capsys.readouterr().out
