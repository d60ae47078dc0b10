"""Prompts of a subject, and what a base's vocabulary says about a token."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_booth.errors import LoraBoothError, PhotoError, SubjectError
from lora_booth.photos.photo import Photo
from lora_booth.subject.subject import Subject
from lora_booth.subject.tokens import check_token, propose_tokens
from lora_booth.subject.wording import article


def photo(index: int = 0, caption: str | None = None) -> Photo:
    return Photo(Path(f"{index}.jpg"), 512, 512, caption, None, f"{index:064}")


REX = Subject((photo(0), photo(1), photo(2)), token="ohwx", class_noun="dog")


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts() -> None:
    assert REX.instance_prompt == "a photo of ohwx dog"
    assert REX.class_prompt == "a photo of a dog"
    assert replace(REX, class_noun="owl").class_prompt == "a photo of an owl"
    assert replace(REX, class_template="{a} {class_noun}, sketched").class_prompt == "a dog, sketched"


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("dog", "a"), ("elephant", "an"), ("Umbrella", "an"), ("unicorn", "a"), ("hourglass", "an"), ("house", "a")],
)
def test_article(noun: str, expected: str) -> None:
    assert article(noun) == expected


def test_templates_in_turn() -> None:
    templates = ("a photo of {token} {class_noun}", "{token} {class_noun} close up")
    rex = replace(REX, templates=templates)
    prompts = [rex.prompt_for(one) for one in rex.photos]
    assert prompts == ["a photo of ohwx dog", "ohwx dog close up", "a photo of ohwx dog"]
    assert rex.instance_prompt == prompts[0]


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("{token} {class_noun} asleep", "ohwx dog asleep"),
        ("my ohwx dog", "my ohwx dog"),
        ("my OHWX dog", "my OHWX dog"),  # CLIP reads lower case
        ("a dog with a dog", "a ohwx dog with a dog"),
        ("A Dog on grass", "A ohwx dog on grass"),
        ("hotdog dogs ohwxy", "a photo of ohwx dog, hotdog dogs ohwxy"),  # whole words only
        ("on grass", "a photo of ohwx dog, on grass"),
        (r"a dog \1 {x} {token.__class__}", r"a ohwx dog \1 {x} {token.__class__}"),
    ],
)
def test_captions(caption: str, prompt: str) -> None:
    assert REX.prompt_for(photo(0, caption)) == prompt


def test_from_folder(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.txt").write_text("a dog on grass")
    (tmp_path / "note.md").write_text("hello")
    rex = Subject.from_folder(tmp_path, token="ohwx", class_noun="dog", templates=["{token}"], crops={"2.png": (0, 0, 64, 64)})
    assert [rex.prompt_for(one) for one in rex.photos] == ["ohwx", "a ohwx dog on grass", "ohwx"]
    assert rex.photos[2].crop == (0, 0, 1, 1)
    assert [one.path.name for one in rex.skipped] == ["note.md"]
    with pytest.raises(PhotoError, match="3 usable photos, 4 needed"):
        Subject.from_folder(tmp_path, token="ohwx", class_noun="dog", minimum=4)
    with pytest.raises(SubjectError):  # told before the folder is even looked at
        Subject.from_folder(tmp_path / "gone", token="", class_noun="dog")


def test_the_card_gets_no_words_of_a_template() -> None:
    assert REX.card_prompt == "a photo of ohwx dog"
    assert replace(REX, templates=("{token} {class_noun} at Ann's house",)).card_prompt == "ohwx dog"


def test_audit_of_a_subject(tmp_path: Path) -> None:
    for index in range(3):
        values = np.random.default_rng(index).integers(0, 256, (64, 128, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    Image.new("L", (128, 64), 255).save(tmp_path / "0.mask.png")
    (tmp_path / "note.md").write_text("hello")
    masks = {"1.png": Image.new("L", (128, 64), 255)}
    rex = Subject.from_folder(tmp_path, token="ohwx", class_noun="dog", crop="center", masks=masks)
    assert [one.mask is not None for one in rex.photos] == [True, True, False]
    assert [one.focus for one in rex.photos] == [None] * 3
    audit = rex.audit(resolution=64)
    assert audit.resolution == 64 and audit.skipped == rex.skipped
    assert [report.photo for report in audit.photos] == list(rex.photos)
    with pytest.raises(PhotoError, match="crop 'round' is unknown"):
        Subject.from_folder(tmp_path, token="ohwx", class_noun="dog", crop="round")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"token": ""},
        {"token": "  "},
        {"token": "two words"},
        {"token": "oh\nwx"},
        {"token": "oh\x1b[31mwx"},
        {"token": "{token}"},
        {"token": "x" * 65},
        {"token": "zwx,"},
        {"token": "<zwx>"},
        {"token": "(zwx:1.4)"},
        {"token": "z,wx"},
        {"token": "zwx."},
        {"token": '"zwx"'},
        {"token": "..."},
        {"class_noun": "a dog"},
        {"class_noun": "An Owl"},
        {"class_noun": "my dog"},
        {"class_noun": "a photo of a dog"},
        {"class_noun": "photo of the dog"},
        {"class_noun": "dog, best quality"},
        {"class_noun": "(dog:1.2)"},
        {"class_noun": "ohwx dog"},
        {"class_noun": "<lora:x:1> dog"},
        {"token": "dog"},
        {"token": "Dog"},
        {"class_noun": ""},
        {"class_noun": " "},
        {"class_noun": "dog\n"},
        {"templates": ()},
        {"templates": ("a photo",)},
        {"templates": ("{token} {what}",)},
        {"templates": ("{token}", "{class_noun}")},
        {"class_template": "a photo"},
        {"class_template": "{token} {class_noun}"},
        {"photos": ()},
    ],
)
def test_mistakes(change: dict[str, Any]) -> None:
    with pytest.raises(SubjectError) as error:
        replace(REX, **change)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"token": 5}, "token 5"),
        ({"token": None}, "token None"),
        ({"class_noun": b"dog"}, "class_noun b'dog'"),
        ({"minimum": "3"}, "minimum '3'"),
        ({"maximum": 2.5}, "maximum 2.5"),
        ({"templates": 5}, "templates 5"),
        ({"crops": ["1.png"]}, "crops"),
        ({"masks": "1.mask.png"}, "masks"),
        ({"crop": None}, "crop 'None'"),
    ],
)
def test_types_are_told(change: dict[str, Any], named: str, photos: Path) -> None:
    with pytest.raises(LoraBoothError, match=f"^{re.escape(named)}"):
        Subject.from_folder(photos, **{"token": "ohwx", "class_noun": "dog", **change})


def test_what_is_plainly_meant_is_taken(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(photos.parent))
    rex = Subject.from_folder(f"~/{photos.name}", token="ohwx", class_noun="dog", minimum=1.0, templates="my {token}")
    assert len(rex.photos) == 3 and rex.instance_prompt == "my ohwx"
    assert Subject.from_folder(rex.photos[0].path, token="ohwx", class_noun="dog", minimum=1).photos == rex.photos[:1]
    for folder in ("a" * 5000, ["a" * 5000]):
        with pytest.raises(PhotoError, match="no such"):
            Subject.from_folder(folder, token="ohwx", class_noun="dog")
    for folder in ("a\0b", ["a\0b.png"], 5, [5], None):
        with pytest.raises(LoraBoothError, match="^photos .*needed: a path"):
            Subject.from_folder(folder, token="ohwx", class_noun="dog")


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"token": "zwx,"}, "'zwx'"),
        ({"token": "<zwx>"}, "'zwx'"),
        ({"class_noun": "a dog"}, "'dog'"),
        ({"class_noun": "a photo of my old dog"}, "'old dog'"),
    ],
)
def test_the_remedy_of_a_mistake(change: dict[str, str], remedy: str) -> None:
    with pytest.raises(SubjectError, match=f"{remedy}$"):
        replace(REX, **change)


@pytest.mark.parametrize("noun", ["coffee mug", "bottle of water", "t-shirt", "R2-D2", "St. Bernard", "antelope", "犬"])
def test_nouns_of_every_kind(noun: str) -> None:
    assert replace(REX, class_noun=noun).class_prompt.endswith(noun)


@pytest.mark.parametrize("token", ["X-1", "john_smith", "o'hwx", "Anna.Zqv", "犬", "☃", "zwx2"])
def test_tokens_of_every_kind(token: str) -> None:
    assert replace(REX, token=token).instance_prompt == f"a photo of {token} dog"


# --- tokens ---------------------------------------------------------------------------------------------------------

COMMON = ["dog", "cat", "of", "emma", "rex", "teapot", "photo"]
RARE = ["sks", "ohwx", "zqv", "wrt", "fawn", "kkkk", "gmbh", "asdfgh"]  # at the vocabulary's end, like CLIP's leftovers


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A CLIP tokenizer in small: bytes, frequent words, much in between, rare pieces last."""
    transformers = pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []

    def learn(word: str) -> None:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # merged left to right: d o g</w> -> do g</w> -> dog</w>
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
                vocabulary.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]

    for word in COMMON:
        learn(word)
    for first in "bcdfg":  # what fills the middle
        for second in "aeiou":
            for third in "bdgklmnprt":
                learn(first + second + third)
    for word in RARE:
        learn(word)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges)


