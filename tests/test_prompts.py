"""Prompts: files of them, placeholders, and the paper's lists."""

from __future__ import annotations

from dataclasses import replace

import pytest

import lora_booth as lb
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import Card
from lora_booth.errors import SettingsError
from lora_booth.pictures.prompts import MAX_PROMPTS, PROMPT_SETS, fill_prompts, prompts_for, read_prompts


def test_the_papers_prompts():
    assert {name: len(set(prompts)) for name, prompts in PROMPT_SETS.items()} == {"object": 25, "live": 25}
    filled = fill_prompts(PROMPT_SETS["object"], token="sks", class_noun="mug")
    assert filled[0] == "a sks mug in the jungle" and filled[12] == "a sks mug with the Eiffel Tower in the background"
    assert filled[-5:] == [f"a {word} sks mug" for word in ("red", "purple", "shiny", "wet", "cube shaped")]
    shared = set(PROMPT_SETS["object"]) & set(PROMPT_SETS["live"])
    assert len(shared) == 15 and "a {token} {class_noun} wearing a santa hat" in PROMPT_SETS["live"]


def test_placeholders_are_filled_once_for_each_context():
    prompts = ["a photo of {a} {class_noun}", "{token} {class_noun} {context}", "{context}: {token}", "plain"]
    filled = fill_prompts(prompts, token="sks", class_noun="owl", contexts=("in the snow", "at sea"))
    assert filled == ["a photo of an owl", "sks owl in the snow", "sks owl at sea", "in the snow: sks", "at sea: sks", "plain"]


def test_what_is_filled_in_is_not_filled_again():
    assert fill_prompts(["{token} {context}"], token="{context}", contexts=("{token}",)) == ["{context} {token}"]


@pytest.mark.parametrize("prompt", ["{red|blue} dog", "{", "{}", "a (dog:1.2)", "{0}", "{token.__class__}", "%s {{x y}}"])
def test_other_braces_are_left_alone(prompt):
    assert fill_prompts([prompt], token="sks", class_noun="dog") == [prompt]


def test_the_same_prompt_is_kept_once():
    assert fill_prompts(["a", "b", "a"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "words", "line"),
    [
        ("a {tokn}", {"token": "sks"}, r"\{tokn\} is unknown; allowed: \{token\}, \{class_noun\}, \{a\}, \{context\}"),
        ("a {token}", {"class_noun": "dog"}, r"no adapter.s card has \{token\}"),
        ("{a} dog", {"token": "sks"}, r"no adapter.s card has \{a\}"),
        ("sks {context}", {"token": "sks"}, r"no contexts for \{context\}"),
        ("\x1b[2J {tokn}", {}, r"\\x1b\[2J"),
    ],
)
def test_a_placeholder_that_cannot_be_filled_is_told(prompt, words, line):
    with pytest.raises(SettingsError, match=line):
        fill_prompts([prompt], **words)


def test_the_words_come_from_the_first_adapter_with_a_token():
    style = Adapter({}, Card())
    mug = replace(style, card=Card(token="zwx", class_noun="mug"))
    assert prompts_for([style, mug], ["{token} {class_noun}"]) == ["zwx mug"]
    assert prompts_for([style], ["plain"]) == ["plain"]
    with pytest.raises(SettingsError, match=r"no adapter.s card has \{token\}; write the word itself"):
        prompts_for([style], ["{token}"])


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_of_prompts(tmp_path, end, mark):
    text = end.join(["# for Rex", "", "  a photo of sks dog  ", "größer   als\tein # Hund", "   ", "last"])
    (tmp_path / "p.txt").write_bytes(mark + text.encode())
    assert lb.read_prompts(tmp_path / "p.txt") == ["a photo of sks dog", "größer als ein # Hund", "last"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "0 prompts; allowed: 1 to 1000"),
        (b"# nothing but\n\n# remarks", "0 prompts"),
        (b"x\n" * (MAX_PROMPTS + 1), "1001 prompts"),
        (b"\xff\xfe\x00x", "not UTF-8 text at byte 0"),
        (b"fine\na\x1b[31mred", r"p\.txt:2: 'a\\x1b\[31mred'"),
        (b"a\xe2\x80\xaeb", r"p\.txt:1: 'a\\u202eb'"),
        (b"word " * 500, r"p\.txt:1: 'word"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8"),
    ],
)
def test_what_is_no_file_of_prompts_is_told(tmp_path, content, line):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(SettingsError, match=line):
        read_prompts(tmp_path / "p.txt")


def test_a_huge_file_is_not_read_whole(tmp_path):
    with (tmp_path / "p.txt").open("wb") as file:
        file.write(b"a\n")
        file.truncate(2**34)  # a hole, no bytes on the disk
    with pytest.raises(SettingsError, match="control characters"):
        read_prompts(tmp_path / "p.txt")


def test_no_such_file(tmp_path):
    with pytest.raises(SettingsError, match="one prompt a line"):
        read_prompts(tmp_path / "nothing.txt")
    with pytest.raises(SettingsError, match="one prompt a line"):
        read_prompts(tmp_path)
