"""Words in prompts: "a" or "an", where a prompt names a subject, and the prompt with the plain class in its place."""

from __future__ import annotations

import re

# Vowel letters that sound like consonants (a unicorn, a European owl, a one-eyed cat, a ukulele), the reverse
# (an hour, an heirloom, an x-ray), and numbers as they are read (an 8-ball, an 18-wheeler).
CONSONANT_SOUND = re.compile(r"uni(?![dmn])|u[bfgkrstv][aeiou]|usb|u[ksv]\b|eu|ewe|one\b|once\b|ouija", re.IGNORECASE)
VOWEL_SOUND = re.compile(r"[aeiou]|hour|honest|honou?r|heir|x\b|xbox|8|1[18]\b", re.IGNORECASE)

# Before these words a noun has no article yet ("a photo of zwx dog"); any other word is taken for an adjective or a
# determiner, which has one before it or needs none ("a red zwx dog", "my zwx dog", "two zwx dogs").
NO_ARTICLE_YET = frozenset(
    "of with and or plus by on in into onto inside under over above below near beside behind between at from to toward "
    "towards for like as is against around through versus vs meets "
    "holding riding wearing carrying chasing hugging eating watching showing featuring depicting containing".split()
)


def article(phrase: str) -> str:
    """ "an" before a vowel sound, else "a": an owl, an hourglass, a unicorn."""
    return "an" if VOWEL_SOUND.match(phrase) and not CONSONANT_SOUND.match(phrase) else "a"


def with_article(phrase: str) -> str:
    return f"{article(phrase)} {phrase}"


def subject_pattern(token: str, class_noun: str | None) -> str:
    """A regular expression for the token, with the class noun (group `noun`) if it follows."""
    noun = rf"(?:[\s-]+(?P<noun>{re.escape(class_noun)}(?:e?s)?))?" if class_noun else "(?P<noun>(?!))?"
    return rf"(?<!\w){re.escape(token)}{noun}(?!\w)"


def without_subject(prompt: str, token: str, class_noun: str | None) -> str:
    """The prompt with the plain class in place of the subject.

    "a photo of zwx dog" -> "a photo of a dog"; "a zwx owl" -> "an owl"; "the zwx dog's bowl" -> "the dog's bowl"
    """

    def plain(match: re.Match[str]) -> str:
        noun, before = match["noun"] or class_noun or "object", match["before"] or ""
        plural = match["noun"] is not None and match["noun"].lower() != (class_noun or "").lower()
        if before.lower() in ("a", "an"):
            one = with_article(noun)
            return one[0].upper() + one[1:] if before[0].isupper() else one
        if plural or (before and before.lower() not in NO_ARTICLE_YET):
            return f"{before} {noun}".lstrip()
        return f"{before} {with_article(noun)}".lstrip()

    before = rf"(?:(?<!\w)(?P<before>(?!{re.escape(token)}\s)\w+)\s+)?"
    return re.sub(before + subject_pattern(token, class_noun), plain, prompt, flags=re.IGNORECASE)