def test_a_rare_token_is_free(tokenizer: Any) -> None:
    report = check_token("ohwx", tokenizer)
    assert report.ok
    assert (report.pieces, report.problems, report.warnings) == (("ohwx</w>",), (), ())


@pytest.mark.parametrize("word", ["dog", "Dog", "of", "teapot", "rex", "asdfgh"])
def test_words_are_problems(tokenizer: Any, word: str) -> None:
    report = check_token(word, tokenizer)
    assert not report.ok
    assert "knows it as a word" in report.problems[0]


@pytest.mark.parametrize(
    ("token", "warning"),
    [
        ("sks", "rifle"),
        ("SKS", "lower case"),
        ("zara", "a person's name"),
        ("warhol", "a person's name"),
        ("fawn", "reads like a word"),
        ("zdog", "as a word (dog)"),
        ("zxv", "letter by letter"),
    ],
)
def test_warnings_do_not_stop(tokenizer: Any, token: str, warning: str) -> None:
    report = check_token(token, tokenizer)
    if token not in ("zara", "warhol"):  # in this small vocabulary, these fall into many pieces
        assert report.ok
    assert any(warning in text for text in report.warnings)


@pytest.mark.parametrize(
    "token", ["JohnSmith", "john_smith", "greg-rutkowski", "gregrutkowski", "SmithZqv", "Anna.Zqv", "VanGogh"]
)
def test_what_looks_like_a_name_is_told(tokenizer: Any, token: str) -> None:
    assert any("a person's name" in text for text in check_token(token, tokenizer).warnings)


