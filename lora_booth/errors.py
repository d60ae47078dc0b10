"""What can go wrong on the user's side. Every message says the cause, the value and the remedy, in one line."""


def shown(name: object) -> str:
    """`name` safe to print: line breaks, escape codes, direction marks and stray bytes become backslash escapes."""

    def escaped(character: str) -> str:
        if character.isprintable():
            return character
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is not UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return character.encode("unicode_escape").decode("ascii")

    return "".join(escaped(character) for character in str(name))


class LoraBoothError(Exception):
    """The root: anything that a user can mend. The command line prints it as one line and exits with 2."""


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
    """Adapters that cannot be scored: nothing to score them with, or not by one measure."""


class MissingExtraError(LoraBoothError):
    """An optional package is needed; the message names the pip command."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package; pip install 'lora-booth[{extra}]'")


class AdapterError(LoraBoothError):
    """An adapter file that cannot be read, trusted or used. `path` is the file, if there is one."""

    def __init__(self, message: str, path: object = None) -> None:
        super().__init__(shown(f"{path}: {message}" if path is not None else message))
        self.path = path


class AdapterFormatError(AdapterError):
    """Not a well-formed safetensors file."""


class UnsafeFormat(AdapterError):
    """A pickle (.bin, .pt, .ckpt): reading it could run its code, so it is never read."""


class UnsafePath(AdapterError):
    """A link inside an adapter's folder that leads out of it."""


class AdapterTooLarge(AdapterError):
    """More tensors, metadata, rank or bytes than an adapter has."""


class AdapterDtypeError(AdapterError):
    """A tensor that is not F16, BF16 or F32."""


class AdapterNonFinite(AdapterError):
    """NaN, infinite or absurdly large values."""


class AdapterScaleError(AdapterError):
    """An alpha that is not finite or far from its rank."""


class AdapterIncomplete(AdapterError):
    """Half of a pair is missing, or the two halves do not fit together."""


class AdapterTargetError(AdapterError):
    """A key for a module that adapters do not change, or that cannot be understood."""


class AdapterBaseMismatch(AdapterError):
    """Made for another base model."""


class OtherBaseWarning(UserWarning):
    """The adapter fits this base, but was trained on another one of the same family: it may look different."""


class CompositionWarning(UserWarning):
    """Adapters that will not stay apart in one picture; `Composition.preflight` says more."""


def first_line(error: BaseException) -> str:
    """What another library said, short enough to quote in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
