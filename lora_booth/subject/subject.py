"""Subject: photos + token + class noun -> prompts; and whether a token is free to mean something new.

DreamBooth binds a subject to a word that the base has no picture of. A token that already has a meaning (a word, a
name) pulls the result towards that meaning, so `check_token` looks it up in the base's own vocabulary.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import SubjectError, shown
from ..photos.audit import Audit, audit_photos
from ..photos.cropping import Cropping
from ..photos.finding import find_photos
from ..photos.masks import MaskSource
from ..photos.photo import Photo, PhotoSet, Region, Skipped
from .wording import article, with_article

INSTANCE_TEMPLATE = "a photo of {token} {class_noun}"
CLASS_TEMPLATE = "a photo of {a} {class_noun}"  # {a}: "a" or "an", by the class noun's sound
PLACEHOLDERS = ("token", "class_noun", "a")

END = "</w>"  # how a CLIP vocabulary marks a piece that ends a word
MAX_PIECES = 3
COMMON_SHARE = 0.8  # of a CLIP vocabulary, which is ordered by frequency: short pieces before that are words
RARE_SHARE = 0.9  # proposals come from behind that
VOWELS = "aeiouy"


class Tokenizer(Protocol):
    """What is asked of a tokenizer (transformers' CLIPTokenizer has it)."""

    def tokenize(self, text: str) -> list[str]:
        """The pieces of `text`; the last of each word ends with `</w>`."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id; lower ids were merged earlier, so they are more frequent."""
        ...


@dataclass(frozen=True)
class Subject:
    """One thing to teach: its photos, the token that shall mean it, and the class it belongs to."""

    photos: tuple[Photo, ...]
    token: str
    class_noun: str  # what the base knows it as: "dog", "coffee mug"
    templates: tuple[str, ...] = (INSTANCE_TEMPLATE,)  # cycled over the photos
    class_template: str = CLASS_TEMPLATE
    skipped: tuple[Skipped, ...] = field(default=(), compare=False)  # files that are not used; for the report only

    def __post_init__(self) -> None:
        if not self.photos:
            raise SubjectError("a subject without photos; pass at least one (3 to 30 are usual)")
        _check_token_text(self.token)
        _check_class_noun(self.class_noun)
        if self.token.lower() == self.class_noun.lower():
            raise SubjectError(
                f"token {self.token!r} is the class noun itself; the subject would replace the class: use a rare token"
            )
        if isinstance(self.templates, str) or not self.templates:
            raise SubjectError(f"templates {self.templates!r}; needed: a tuple of at least one template")
        for template in self.templates:
            _check_template(template, needs="token")
        _check_template(self.class_template, needs="class_noun")
        if "{token}" in self.class_template:
            raise SubjectError(f"class template {shown(self.class_template)!r} names the token; it is for the bare class")

    def __repr__(self) -> str:
        """Without the paths of the photos."""
        masks = sum(photo.mask is not None for photo in self.photos)
        more = (f", {masks} with masks" if masks else "") + (f", {len(self.skipped)} files skipped" if self.skipped else "")
        return f"Subject({self.token!r}, {with_article(self.class_noun)}: {len(self.photos)} photos{more})"

    @classmethod
    def from_folder(
        cls,
        folder: Path | str | Sequence[Path | str],
        *,
        token: str,
        class_noun: str,
        minimum: int = 3,
        maximum: int = 100,
        templates: Sequence[str] = (INSTANCE_TEMPLATE,),
        class_template: str = CLASS_TEMPLATE,
        crop: Cropping = "smart",
        crops: Mapping[str, Region] | None = None,
        masks: Mapping[str, MaskSource] | None = None,
    ) -> Subject:
        """The subject of a folder of photos (or of a list of files); see `find_photos` for what is used and what not.

        Raises SubjectError, PhotoError.
        """
        if isinstance(templates, str):
            templates = (templates,)
        # The words are checked first, so that a slip there is not told only after decoding every photo.
        _check_token_text(token)
        _check_class_noun(class_noun)
        found: PhotoSet = find_photos(folder, crop=crop, crops=crops, masks=masks, minimum=minimum, maximum=maximum)
        return cls(found.photos, token, class_noun, tuple(templates), class_template, found.skipped)

    def audit(self, *, resolution: int = 512) -> Audit:
        """What the photos will teach at `resolution` pixels, and what to change; nothing in it stops a training.

        Raises PhotoError if a photo is gone or changed since it was found.
        """
        return audit_photos(self.photos, self.skipped, resolution=resolution)

    @property
    def instance_prompt(self) -> str:
        """The prompt of the first template: "a photo of sks dog"."""
        return self._filled(self.templates[0])

    @property
    def card_prompt(self) -> str:
        """The prompt that an adapter's card suggests: of token and class noun only, never words of a template or caption."""
        return self.instance_prompt if self.templates[0] == INSTANCE_TEMPLATE else f"{self.token} {self.class_noun}"

    @property
    def class_prompt(self) -> str:
        """The prompt for class images (prior preservation): "a photo of a dog"."""
        return self._filled(self.class_template)

    def prompt_for(self, photo: Photo) -> str:
        """The prompt that `photo` is trained with.

        Without a caption: the templates in turn, by the photo's place in `photos`. With one (photo.txt), it is used,
        and the token always gets in:
          "{token}" (and "{class_noun}", "{a}") are filled in;        "{token} {class_noun} asleep" -> "sks dog asleep"
          a caption that has the token already stays as it is;        "my sks dog" -> "my sks dog"
          else the first class noun becomes "token class_noun";       "a dog on grass" -> "a sks dog on grass"
          without a class noun, the instance prompt goes before it.   "on grass" -> "a photo of sks dog, on grass"
        """
        if photo.caption is None:
            place = self.photos.index(photo) if photo in self.photos else 0
            return self._filled(self.templates[place % len(self.templates)])
        caption = self._filled(photo.caption)
        if re.search(_whole_word(self.token), caption, re.IGNORECASE):
            return caption
        both = f"{self.token} {self.class_noun}"
        renamed, count = re.subn(_whole_word(self.class_noun), lambda _: both, caption, count=1, flags=re.IGNORECASE)
        return renamed if count else f"{self.instance_prompt}, {caption}"

    def _filled(self, template: str) -> str:
        words = {"token": self.token, "class_noun": self.class_noun, "a": article(self.class_noun)}
        # Not str.format: a caption may hold any braces, and "{token.__class__}" is nobody's business.
        return re.sub(r"\{(token|class_noun|a)\}", lambda match: words[match[1]], template)


def _whole_word(words: str) -> str:
    return rf"(?<!\w){re.escape(words)}(?!\w)"


def _check_token_text(token: str) -> None:
    if not token or not token.strip():
        raise SubjectError("token ''; needed: a rare word, as 'sks' or 'ohwx'")
    if not token.isprintable() or any(character.isspace() for character in token):
        raise SubjectError(f"token '{shown(token)}' holds a space or control character; needed: one word, as 'ohwx'")
    if "{" in token or "}" in token:
        raise SubjectError(f"token {token!r} holds a brace, which stands for a placeholder; needed: one word, as 'ohwx'")
    if len(token) > 64:
        raise SubjectError(f"token '{shown(token[:20])}...' has {len(token)} characters; at most 64, 3 to 5 are best")


def _check_class_noun(noun: str) -> None:
    if not noun or not noun.strip():
        raise SubjectError("class noun ''; needed: what the subject is, as 'dog' or 'coffee mug'")
    if not noun.isprintable() or noun != noun.strip() or "{" in noun or "}" in noun:
        raise SubjectError(f"class noun '{shown(noun)}' holds a control character, brace or outer space; needed: plain words")
    if len(noun) > 100:
        raise SubjectError(f"class noun '{shown(noun[:20])}...' has {len(noun)} characters; at most 100")


def _check_template(template: str, *, needs: str) -> None:
    for name in re.findall(r"\{([^{}]*)\}", template):
        if name not in PLACEHOLDERS:
            allowed = ", ".join(f"{{{word}}}" for word in PLACEHOLDERS)
            raise SubjectError(f"template {shown(template)!r}: unknown placeholder {{{shown(name)}}}; allowed: {allowed}")
    if f"{{{needs}}}" not in template:
        raise SubjectError(f"template {shown(template)!r} lacks {{{needs}}}; write it where the word shall stand")
    if not template.isprintable():
        raise SubjectError(f"template {shown(template)!r} holds a control character; needed: one line of text")


# --- is the token free? ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenReport:
    """What the base's tokenizer makes of a token."""

    token: str
    pieces: tuple[str, ...]  # as the tokenizer writes them; the last ends with </w>
    problems: tuple[str, ...]  # each stops: another token is needed
    warnings: tuple[str, ...] = ()  # each is told: the token works, with a drawback

    @property
    def ok(self) -> bool:
        """Nothing stops; there may be warnings."""
        return not self.problems


def check_token(token: str, tokenizer: Tokenizer, *, known_rare: Collection[str] = ()) -> TokenReport:
    """Judge a token by the vocabulary of the base.

    A CLIP vocabulary is ordered by how often its pieces were seen. Whatever earned a piece of its own with five
    letters or more is a word (or a hashtag); so is a short one, unless it stands near the end.
    `known_rare` are tokens that the base is known never to have been taught: nothing is held against them. A base that
    has such a list has a closed vocabulary, in which every other whole word was taught.
    Raises SubjectError if the token is no word at all (empty, with spaces or control characters).
    """
    _check_token_text(token)
    word = token.lower()  # CLIP reads lower case only
    pieces = tuple(tokenizer.tokenize(token))
    if word in known_rare:
        return TokenReport(token, pieces, ())
    vocabulary = tokenizer.get_vocab()
    problems: list[str] = []
    warnings: list[str] = []
    if not pieces or any(piece not in vocabulary or piece.startswith("<|") for piece in pieces):
        problems.append("it has characters that the base cannot read")
    elif len(pieces) > MAX_PIECES:
        problems.append(f"it falls into {len(pieces)} pieces ({_plain(pieces)}); at most {MAX_PIECES}, one is best")
    elif len(pieces) == 1:
        if known_rare or _is_known_word(word, vocabulary):
            problems.append("the base knows it as a word and has pictures for it")
        elif word.isalpha() and _reads_like_a_word(word):
            warnings.append("it reads like a word; if the base knows it, its meaning will show")
    else:
        parts = [piece.removesuffix(END) for piece in pieces]
        known = [part for part in parts if len(part) >= 3 and _is_known_word(part, vocabulary)]
        if known:
            warnings.append(f"it holds what the base knows as a word ({', '.join(map(shown, known))}), which may show")
        elif word.isalpha() and len(word) >= 5 and _reads_like_a_word(word):
            warnings.append("it reads like a word or a name; if the base knows it, its meaning will show")
        if all(len(part) == 1 for part in parts):
            warnings.append("the base spells it letter by letter, as it does with much other text; one piece is better")
    if word == "sks":
        warnings.append("SKS is a rifle, and bases have pictures of it; any other rare token is better")
    if word in FIRST_NAMES or word in ARTISTS:
        warnings.append("it is a person's name; the base links it to people's pictures or style")
    elif _looks_like_a_name(token):
        warnings.append("it looks like a person's name; train on a person only with their consent, and take a rare token")
    if word != token:
        warnings.append(f"the base reads lower case only: {token} and {word} are the same to it")
    return TokenReport(token, pieces, tuple(problems), tuple(warnings))


def propose_tokens(tokenizer: Tokenizer, count: int = 8, *, known_rare: Collection[str] = (), seed: int = 0) -> list[str]:
    """At most `count` tokens of three or four letters that are one rare piece each; the same for the same seed.

    With `known_rare` the proposals are those of it that are one piece. Otherwise they come from the last tenth of the
    vocabulary, without what can be pronounced, names and abbreviations that everybody knows.
    Raises SubjectError if the vocabulary has none.
    """
    vocabulary = tokenizer.get_vocab()
    pool = sorted({word for word in known_rare if word + END in vocabulary})
    if not known_rare:
        first = RARE_SHARE * len(vocabulary)
        rare = sorted((number, piece.removesuffix(END)) for piece, number in vocabulary.items() if piece.endswith(END))
        pool = [word for number, word in rare if number >= first and _is_proposable(word)]
    if not pool:
        raise SubjectError("the base's vocabulary has no rare token to propose; pass one of your own, as 'ohwx'")
    return random.Random(seed).sample(pool, min(count, len(pool)))


def _plain(pieces: Sequence[str]) -> str:
    return ", ".join(shown(piece.removesuffix(END)) for piece in pieces)


def _is_known_word(word: str, vocabulary: Mapping[str, int]) -> bool:
    """A whole word of its own in the vocabulary, and not one of the short leftovers at its end."""
    number = vocabulary.get(word + END)
    if number is None or not word.isalpha():
        return False
    return len(word) >= 5 or (len(word) >= 2 and number < COMMON_SHARE * len(vocabulary))


def _reads_like_a_word(word: str) -> bool:
    """It can be pronounced: it has a vowel and never three consonants in a row."""
    return bool(re.search(f"[{VOWELS}]", word)) and not re.search(f"[^{VOWELS}]{{3}}", word)


def _looks_like_a_name(token: str) -> bool:
    """First and last name in one word: JohnSmith, john_smith, john-smith, gregrutkowski.

    Told by two capitalised parts, or by a usual first name or artist's surname among the parts. A name of one part, of
    another script or not in the lists is not told, and a brand as TealCup is told: it is a hint, not a check.
    """
    parts = [part for part in re.split(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])", token) if len(part) > 1]
    if len(parts) == 1:
        word = parts[0].lower()
        return any(word.endswith(name) and word.removesuffix(name) in FIRST_NAMES for name in ARTISTS)
    capitalised = sum(part[0].isupper() and part[1:].islower() and len(part) > 2 for part in parts)
    return capitalised > 1 or any(part.lower() in FIRST_NAMES | ARTISTS for part in parts)


def _is_proposable(word: str) -> bool:
    return (
        re.fullmatch("[a-z]{3,4}", word) is not None
        and not _reads_like_a_word(word)
        and len(set(word)) > 2  # not "kkk", "hmmm"
        and word not in FIRST_NAMES | ARTISTS | MEANINGFUL
    )


# Abbreviations, slurs and leftovers of words that stand among the rare pieces of CLIP's vocabulary.
MEANINGFUL = frozenset(
    """sks asvp ddos gmbh hgtv cnet jpeg jpg png gif rgb mbps kpmg html http https www wtf stfu fck fcks kkk kkkk wnba nwsl
    nasl ncaa espn uefa nato msnbc rspb spca pkwy blvd dept govt mtgs natl intl corp assn acct capt sgt cmdr phd mph kph
    bbc cnn nbc cbs abc ibm amd bmw usb dvd dvds cds pcs tvs lbj jfk mlk fbi cia kgb ufo ufos hiv bdsm klan thx pls plz
    omg lol rofl lmao smh tbh idk btw btch hoes lgbt nsfw milf jap snp gop tory nhs nypd lapd mlas dsd isis isil nra
    ffxv dbz gta mmo rpg rpgs dnd atm atms amex nyse ftse bnp hsbc clg ltd inc llc apk ios mac xbox wwii wwi jpn usa uk
    dprk irgc ncbd hpv hsv khz kgs mds mgs nrf nhc cfd tls wwdc qtr btn tbd dmx mlg rcb rmb pkg httr hmv chk svc rps appt stg
    hmm hmmm grr grrr brr shh shhh psst pfft tsk yrs hrs mins secs lbs dont wont cant isnt wasnt didnt""".split()
)

# The most usual given names of English-speaking countries and some from elsewhere; a compact list, not a complete one.
FIRST_NAMES = frozenset(
    """aaron abby adam adele ahmed aisha alan albert alex alexander alexandra alice amanda amelia amir amy ana andrea andrew
    angela anita ann anna anne anthony antonio aria arthur ashley ava barbara ben benjamin beth betty bill bob brandon brenda
    brian bruce bryan camila carl carlos carol caroline carter catherine charles charlie charlotte chen chloe chris christina
    christine christopher claire clara claudia cynthia dan daniel danielle david deborah denise dennis diana diego dmitri
    donald donna dorothy doug dylan ed edward elena eli elijah elizabeth ella ellen emily emma eric erik ethan eva evan
    evelyn fatima felix fiona frances francis frank fred gary gemma george gerald giovanni giulia grace greg gregory hannah
    hans harold harry hassan heather helen henry hugo ian ibrahim igor ingrid irene isaac isabella ivan jack jackson jacob
    jake james jamie jane janet jason javier jean jeff jennifer jenny jeremy jerry jesse jessica jim joan joe john johnny
    jon jonathan jordan jorge jose joseph joshua joyce juan judith judy julia julie julio justin karen karl kate katherine
    katie keith kelly ken kenneth kevin kim klaus kyle larry laura lauren leah lee leo leon leonardo liam lily linda lisa
    logan louis lucas lucia lucy luis luke luna maria marie mario mark martha martin mary mason mateo matt matthew max maya
    megan mei melissa mia michael michelle miguel mike mila mohammad mohammed monica muhammad nancy natalie nathan neha nick
    nicholas nicole nina noah nora oliver olivia olga omar oscar owen pamela patricia patrick paul paula pedro peter philip
    pierre priya rachel raj ralph raymond rebecca richard rita robert roger ron rosa rose roy russell ruth ryan sam samantha
    samuel sandra sara sarah scott sean sebastian sergei sharon sofia sophia sophie stella stephanie stephen steve steven
    sue susan svetlana tara taylor teresa theo theresa thomas tim timothy tina todd tom tony tyler vanessa victor victoria
    vincent violet walter wei wendy william wyatt xavier yan yuki yusuf zach zara zoe""".split()
)

# Surnames of artists that are often used as a style; the harm that started the debate was such a name as a token.
ARTISTS = frozenset(
    """artgerm banksy beksinski botticelli caravaggio cezanne chagall dali degas disney durer escher frazetta gaudi gauguin
    giger gogh goya hokusai hopper kahlo kandinsky kinkade klimt leonardo magritte manet matisse michelangelo miyazaki monet
    moebius mondrian mucha munch picasso pollock raphael rembrandt renoir rothko rubens rutkowski titian turner vangogh
    vermeer warhol""".split()
)
