"""What can go wrong on the user's side. Each message gives the cause, the value and the remedy in one line.

LoraBoothError
├── PhotoError            photos that cannot be used, or too few
├── SubjectError          a token, class noun, caption or prompt template
├── BaseModelError        a base model that cannot be found, read or recognised
├── SettingsError         a setting out of range, or two that exclude each other
│   └── DoesNotFit        a training that this machine's memory cannot hold (planning/planning.py)
├── TrainingError         training that cannot start or had to stop
├── EvaluationError       adapters that cannot be scored
├── MissingExtraError     an optional package is needed
└── AdapterError          an adapter file that cannot be read, trusted or used
    ├── AdapterFormatError, UnsafeFormat, UnsafePath, AdapterTooLarge       before its tensors are read
    ├── AdapterDtypeError, AdapterNonFinite, AdapterScaleError              the values of its tensors
    └── AdapterIncomplete, AdapterTargetError, AdapterBaseMismatch          what they are for
"""

import re
from collections.abc import Sequence
from contextvars import ContextVar

in_command: ContextVar[bool] = ContextVar("in_command", default=False)  # set by the command line


def setting(argument: str, value: object = None, *, option: str | None = None) -> str:
    """How a message names a setting: as an argument in Python, as an option within a command.

    setting("rank", 8)                                rank=8, or --rank 8
    setting("minimum", 1, option="--min-photos 1")    where the option has another name
    """
    if in_command.get():
        words = "" if value is None or value is True else f" {value}"
        return option or f"--{argument.replace('_', '-')}{words}"
    text = f'"{value}"' if isinstance(value, str) else value
    return argument if value is None else f"{argument}={text}"


def same_again() -> str:
    return f"run the same {'command' if in_command.get() else 'call'} again"


def one_line(text: str, most: int = 2000) -> str:
    """At most `most` characters, without what a terminal would obey: line ends, escape codes, direction marks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:most]).split())


def shown(name: object) -> str:
    """`name` safe to print: line breaks, escape codes, direction marks and stray bytes become backslash escapes."""

    def escaped(character: str) -> str:
        if character.isprintable():
            return character
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:  # how Python represents a byte of a file name that is not UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return character.encode("unicode_escape").decode("ascii")

    return "".join(escaped(character) for character in str(name))


def counted(count: int, noun: str) -> str:
    """ "1 photo", "2 photos"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """ "a, b and 3 more", with at most so many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class LoraBoothError(Exception):
    """The root: anything a user can fix. The command line prints it as one line and exits with 2.

    A message may quote an untrusted file or a prompt: what a terminal would obey is escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))


class PhotoError(LoraBoothError):
    """Photos that cannot be used, or too few of them."""


class SubjectError(LoraBoothError):
    """A token, class noun, caption or prompt template that cannot work."""


class BaseModelError(LoraBoothError):
    """A base model that cannot be found, read or recognised."""


class SettingsError(LoraBoothError):
    """A setting out of its range, or two settings that exclude each other."""


class TrainingError(LoraBoothError):
    """Training that cannot start or had to stop."""


class EvaluationError(LoraBoothError):
    """Adapters that cannot be scored, or not by the same measure."""


class MissingExtraError(LoraBoothError):
    """An optional package is needed; the message gives the pip command."""

    def __init__(self, what: str, extra: str | None = None) -> None:  # None: `what` is the message, of a pickle
        super().__init__(what if extra is None else f"{what} needs an optional package; pip install 'lora-booth[{extra}]'")


class AdapterError(LoraBoothError):
    """An adapter file that cannot be read, trusted or used. `path` is the file, if there is one."""

    def __init__(self, message: str, path: object = None) -> None:
        super().__init__(f"{path}: {message}" if path is not None else message)
        self.path = path


class AdapterFormatError(AdapterError):
    """Not a well-formed safetensors file."""


class UnsafeFormat(AdapterError):
    """A pickle (.bin, .pt, .ckpt), which is never read: loading one can run any code."""


class UnsafePath(AdapterError):
    """A link inside an adapter's folder that leads out of it."""


class AdapterTooLarge(AdapterError):
    """More tensors, metadata, rank or bytes than an adapter can have."""


class AdapterDtypeError(AdapterError):
    """A tensor that is not F16, BF16 or F32."""


class AdapterNonFinite(AdapterError):
    """NaN, infinite or absurdly large values."""


class AdapterScaleError(AdapterError):
    """An alpha that is not finite, or far from its rank."""


class AdapterIncomplete(AdapterError):
    """Half of a pair is missing, or its two halves do not fit together."""


class AdapterTargetError(AdapterError):
    """A key of a module that adapters do not change, or that is not recognised."""


class AdapterBaseMismatch(AdapterError):
    """Made for another base model."""


class OtherBaseWarning(UserWarning):
    """The adapter fits this base, but was trained on another one of its family: results may look different."""


class LeftOutWarning(UserWarning):
    """Something in an adapter's file was not read."""


class CompositionWarning(UserWarning):
    """Adapters that will blend in one picture; see `Composition.preflight`."""


def reason_of(error: BaseException) -> str:
    """What another library's error says, short enough to quote, in one line: its own first line is often a mere heading."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # colours
    return shown(" ".join(plain.split())[:300]) or type(error).__name__
