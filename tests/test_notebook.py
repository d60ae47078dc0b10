"""The notebook runs from top to bottom as it stands, offline, with the values of a trial in its settings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import lora_booth as lb
from lora_booth import notebook
from lora_booth.errors import SettingsError

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "notebooks" / "dreambooth.ipynb"
QUICK = """
TRIAL, KEEP, MINUTES = True, "drive", 0.001
STEPS, CLASS_IMAGES, SAMPLE_EVERY, DRAW_STEPS, SEEDS = 4, 2, 2, 2, range(2)
"""


def cells(kind: str = "code") -> list[Any]:
    return [cell for cell in nbformat.read(FILE, as_version=4).cells if cell.cell_type == kind]


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def with_settings(values: str) -> Any:
    """The notebook with a cell after its settings, as papermill would put it in."""
    made = nbformat.read(FILE, as_version=4)
    place = next(i for i, cell in enumerate(made.cells) if tagged(cell, "parameters"))
    made.cells.insert(place + 1, nbformat.v4.new_code_cell(values, id="values"))
    return made


def run(made: Any, folder: Path, *, before: str = "") -> Any:
    """before: code of the kernel's startup"""
    own = folder / ".kernel"
    startup = own / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "first.py").write_text(before, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(own / "ipython"), "OMP_NUM_THREADS": "1"}
    client = NotebookClient(made, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=env)
    return made


@pytest.fixture(autouse=True)
def no_trace(tmp_path_factory, monkeypatch):
    """Jupyter's own files go into a temporary folder."""
    home = tmp_path_factory.mktemp("jupyter")
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(home / name.lower()))


def pictures(cell: Any) -> int:
    found = 0
    for output in cell.outputs:
        data = output.get("data", {})
        found += sum(kind.startswith("image/") for kind in data)
        found += len(re.findall(r"<svg |data:image/", data.get("text/html", "")))
    return found


def text_of(made: Any, part: str) -> str:
    cell = next(cell for cell in made.cells if cell.cell_type == "code" and part in cell.source)
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    made = run(with_settings(QUICK), folder)
    if place := os.environ.get("LORA_BOOTH_NOTEBOOK"):  # to look at
        nbformat.write(made, place)
    return SimpleNamespace(made=made, folder=folder)


def test_it_runs_from_top_to_bottom(done):
    code = [cell for cell in done.made.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert "nothing to install" in text_of(done.made, "SOURCE")


def test_every_promised_picture_is_there(done):
    promised = [cell for cell in done.made.cells if tagged(cell, "pictures")]
    assert len(promised) == 10
    assert [cell.source for cell in promised if not pictures(cell)] == []


def test_what_it_makes_is_there(done):
    kept = done.folder / "drive"
    first, second = (lb.Adapter.load(kept / f"{name}.safetensors") for name in ("olga", "brew"))
    assert (first.card.token, first.card.class_noun, second.card.token) == ("ohwx", "owl", "zwx")
    page = (kept / "olga.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 1 + 2 + 8 + 2  # playground, plain call, weights, together
    assert (done.folder / "booth/runs/olga/report.html").is_file()
    assert sorted(path.name for path in (kept / "photos").iterdir()) == ["brew", "olga"]


def test_the_second_call_goes_on_where_the_limit_stopped_the_first(done):
    import json

    record = json.loads((done.folder / "booth/runs/olga/run.json").read_text(encoding="utf-8"))
    said = [event["what"] for event in record["events"]]
    assert record["status"] == "finished" and record["step"] == 4
    assert any("limit" in words for words in said) and any("step 1" in words for words in said), said
    assert list((done.folder / "drive/runs/olga").rglob("*.safetensors"))  # the mirror


def test_a_lost_session_goes_on_from_the_kept_folder(done, tmp_path):
    """Only what KEEP holds is left; the run is over without another step."""
    import shutil

    shutil.copytree(done.folder / "drive", tmp_path / "drive")
    made = with_settings(QUICK)
    last = next(i for i, cell in enumerate(made.cells) if cell.source.startswith("adapter = lb.train(base, subject, **run)"))
    made.cells = made.cells[: last + 1]
    run(made, tmp_path, before="import sys; sys.modules['ipywidgets'] = None")
    assert (tmp_path / "drive/olga.safetensors").read_bytes() == (done.folder / "drive/olga.safetensors").read_bytes()


# --- as it is committed ----------------------------------------------------------------------------------------------


def test_it_is_committed_without_outputs():
    made = nbformat.read(FILE, as_version=4)
    nbformat.validate(made)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells())
    assert not re.search(r"(?<![\w.])/(root|work|home|Users|tmp)/", FILE.read_text(encoding="utf-8"))
    assert all(cell.source.count("\n") < 25 for cell in cells())


def test_without_photos_it_says_so_in_one_line(tmp_path):
    made = with_settings('KEEP = ""')
    made.cells = [cell for cell in made.cells if "notebook.compare" not in cell.source or "from_folder" in cell.source]
    with pytest.raises(CellExecutionError, match="PhotoError: .*photos"):
        run(made, tmp_path, before="import sys; sys.modules['ipywidgets'] = None")
    error = next(output for cell in made.cells for output in cell.get("outputs", ()) if output.output_type == "error")
    assert len(error.traceback) == 1 and error.ename == "PhotoError"
    assert "file browser" in text_of(made, "notebook.upload(photos)")


# --- the helpers -----------------------------------------------------------------------------------------------------


def test_stale_modules_are_told(monkeypatch):
    import PIL

    assert notebook.outdated() == []
    monkeypatch.setattr(PIL, "__version__", "1.0")
    with pytest.raises(SettingsError, match="PIL 1.0 .* restart the session"):
        notebook.begin()


def test_uploads_of_both_generations_of_widgets_are_kept(tmp_path):
    eight = ({"name": "a.jpg", "content": memoryview(b"a")}, {"name": "../../b.jpg", "content": memoryview(b"b")})
    assert notebook.keep_uploads(tmp_path, eight) == "2 added: a.jpg, b.jpg"
    assert (
        notebook.keep_uploads(tmp_path, {"C:\\photos\\c.png": {"content": b"c"}, "..": {"content": b"d"}}) == "1 added: c.png"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.jpg": b"a", "b.jpg": b"b", "c.png": b"c"}


def test_nothing_is_kept_where_there_is_no_drive(tmp_path, capsys):
    assert notebook.storage("auto") is None and notebook.storage("") is None
    assert "download" in capsys.readouterr().out
    assert notebook.storage(tmp_path / "safe") == tmp_path / "safe" and (tmp_path / "safe").is_dir()