@pytest.mark.parametrize("token", ["ohwx", "zqv", "OHWX", "McZqv", "zq_v", "rex2024", "iPhone", "X-1"])
def test_what_does_not_look_like_a_name(tokenizer: Any, token: str) -> None:
    assert not any("a person's name" in text for text in check_token(token, tokenizer).warnings)


def test_many_pieces(tokenizer: Any) -> None:
    report = check_token("rex2024", tokenizer)
    assert report.pieces == ("rex</w>", "2</w>", "0</w>", "2</w>", "4</w>")
    assert report.problems == ("it splits into 5 pieces (rex, 2, 0, 2, 4); at most 3, one is best",)


def test_unreadable_characters(tokenizer: Any) -> None:
    class Deaf:
        def tokenize(self, text: str) -> list[str]:
            return ["<|endoftext|>"]

        def get_vocab(self) -> dict[str, int]:
            return {"<|endoftext|>": 0}

    assert "cannot read" in check_token("\u2603", Deaf()).problems[0]
    with pytest.raises(SubjectError):
        check_token("a b", tokenizer)


def test_a_base_that_says_which_tokens_are_rare(tokenizer: Any) -> None:
    known_rare = ("sks", "zqv")
    assert check_token("sks", tokenizer, known_rare=known_rare).warnings == ()
    assert not check_token("wrt", tokenizer, known_rare=known_rare).ok  # any other whole word was taught
    assert propose_tokens(tokenizer, known_rare=(*known_rare, "notinit")) in (["sks", "zqv"], ["zqv", "sks"])


def test_proposals(tokenizer: Any) -> None:
    proposals = propose_tokens(tokenizer, count=3)
    assert set(proposals) == {"ohwx", "zqv", "wrt"}  # not sks, fawn, kkkk, gmbh, asdfgh
    assert proposals == propose_tokens(tokenizer, count=3)
    assert len(propose_tokens(tokenizer, count=2)) == 2
    assert len({tuple(propose_tokens(tokenizer, seed=seed)) for seed in range(8)}) > 1
    for token in proposals:
        assert check_token(token, tokenizer).ok and not check_token(token, tokenizer).warnings


def test_nothing_to_propose() -> None:
    class Tiny:
        def tokenize(self, text: str) -> list[str]:
            return [text]

        def get_vocab(self) -> dict[str, int]:
            return {"dog</w>": 0}

    with pytest.raises(SubjectError, match="no rare token"):
        propose_tokens(Tiny())
