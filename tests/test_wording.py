"""Words in prompts: the article by its sound, and subjects that become their plain class."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import Card
from lora_booth.pictures.subjects import without
from lora_booth.subject.wording import article, with_article, without_subject

AN = "owl umbrella urn usher uncle onion hour hourglass honest honor heirloom X-ray xbox 8-ball 18-wheeler uninhabited"
A = "dog honey heron unicorn unicycle university unique user usual USB UK utensil ukulele ubiquitous European eucalyptus ewe "
A += "one-eyed once yak xylophone 1-man"


@pytest.mark.parametrize(("words", "expected"), [(AN, "an"), (A, "a")])
def test_an_before_a_vowel_sound(words: str, expected: str) -> None:
    assert {word: article(word) for word in words.split()} == dict.fromkeys(words.split(), expected)
    assert with_article("orange cat") == "an orange cat"


@pytest.mark.parametrize(
    ("prompt", "noun", "expected"),
    [
        ("a photo of a sks dog and a zwx mug", "dog", "a photo of a dog and a zwx mug"),
        ("a photo of sks unicorn", "unicorn", "a photo of a unicorn"),
        ("a photo of a sks unicorn", "unicorn", "a photo of a unicorn"),
        ("a sks owl, an sks owl and sks owl", "owl", "an owl, an owl and an owl"),
        ("an sks dog", "dog", "a dog"),
        ("A SKS owl asleep", "owl", "An owl asleep"),
        ("the sks dog", "dog", "the dog"),
        ("my sks dog and this old sks dog", "dog", "my dog and this old dog"),
        ("sks dog's bowl and sks's bed", "dog", "a dog's bowl and a dog's bed"),
        ("two sks dogs", "dog", "two dogs"),
        ("sks-dog; sks  dog; a sks\ndog", "dog", "a dog; a dog; a dog"),
        ("a cat riding sks horse", "horse", "a cat riding a horse"),
        ("sks sks dog", "dog", "a dog a dog"),
        ("a sksy dog, sks_dog", "dog", "a sksy dog, sks_dog"),
        ("in the style of sks", None, "in the style of an object"),
    ],
)
def test_the_plain_class_takes_the_subjects_place(prompt: str, noun: str | None, expected: str) -> None:
    assert without_subject(prompt, "sks", noun) == expected


def test_each_region_gets_the_prompt_without_the_others() -> None:
    dog, horn = (Adapter({}, Card(token=token, class_noun=noun)) for token, noun in (("sks", "dog"), ("zwx", "unicorn")))
    prompt = "a photo of a sks dog and a zwx unicorn"
    assert without(prompt, [dog]) == "a photo of a dog and a zwx unicorn"
    assert without(prompt, [horn]) == "a photo of a sks dog and a unicorn"
    style = replace(dog, card=Card(title="ink"))
    assert without(prompt, [dog, horn, style]) == "a photo of a dog and a unicorn"
