"""Subject: photos, token and class noun, and the prompts that they make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import PhotoShape, check_types, typed
from ..errors import SubjectError, counted, shown
from ..photos.audit import Audit, audit_photos
from ..photos.captioning import Captioner
from ..photos.cropping import Cropping
from ..photos.finding import find_photos
from ..photos.masks import MaskSource, Segmenter
from ..photos.photo import CropRegion, Photo, PhotoSet, Skipped
from .tokens import ARTICLE_TEMPLATE, SYNTAX, check_token_text
from .wording import article, subject_pattern, with_article

INSTANCE_TEMPLATE = "a photo of {token} {class_noun}"
CLASS_TEMPLATE = "a photo of {a} {class_noun}"  # {a}: "a" or "an", by the class noun's sound
NOT_A_NOUN = re.compile(  # "a dog", "a photo of my dog": a prompt has these words already
    r"^((an?|the|my|your|his|her|our|their|this|that|some)\s+|"
    r"(photo(graph)?|picture|image|painting|drawing|render(ing)?|portrait)s?\s+of\s+)+",
    re.IGNORECASE,
)
PLACEHOLDERS = ("token", "class_noun", "a")
MOST_CLASS_IMAGES = 2000  # of your own; chosen


@dataclass(frozen=True)
class Subject:
    """A subject to teach: its photos, the token that stands for it, and the class it belongs to."""

    photos: tuple[Photo, ...]
    token: str
    class_noun: str  # what the base knows it as: "dog", "coffee mug"
    templates: tuple[str, ...] = (INSTANCE_TEMPLATE,)  # cycled over the photos
    class_template: str = CLASS_TEMPLATE
    skipped: tuple[Skipped, ...] = field(default=(), compare=False)  # unused files, for reports only
    class_images: tuple[Photo, ...] = ()  # your own, of the plain class; none: the base keeps it

    def __post_init__(self) -> None:
        check_types(self)
        if not self.photos:
            raise SubjectError("the subject has no photos; pass at least one (5 to 30 teach a subject best)")
        check_words(self.token, self.class_noun)
        if not self.templates:
            raise SubjectError(f"templates {self.templates!r}; needed: a tuple of at least one template")
        for template in self.templates:
            _check_template(template, needs="token")
        both = {photo.sha256 for photo in self.photos} & {image.sha256 for image in self.class_images}
        if both:
            raise SubjectError(
                f"{counted(len(both), 'photo')} of the subject among the class images; pass other pictures of the class"
            )
        _check_template(self.class_template, needs="class_noun")
        if "{token}" in self.class_template:
            raise SubjectError(f"class template {shown(self.class_template)!r} names the token; leave it out")

    def __repr__(self) -> str:
        """Without the paths of the photos."""
        masks = sum(photo.mask is not None for photo in self.photos)
        counts = {"with masks": masks, "class images": len(self.class_images), "files skipped": len(self.skipped)}
        more = "".join(f", {count} {what}" for what, count in counts.items() if count)
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
        crops: Mapping[str, CropRegion] | None = None,
        masks: Mapping[str, MaskSource] | Segmenter | Literal["auto"] | None = None,
        captioner: Captioner | None = None,
        class_images: Path | str | Sequence[Path | str] | None = None,
    ) -> Subject:
        """The subject of a folder of photos, or of a list of files.

        minimum, maximum  usable photos needed, and accepted
        templates         prompts with {token}, and perhaps {class_noun} or {a} ("a" or "an"), in turn over the photos
        class_template    the prompt of the plain class, with {class_noun}
        crop              "smart": around the subject, without black bars; "center": in the middle
        crops             file name -> (x0, y0, x1, y1), fractions 0..1 of the upright photo, or pixels if any value is
                          above 1; overrides a `crops.json` in the folder
        masks             file name -> a file or PIL image, white on the subject; overrides `photo.mask.png` files. "auto", or
                          a segmenter as for `make_masks`: photos without a mask get one where the segmenter is sure; "auto" is
                          rembg's U2-Net (lora-booth[masks])
        captioner         gets each photo without a caption (photo.txt) as an upright RGB picture and returns one, e.g.
                          caption_model()
        class_images      your own pictures of the plain class, a folder or files, cropped as photos; None: the base's
                          predictions keep the class. A caption (photo.txt) replaces the class prompt
        raises            SubjectError, PhotoError
        """
        check_words(token, class_noun)  # before the photos are decoded, so that a typo shows at once
        templates = typed("templates", templates, tuple[str, ...])
        found: PhotoSet = find_photos(
            folder, crop=crop, crops=crops, masks=masks, captioner=captioner, minimum=minimum, maximum=maximum
        )
        own: PhotoSet | None = None
        if class_images is not None:
            own = find_photos(class_images, crop=crop, minimum=1, maximum=MOST_CLASS_IMAGES)
        skipped = found.skipped + (own.skipped if own else ())
        return cls(found.photos, token, class_noun, tuple(templates), class_template, skipped, own.photos if own else ())

    def audit(self, *, resolution: int = 512, shape: PhotoShape = "square") -> Audit:
        """What the photos will teach, and what to change. This is advice: nothing in it stops training.

        resolution, shape  as in the TrainingConfig
        Raises PhotoError if a photo is gone or changed since it was found.
        """
        return audit_photos(self.photos, self.skipped, resolution=resolution, shape=shape)

    @property
    def instance_prompt(self) -> str:
        """The prompt of the first template: "a photo of ohwx dog"."""
        return self._filled(self.templates[0])

    @property
    def card_prompt(self) -> str:
        """The prompt that an adapter's card suggests: only token and class noun, never your templates or captions."""
        known = self.templates[0] in (INSTANCE_TEMPLATE, ARTICLE_TEMPLATE)
        return self.instance_prompt if known else f"{self.token} {self.class_noun}"

    @property
    def class_prompt(self) -> str:
        """The prompt of the plain class (prior preservation): "a photo of a dog"."""
        return self._filled(self.class_template)

    def prompt_for(self, photo: Photo) -> str:
        """The prompt that `photo` is trained with.

        Without a caption: the templates in turn, by the photo's place in `photos`. A caption (photo.txt) replaces them,
        and always gets the token:
          "{token}" (and "{class_noun}", "{a}") are filled in;         "{token} {class_noun} asleep" -> "ohwx dog asleep"
          a caption that already has the token is left unchanged;      "my ohwx dog" -> "my ohwx dog"
          else the first class noun becomes "token class_noun";        "my dog on grass" -> "my ohwx dog on grass"
          without a class noun, the instance prompt comes first.       "on grass" -> "a photo of ohwx dog, on grass"
        """
        if photo.caption is None:
            place = self.photos.index(photo) if photo in self.photos else 0
            return self._filled(self.templates[place % len(self.templates)])
        caption = self._filled(photo.caption)
        if re.search(subject_pattern(self.token, None), caption, re.IGNORECASE):
            return caption
        both = f"{self.token} {self.class_noun}"
        renamed, count = re.subn(subject_pattern(self.class_noun, None), lambda _: both, caption, count=1, flags=re.IGNORECASE)
        return renamed if count else f"{self.instance_prompt}, {caption}"

    def class_prompt_for(self, picture: Photo) -> str:
        """The prompt that one of your own class images is trained with: its caption, or the class prompt."""
        return self.class_prompt if picture.caption is None else self._filled(picture.caption)

    def _filled(self, template: str) -> str:
        words = {"token": self.token, "class_noun": self.class_noun, "a": article(self.class_noun)}
        # Not str.format: a caption may hold any braces, and "{token.__class__}" must not be evaluated.
        return re.sub(r"\{(token|class_noun|a)\}", lambda match: words[match[1]], template)


