"""Every example of README.md and docs/ is run as it stands: what a reader copies works.

```python blocks of one file run in order in one namespace, in a folder with photos/rex, as a reader would work through
the page. In ```bash blocks the lines that begin with `lora-booth` are run. A block is left out only by a comment on the
line before it, with the reason: <!-- not run: needs a GPU -->
"""

from __future__ import annotations

import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_booth import cli

ROOT = Path(__file__).parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.is_file()]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[A-Za-z]*)(?P<rest>.*)$")
NOT_RUN = re.compile(r"^\s*<!-- *not run:(?P<reason>.*?)-->\s*$")
CONTINUED = re.compile(r"\\\s*\n\s*")
# shell lines that are not run
NOT_OURS = ("pip", "python -m venv", "pytest", "git", "cd", "source", ".", "ruff", "mypy", "ray start", "#")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of the first line of code, from 1
    language: str
    code: str
    not_run: str | None  # the reason; None: it is run

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    blocks, start, opening, reason = [], 0, None, None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if opening is None and fence:
            opening, start = fence, number + 1
            exempt = NOT_RUN.match(lines[number - 1]) if number else None
            reason = exempt["reason"].strip() if exempt else None
        elif opening is not None and fence and not fence["language"]:
            body = [one.removeprefix(opening["indent"]) for one in lines[start:number]]
            blocks.append(Block(page, start + 1, opening["language"], "\n".join(body), reason))
            opening = None
    assert opening is None, f"{page.name}:{start}: this block is never closed"
    return blocks


ALL = [block for page in PAGES for block in blocks_of(page)]
RUN = {page: [b for b in blocks_of(page) if b.language in ("python", "bash") and b.not_run is None] for page in PAGES}


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """The reader's folder: photos/rex with five photos. Class images and samples are drawn in few denoising steps."""
    from lora_booth.cli.demo import write_photos
    from lora_booth.training import class_images, samples

    monkeypatch.setattr(class_images, "CLASS_IMAGE_STEPS", 2)
    monkeypatch.setattr(samples, "SAMPLE_STEPS", 2)
    write_photos("rex", tmp_path / "photos" / "rex")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(block: Block, names: dict[str, object]) -> None:
    # blank lines before the code, so that a traceback shows the line of the page
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
    try:
        exec(code, names)
    except Exception as error:
        trace, line = error.__traceback__, block.line
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(block.page):
                line = trace.tb_lineno
            trace = trace.tb_next
        pytest.fail(f"{block.page}:{line}: {type(error).__name__}: {error}", pytrace=False)


def commands_of(block: Block) -> list[tuple[int, list[str]]]:
    """(line of the page, words) of every lora-booth command; a backslash at the end of a line continues it."""
    found, number = [], block.line
    for line in CONTINUED.sub(lambda match: "\0" * match[0].count("\n"), block.code).split("\n"):
        words = shlex.split(line.replace("\0", " "), comments=True)
        if words[:1] == ["lora-booth"]:
            found.append((number, words[1:]))
        number += 1 + line.count("\0")
    return found


def run_bash(block: Block) -> None:
    for number, words in commands_of(block):
        try:
            cli.main(words)
        except SystemExit as left:
            if left.code:
                pytest.fail(f"{block.page}:{number}: lora-booth {shlex.join(words)} left with {left.code}", pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if RUN[p]], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_example_runs(page, desk):
    names: dict[str, object] = {"__name__": "__main__"}
    for block in RUN[page]:
        if block.language == "python":
            run_python(block, names)
        else:
            run_bash(block)
    assert Path.cwd() == desk


def test_the_readme_is_among_them():
    assert PAGES[0].name == "README.md" and RUN[PAGES[0]]


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=lambda block: block.place)
def test_python_examples_parse(block):
    """Also those that are not run."""
    compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "bash"], ids=lambda block: block.place)
def test_shell_examples_name_real_commands_and_options(block):
    known = {command.name or command.callback.__name__: command.callback for command in cli.app.registered_commands}
    for number, words in commands_of(block):
        assert not words or words[0].startswith("-") or words[0] in known, f"{block.page}:{number}: no command {words[0]}"
        for word in words[1:]:
            if word.startswith("--") and word != "--help":
                option = word[2:].partition("=")[0].removeprefix("no-").replace("-", "_")
                assert option in known[words[0]].__annotations__, f"{block.page}:{number}: no option {word}"


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "bash"], ids=lambda block: block.place)
def test_no_shell_line_is_left_out_by_accident(block):
    """A line is a lora-booth command, the continuation of one, or known as not ours to run."""
    for line in CONTINUED.sub(" ", block.code).split("\n"):
        words = line.strip()
        ours = words.startswith("lora-booth") or words.startswith(NOT_OURS) or re.match(r"python (docs|benchmarks|-m)", words)
        assert not words or ours, f"{block.place}: {words!r}"


def test_every_exemption_has_a_reason_and_a_block():
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if "not run:" in line and "<!--" in line:
                match = NOT_RUN.match(line)
                assert match and len(match["reason"].split()) >= 2, f"{page}:{number}: say why it is not run"
                following = lines[number] if number < len(lines) else ""
                assert FENCE.match(following), f"{page}:{number}: no block follows"


# --- the site --------------------------------------------------------------------------------------------------------


def test_the_reference_says_what_the_docstrings_say():
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["page"]()
    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert written == made, "run: python docs/make_reference.py"


def test_every_page_is_on_the_site_once():
    listed = re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page}: {target}"


# --- the reading of pages itself -----------------------------------------------------------------------------------

SAMPLE = """# Title

```python
first = 1
```
<!-- not run: needs a GPU -->
```python
raise SystemExit
```

- indented:

  ```bash
  pip install lora-booth
  lora-booth generate a.safetensors \\
    --prompt "a photo"   # a remark
  lora-booth show a.safetensors
  ```

```text
lora-booth nonsense
```
"""


def test_blocks_are_found():
    blocks = blocks_of(Path("sample.md"), SAMPLE)
    assert [(b.line, b.language, b.not_run) for b in blocks] == [
        *((4, "python", None), (8, "python", "needs a GPU"), (14, "bash", None), (21, "text", None)),
    ]
    assert commands_of(blocks[2]) == [
        (15, ["generate", "a.safetensors", "--prompt", "a photo"]),
        (17, ["show", "a.safetensors"]),
    ]


def test_a_failing_example_is_told_by_page_and_line():
    block = Block(Path("sample.md"), 7, "python", "x = 1\n\ny = x / 0", None)
    with pytest.raises(pytest.fail.Exception, match=r"sample\.md:9: ZeroDivisionError"):
        run_python(block, {})
    block = Block(Path("sample.md"), 7, "bash", "\nlora-booth show nothing.safetensors", None)
    with pytest.raises(pytest.fail.Exception, match=r"sample\.md:8: .* left with 2"):
        run_bash(block)


def test_an_unclosed_block_is_an_error():
    with pytest.raises(AssertionError, match="never closed"):
        blocks_of(Path("sample.md"), "```python\nx = 1\n")
