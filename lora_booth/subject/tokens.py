"""Checks whether a token is free to take a new meaning: in the base's vocabulary, and by what its text encoder makes of it.

DreamBooth binds a subject to a word that means nothing to the base. A token that already has a meaning, as a word or a
name, pulls the pictures towards that meaning. One that the text encoder does not tell from an article leaves the prompts
of subject and class alike: nothing can be bound to it, and prior preservation takes the subject out again.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import check, typed
from ..errors import SubjectError, listed, setting, shown
from .wording import subject_pattern, without_subject

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# words.json: `meaningful`, abbreviations, slurs and word stems among the rare pieces of CLIP's vocabulary; `first_names`,
# the most common given names of English-speaking countries and some from elsewhere; `artists`, surnames often used as a
# style (the debate about such models began with one). All are compact lists, not complete ones.
WORDS = Path(__file__).with_name("words.json")
END = "</w>"  # how a CLIP vocabulary marks a piece that ends a word
SYNTAX = ',;:()[]{}<>|"\\/*'  # what prompts, here and in other programs, use for weights, lists, files and placeholders
PUNCTUATION = SYNTAX + ".!?'`~_-"  # not at an end of a token either
MAX_PIECES = 3  # chosen
COMMON_SHARE = 0.8  # of a CLIP vocabulary, which is ordered by frequency: short pieces before that are words; chosen
RARE_SHARE = 0.9  # proposals come from behind that; chosen
VOWELS = "aeiouy"
COLOUR = "red"  # a word that every base can tell from an article
LEAST_CONTRAST = 0.3  # of a colour's; below it a token says nothing, which benchmarks/RESULTS.md measures on the toybox
ARTICLE_TEMPLATE = "a photo of a {token} {class_noun}"  # the noun is a word further than in the class prompt

Encode = Callable[[Sequence[str]], Any]  # prompts -> with their `states` (N, tokens, d), as `BaseModel.encode_text` returns


@dataclass(frozen=True)
class TokenReport:
    """What the base's tokenizer makes of a token."""

    token: str
    pieces: tuple[str, ...]  # as the tokenizer writes them; the last ends with </w>
    problems: tuple[str, ...]  # with any of these, choose another token
    warnings: tuple[str, ...] = ()  # the token works, with these drawbacks

    @property
    def ok(self) -> bool:
        """There are no problems; there may be warnings."""
        return not self.problems


def check_token(
    token: str,
    tokenizer: CLIPTokenizer,
    *,
    known_rare: Collection[str] = (),
    encode: Encode | None = None,
    prompt: str | None = None,
    class_noun: str = "dog",
) -> TokenReport:
    """Judge a token by the vocabulary of the base, and by its text encoder.

    A CLIP vocabulary is ordered by how often its pieces were seen. Any piece of five letters or more is a word (or a
    hashtag), and so is a shorter one, unless it stands near the end.

    known_rare  tokens that the base was never trained on: the vocabulary has nothing against them. A base with such a list has
                a closed vocabulary, and was trained on every other complete word in it
    encode      `base.encode_text`, to measure how far the prompt is from that of the plain class; None: the vocabulary alone
    prompt      to read with the token; None: "a photo of TOKEN dog"
    class_noun  in that prompt
    Raises SubjectError if the token is not one word (empty, with spaces or control characters).
    """
    check_token_text(token)
    check(hasattr(tokenizer, "get_vocab"), f"tokenizer {type(tokenizer).__name__}", "that of a base, base.tokenizer")
    encode = typed("encode", encode, Callable | None)
    class_noun = typed("class_noun", class_noun, str)
    prompt = typed("prompt", prompt, str | None) or f"a photo of {token} {class_noun}"
    pieces = tuple(tokenizer.tokenize(token))
    known = token.lower() in known_rare  # CLIP reads lower case only
    problems, warnings = _by_vocabulary(token, pieces, tokenizer, known_rare) if not known else ([], [])
    if encode is not None and not problems:
        [contrast] = contrasts([token], prompt, token, class_noun, encode)
        if contrast < LEAST_CONTRAST:
            others: list[str] = []
            with suppress(SubjectError):  # there may be no rare token
                others = propose_tokens(tokenizer, known_rare=known_rare, encode=encode)
            template = setting("templates", ARTICLE_TEMPLATE, option=f"--template '{ARTICLE_TEMPLATE}'")
            problems.append(
                f"it says next to nothing to the text encoder: it takes the prompt {contrast:.2f} times as far from the plain "
                f"class as {COLOUR!r} does; pass {f'another token, e.g. {listed(others, 3)}' if others else template}"
            )
    return TokenReport(token, pieces, tuple(problems), tuple(warnings))


def contrasts(words: Sequence[str], prompt: str, token: str, class_noun: str, encode: Encode) -> list[float]:
    """For each word as the token of this prompt: how far the text encoders keep it from the prompt of the plain class.

    The distance is that of all states; the one that a colour makes counts 1. Infinite where a colour makes none, because the
    text encoder reads no prompt to that place.
    """
    named = [re.sub(subject_pattern(token, None), word, prompt, flags=re.IGNORECASE) for word in (COLOUR, *words)]
    prompts = [without_subject(prompt, token, class_noun), *named]
    states = encode(prompts).states.detach().float().flatten(1)  # (N, tokens * d)
    colour, *each = (states[1:] - states[0]).norm(dim=1).tolist()
    return [one / colour if colour else math.inf for one in each]


