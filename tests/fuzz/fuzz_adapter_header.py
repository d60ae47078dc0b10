"""Fuzz the reader of adapter files: its header, its keys, the configuration and card in it, and the tensors themselves.

python tests/fuzz/fuzz_adapter_header.py -runs=20000              with atheris (pip install 'lora-booth[fuzz]')
python tests/fuzz/fuzz_adapter_header.py --without-atheris 20000  the same target on the corpus and mutants of it

The input is the whole file. A finding is any exception but AdapterError, or an adapter beyond the limits.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules

try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None and __name__ == "__main__":
    with atheris.instrument_imports(include=["lora_booth.adapters", "lora_booth.base.weight_files"]):
        from lora_booth.adapters import contents, layouts, lycoris, metadata, reading  # noqa: F401
        from lora_booth.base import weight_files  # noqa: F401
from adapter_judge import beyond  # noqa: E402
from spoilt import byte, mutants  # noqa: E402

from lora_booth.adapters import reading  # noqa: E402, F811
from lora_booth.errors import AdapterError  # noqa: E402

NAME = Path("fuzzed.safetensors")


def try_one(content: bytes) -> bool:
    """Whether it is loaded rather than refused."""
    try:
        adapter = reading.read(io.BufferedReader(io.BytesIO(content)), len(content), NAME)  # type: ignore[arg-type]
    except AdapterError as error:
        assert str(error).isprintable(), ascii(str(error))
        return False
    assert adapter.modules
    faults = list(beyond(adapter))
    assert not faults, faults
    return True


def test_one(content: bytes) -> None:
    try_one(content)


def seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(CORPUS.iterdir())]


def run_without_atheris(count: int, seed: int = 0) -> int:
    """The corpus, then `count` mutants of it, and mutants of those: how many inputs were tried."""
    corpus = seeds()
    good = [content for content in corpus if try_one(content)]
    rng = random.Random(seed)
    for i, content in enumerate(mutants(good, count=count, seed=seed)):
        test_one(byte(content, rng) if i % 2 and content else content)
    return len(corpus) + count


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--without-atheris"] or atheris is None:
        counts = [a.removeprefix("-runs=") for a in arguments if a.removeprefix("-runs=").isdigit()]
        print(f"{run_without_atheris(int(counts[0]) if counts else 20_000)} inputs without atheris, no finding")
        return
    found = tempfile.mkdtemp(prefix="fuzz_adapter_header_")  # new inputs go into the first folder
    atheris.Setup([sys.argv[0], *arguments, found, str(CORPUS)], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