def check_words(token: str, class_noun: str) -> None:
    """Raises SubjectError for words that cannot stand for a subject, by themselves or together."""
    check_token_text(token)
    noun = typed("class_noun", class_noun, str)
    if noun.strip() != noun or not 0 < len(noun) <= 100 or not noun.isprintable() or any(c in SYNTAX for c in noun):
        wanted = "what the subject is, in plain words without punctuation, at most 100 characters"
        raise SubjectError(f"class noun '{shown(noun[:110])}'; needed: {wanted}, e.g. 'dog' or 'coffee mug'")
    if (plain := NOT_A_NOUN.sub("", noun)) != noun:
        raise SubjectError(f"class noun {noun!r} is more than a noun; prompts have the other words already: pass {plain!r}")
    if re.search(subject_pattern(token, None), noun, re.IGNORECASE):
        remedy = "pass only what the subject is, e.g. 'dog', and a rare token"
        raise SubjectError(f"class noun {noun!r} has the token {token!r} in it; {remedy}")


def _check_template(template: str, *, needs: str) -> None:
    for name in re.findall(r"\{([^{}]*)\}", template):
        if name not in PLACEHOLDERS:
            allowed = ", ".join(f"{{{word}}}" for word in PLACEHOLDERS)
            raise SubjectError(f"template {shown(template)!r}: unknown placeholder {{{shown(name)}}}; allowed: {allowed}")
    if f"{{{needs}}}" not in template:
        raise SubjectError(f"template {shown(template)!r} lacks {{{needs}}}; add it where the word belongs")
    if not template.isprintable():
        raise SubjectError(f"template {shown(template)!r} has a control character; needed: one line of text")
