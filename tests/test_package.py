"""The package as a whole: what importing it costs, what it promises, which way its imports go."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_booth

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_booth"
HEAVY = ("torch", "diffusers", "transformers", "peft", "numpy", "PIL", "safetensors")
TEXT = (".py", ".md", ".toml", ".json", ".txt", ".yml", ".yaml", ".cfg", ".html", ".css", ".js")


def python(code: str) -> str:
    """The output of `code` in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    return python(f"import sys\n{code}\nprint(*[n for n in {names!r} if n in sys.modules])").split()


def test_importing_it_imports_nothing_heavy():
    assert loaded("import lora_booth", (*HEAVY, "typer", "rich")) == []
    more = python("import sys; before = len(sys.modules); import lora_booth; print(len(sys.modules) - before)")
    assert int(more) < 30  # modules; torch alone brings over a thousand


@pytest.mark.slow
def test_loading_says_nothing_and_names_say_who_they_are(photos: Path):
    """No bar, no advice of other libraries; and at the end of a notebook's cell no screenful of numbers, and no path."""
    code = f"""
import lora_booth as lb
from diffusers.utils.logging import is_progress_bar_enabled
base = lb.BaseModel.load("toybox", device="cpu")
rex = lb.Subject.from_folder({str(photos)!r}, token="sks", class_noun="otter", minimum=1)
config = lb.TrainingConfig(steps=1, prior_loss_weight=0)
steps = lb.training_steps(base, lb.prepare(base, [rex], lora=lb.LoraSpec(), config=config), config=config)
factors = next(steps).factors()
steps.close()
adapter = lb.Adapter(factors, lb.Card(token="sks", base_model="toybox"))
weighted = [(adapter, 0.5)]
print(base, rex, repr(rex.audit()), adapter, next(iter(factors.values())), lb.Composition(base, weighted), sep="\\n")
assert is_progress_bar_enabled()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = done.stdout.splitlines()
    assert found[0] == "BaseModel('toybox': Stable Diffusion 1.x, float32, cpu)"
    assert re.fullmatch(r"Subject\('sks', an otter: \d+ photos(, \d+ files skipped)?\)", found[1])
    assert found[2].startswith("Audit(") and re.fullmatch(
        r"Adapter\('sks' for toybox: rank 8, 56 modules, 0\.\d MB\)", found[3]
    )
    assert found[4] == "LoraFactors(rank 8, alpha 8, (8, 64) and (64, 8))"
    assert found[5:] == ["Composition(toybox, sum: sks 0.5)"]


def test_light_names_stay_light():
    assert loaded("from lora_booth import LoraSpec, TrainingConfig, LoraBoothError, Card", HEAVY) == []


def test_the_page_of_the_studio_comes_before_diffusers():
    pytest.importorskip("gradio")
    assert loaded("import lora_booth.studio.page", ("gradio", "diffusers")) == ["gradio"]


def test_help_imports_no_model_library():
    code = "from lora_booth.cli import main\nfor words in ([], ['train', '-h']):\n  try: main(words)\n  except SystemExit: pass"
    output = python(f"import sys\n{code}\nprint('loaded:', *[n for n in {HEAVY!r} if n in sys.modules])")
    assert output.splitlines()[-1].strip() == "loaded:"


@pytest.mark.parametrize("name", lora_booth.__all__)
def test_every_public_name_is_there(name):
    assert getattr(lora_booth, name) is not None
    assert name in dir(lora_booth)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = lora_booth.trian


def test_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    checked = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked == lora_booth._HOMES


@pytest.mark.slow
def test_training_imports_neither_report_nor_composition(photos: Path):
    code = f"""
import lora_booth as lb
subject = lb.Subject.from_folder({str(photos)!r}, token="zwx", class_noun="dog")
config = lb.TrainingConfig(steps=1, prior_loss_weight=0)
lb.train(lb.BaseModel.load("toybox"), subject, config=config, progress=False)
"""
    assert loaded(code, ("lora_booth.report.report", "lora_booth.pictures.composition")) == []  # jinja2 comes with transformers


# --- the way of the imports ----------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that this one imports: also within functions and for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (parent, node.module or "") if part)
            for alias in node.names:
                found.add(inner if (inner := f"{source}.{alias.name}") in known else source)
    return (found & known.keys()) - {name, "lora_booth"}  # of the package itself: its version


ROOMS = (  # in the order of the way; each imports only from those before it
    *("errors", "files", "cache", "config", "photos", "subject", "toybox", "base", "adapters", "kernels", "injection"),
    *("adapters.tools", "training", "planning", "pictures", "evaluation", "report", "runs", "notebook"),
    *("studio", "serve", "cli"),
)


def room_of(module: str) -> str:
    name = module.removeprefix("lora_booth").strip(".")
    return next(room for room in sorted(ROOMS, key=len, reverse=True) if name == room or name.startswith(f"{room}."))


def test_rooms_import_only_from_rooms_before_them():
    known = modules()
    graph = {name: imports_of(name, path, known) for name, path in known.items() if name != "lora_booth"}
    assert "lora_booth.training.loop" in graph["lora_booth.training.training_run"]  # the reading of imports works
    assert "lora_booth.report.report" in graph["lora_booth.runs.one"]  # also of those within a function
    place = {room: i for i, room in enumerate(ROOMS)}
    backwards = [
        f"{name} -> {other}"
        for name, others in graph.items()
        for other in others
        if place[room_of(other)] > place[room_of(name)]
    ]
    assert not backwards


@pytest.mark.slow
def test_imports_do_not_go_in_a_circle():
    known = modules()
    graph = {name: imports_of(name, path, known) for name, path in known.items() if name != "lora_booth"}

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"imports go in a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*way, name))
            done.add(name)

    done: set[str] = set()
    for name in graph:
        walk(name, ())


def test_few_modules_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 1 + 6  # __init__ and six


# --- what is shipped -----------------------------------------------------------------------------------------------


def test_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_changelog_knows_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?{re.escape(lora_booth.__version__)}\]?", changelog, re.MULTILINE)


def own_files() -> list[Path]:
    """Tracked files, and new ones that git does not ignore; outside a checkout, the sources."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        return [path for folder in (PACKAGE, ROOT / "tests", ROOT / "docs") for path in sorted(folder.rglob("*"))]
    return [ROOT / name for name in listed if name]


def test_no_file_names_a_place_on_our_machines():
    places = ["/" + place + "/" for place in ("root", "work", "home/runner", "tmp/bash_jobs")]
    found = []
    for path in own_files():
        if path.suffix not in TEXT or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if any(re.search(rf"(?<![\w.]){place}", line) for place in places):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert not found