def propose_tokens(
    tokenizer: CLIPTokenizer,
    count: int = 8,
    *,
    known_rare: Collection[str] = (),
    seed: int = 0,
    encode: Encode | None = None,
) -> list[str]:
    """Up to `count` tokens of three or four letters, each one rare piece; the same for the same seed.

    With `known_rare`, those of them that are one piece. Otherwise they come from the last tenth of the vocabulary, without
    pronounceable ones, names and well-known abbreviations. With `encode`, as for `check_token`, those that the text encoder
    tells from an article, which may be none.
    Raises SubjectError if the vocabulary has none.
    """
    check(hasattr(tokenizer, "get_vocab"), f"tokenizer {type(tokenizer).__name__}", "that of a base, base.tokenizer")
    check(typed("count", count, int) >= 1, f"count {count}", "at least 1")
    encode = typed("encode", encode, Callable | None)
    vocabulary = tokenizer.get_vocab()
    pool = sorted({word for word in known_rare if word + END in vocabulary})
    if not known_rare:
        first = RARE_SHARE * len(vocabulary)
        rare = sorted((number, piece.removesuffix(END)) for piece, number in vocabulary.items() if piece.endswith(END))
        pool = [word for number, word in rare if number >= first and _is_proposable(word)]
    if not pool:
        raise SubjectError("the base's vocabulary has no rare token to propose; choose your own, e.g. 'ohwx'")
    found = random.Random(seed).sample(pool, min(count, len(pool)))
    if encode is None:
        return found
    each = contrasts(found, f"a photo of {found[0]} dog", found[0], "dog", encode)
    return [word for word, contrast in zip(found, each, strict=True) if contrast >= LEAST_CONTRAST]


def check_token_text(token: str) -> None:
    """Raises SubjectError if a token is not one printable word without punctuation, of at most 64 characters."""
    plain = typed("token", token, str).strip(PUNCTUATION)
    fits = 0 < len(plain) <= 64 and plain.isprintable() and not any(c.isspace() or c in SYNTAX for c in plain)
    if plain != token or not fits:
        wanted = "one word without braces or other punctuation, at most 64 characters"
        raise SubjectError(f"token '{shown(token[:70])}'; needed: {wanted}, e.g. {plain if fits else 'ohwx'!r}")


@cache
def _words(*lists: str) -> frozenset[str]:
    """The words of these lists of words.json."""
    data = json.loads(WORDS.read_text(encoding="utf-8"))
    return frozenset(word for name in lists for word in data[name])


def _by_vocabulary(
    token: str, pieces: Sequence[str], tokenizer: CLIPTokenizer, known_rare: Collection[str]
) -> tuple[list[str], list[str]]:
    """Problems and warnings."""
    word, vocabulary = token.lower(), tokenizer.get_vocab()
    parts = [piece.removesuffix(END) for piece in pieces]
    known = [part for part in parts if _is_known_word(part, vocabulary) and (len(parts) == 1 or len(part) >= 3)]
    problems: list[str] = []
    warnings: list[str] = []
    if not pieces or any(piece not in vocabulary or piece.startswith("<|") for piece in pieces):
        problems.append("it has characters that the base cannot read")
    elif len(pieces) > MAX_PIECES:
        plain = ", ".join(map(shown, parts))
        problems.append(f"it splits into {len(pieces)} pieces ({plain}); at most {MAX_PIECES}, one is best")
    elif len(pieces) == 1 and (known or known_rare):
        problems.append("the base knows it as a word and has pictures for it")
    elif known:
        warnings.append(f"it contains what the base knows as a word ({', '.join(map(shown, known))}), which may show")
    elif word.isalpha() and _reads_like_a_word(word) and (len(pieces) == 1 or len(word) >= 5):
        warnings.append("it reads like a word or a name; if the base knows it, that meaning will show")
    if not problems and len(parts) > 1 and all(len(part) == 1 for part in parts):
        warnings.append("the base spells it letter by letter, as it does with much other text; one piece is better")
    if word == "sks":
        warnings.append("SKS is a rifle, and bases have pictures of it; any other rare token is better")
    if _looks_like_a_name(token):
        warnings.append("it looks like a person's name, and the base links names to pictures of people; choose a rare token")
    if word != token:
        warnings.append(f"the base reads lower case only: {token} and {word} are the same to it")
    return problems, warnings


def _is_known_word(word: str, vocabulary: Mapping[str, int]) -> bool:
    """Whether it is a complete word in the vocabulary, and not one of the short leftovers at its end."""
    number = vocabulary.get(word + END)
    if number is None or not word.isalpha():
        return False
    return len(word) >= 5 or (len(word) >= 2 and number < COMMON_SHARE * len(vocabulary))


def _reads_like_a_word(word: str) -> bool:
    """Whether it can be pronounced: it has a vowel and never three consonants in a row."""
    return bool(re.search(f"[{VOWELS}]", word)) and not re.search(f"[^{VOWELS}]{{3}}", word)


def _looks_like_a_name(token: str) -> bool:
    """A first name, an artist's surname, or first and last name in one word: JohnSmith, john-smith, gregrutkowski.

    The signs are two capitalised parts, or a common first name or artist's surname among the parts. This is a hint, not a
    check: it misses other names of one part, of other scripts or outside the lists, and takes a brand (TealCup) for a name.
    """
    first_names, artists = _words("first_names"), _words("artists")
    if any(token.lower().endswith(name) and token.lower().removesuffix(name) in first_names for name in artists):
        return True
    parts = [part for part in re.split(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])", token) if len(part) > 1]
    capitalised = sum(part[0].isupper() and part[1:].islower() and len(part) > 2 for part in parts)
    return capitalised > 1 or any(part.lower() in first_names | artists for part in parts)


def _is_proposable(word: str) -> bool:
    return (
        re.fullmatch("[a-z]{3,4}", word) is not None
        and not _reads_like_a_word(word)
        and len(set(word)) > 2  # not "kkk", "hmmm"
        and word not in _words("first_names", "artists", "meaningful")
    )
