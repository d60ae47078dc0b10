"""The notebook runs from top to bottom as it stands, offline, with the values of a trial in its settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import lora_booth as lb
from lora_booth import notebook
from lora_booth.cli.demo import write_photos
from lora_booth.errors import SettingsError
from lora_booth.notebook import session

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "notebooks" / "dreambooth.ipynb"
QUICK = """
TRIAL, KEEP, MINUTES = True, "drive", 0.001
STEPS, CLASS_IMAGES, SAMPLE_EVERY, DRAW_STEPS, SEEDS = 4, 2, 4, 2, range(2)
from lora_booth.training import class_images, samples
class_images.CLASS_IMAGE_STEPS = samples.SAMPLE_STEPS = 2
"""
NO_WIDGETS = "import sys; sys.modules['ipywidgets'] = None"
NO_PHOTOS = """
import lora_booth as lb
notebook.upload("nothing")
lb.Subject.from_folder("nothing", token=TOKEN, class_noun=CLASS_NOUN)
"""
LOST = """
import shutil
shutil.rmtree(work)
MINUTES = None
"""


def cells(kind: str = "code") -> list[Any]:
    return [cell for cell in nbformat.read(FILE, as_version=4).cells if cell.cell_type == kind]


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def run(folder: Path) -> Any:
    """All cells, in a session without widgets, which has no photos at first and loses its files after the first training."""
    made = nbformat.read(FILE, as_version=4)

    def insert(before: str, source: str, *tags: str) -> None:
        place = next(i for i, cell in enumerate(made.cells) if cell.cell_type == "code" and cell.source.startswith(before))
        made.cells.insert(place, nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}))

    insert("from pathlib import Path", QUICK)  # after the settings, as papermill would
    insert("photos = safe", NO_PHOTOS, "raises-exception")
    insert("adapter = lb.train(base, subject, **run", LOST)
    startup = folder / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "first.py").write_text(NO_WIDGETS, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / ".ipython"), "OMP_NUM_THREADS": "1"}
    client = NotebookClient(made, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=env)
    return made


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
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):  # no trace elsewhere
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        made = run(folder)
    if place := os.environ.get("LORA_BOOTH_NOTEBOOK"):  # to look at
        nbformat.write(made, place)
    return SimpleNamespace(made=made, folder=folder)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(done):
    code = [cell for cell in done.made.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    errors = [cell.source for cell in code for output in cell.outputs if output.output_type == "error"]
    assert errors == [NO_PHOTOS]
    assert "nothing to install" in text_of(done.made, "SOURCE")
    assert "ohwx is free" in text_of(done.made, "notebook.judge")


@pytest.mark.slow
def test_every_promised_picture_is_there(done):
    promised = [cell for cell in done.made.cells if tagged(cell, "pictures")]
    assert len(promised) == 10
    assert [cell.source for cell in promised if not pictures(cell)] == []


@pytest.mark.slow
def test_what_it_makes_is_there(done):
    kept = done.folder / "drive"
    first, second = (lb.Adapter.load(kept / f"{name}.safetensors") for name in ("olga", "brew"))
    assert (first.card.token, first.card.class_noun, second.card.token) == ("ohwx", "owl", "zwx")
    page = (kept / "olga.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 1 + 2 + 8 + 2  # playground, plain call, weights, together
    assert sorted(path.name for path in (kept / "photos").iterdir()) == ["brew", "olga"]


@pytest.mark.slow
def test_the_plan_is_of_the_training_and_nothing_is_noisy(done):
    assert "4 steps at 64 px" in text_of(done.made, "notebook.compare(")
    noise = [out.text for cell in done.made.cells for out in cell.get("outputs", ()) if out.get("name") == "stderr"]
    assert not any("torchvision" in text for text in noise)


@pytest.mark.slow
def test_training_goes_on_from_what_is_kept(done):
    """The time limit stopped it after the first step, then the session's files were lost."""
    record = json.loads((done.folder / "booth/runs/olga/run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished" and record["step"] == record["steps"] == 4
    assert "continued at step 1" in [event["what"] for event in record["events"]]
    assert "time is up at step 1 of 4" in text_of(done.made, "restart=RESTART")
    steps = [json.loads(line)["step"] for line in (done.folder / "booth/runs/olga/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_finished_training_comes_back_in_a_new_session(done, tmp_path, capsys):
    """With less to show: samples are not among what is kept."""
    shutil.copytree(done.folder / "drive", tmp_path / "drive")
    olga = lb.Subject.from_folder(tmp_path / "drive/photos/olga", token="ohwx", class_noun="owl")
    config = lb.TrainingConfig(steps=4, class_images=2, sample_every=4)
    out, steps = tmp_path / "olga", []
    kept = {"config": config, "out": out, "mirror": tmp_path / "drive/runs/olga"}
    adapter = lb.train(lb.BaseModel.load("toybox", device="cpu"), olga, **kept, on_step=steps.append, progress=False)
    assert (
        not steps
        and adapter.save(tmp_path / "again.safetensors").read_bytes() == (done.folder / "drive/olga.safetensors").read_bytes()
    )
    assert notebook.samples(out) is None and "sample_every" in capsys.readouterr().out
    assert "<svg" in notebook.loss_curve(out).data and (out / "report.html").is_file()


@pytest.mark.slow
def test_without_photos_it_says_so_in_one_line(done):
    cell = next(cell for cell in done.made.cells if cell.source == NO_PHOTOS)
    (error,) = (output for output in cell.outputs if output.output_type == "error")
    assert error.ename == "PhotoError" and len(error.traceback) == 1
    assert "file browser" in text_of(done.made, "notebook.upload")


# --- as it is committed ----------------------------------------------------------------------------------------------


def test_it_is_committed_without_outputs():
    made = nbformat.read(FILE, as_version=4)
    nbformat.validate(made)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells())
    assert not re.search(r"(?<![\w.])/(root|work|home|Users|tmp)/", FILE.read_text(encoding="utf-8"))
    assert all(cell.source.count("\n") < 25 for cell in cells())


# --- the helpers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def displayed(monkeypatch) -> list[Any]:
    """What would be shown below the cell."""
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda *things, **_: shown.extend(things))
    return shown


def test_the_minutes_are_those_of_the_session(monkeypatch):
    """Cells after the one that ran out of time save what there is, and do not begin another such time."""
    assert notebook.minutes_left(None) is None
    monkeypatch.setattr(session, "_began", time.monotonic() - 60 * 100)
    assert 49 < notebook.minutes_left(150) < 50.1
    assert notebook.minutes_left(90) == session.LEAST


@pytest.mark.slow
def test_time_that_is_over_still_gives_a_usable_adapter(tmp_path, monkeypatch):
    """Run all, and the time ends in the first cell of training: the next one returns at once with what can be saved."""
    from faults import CONFIG, LORA, subject, tiny

    monkeypatch.setattr(session, "_began", time.monotonic() - 60 * 100)
    write_photos("olga", tmp_path / "photos")
    run = {"lora": LORA, "config": CONFIG, "out": tmp_path / "run", "mirror": tmp_path / "drive", "progress": False}
    first, second = (
        lb.train(tiny(), subject(tmp_path / "photos"), **run, time_limit=notebook.minutes_left(90)) for _ in range(2)
    )
    assert (first.card.steps, second.card.steps) == (1, 2)
    kept = lb.Adapter.load(second.save(tmp_path / "olga.safetensors"))
    assert kept.card.steps == 2 and any(factors.up.any() for factors in kept.modules.values())
    newest = max((tmp_path / "drive" / "checkpoints").iterdir()) / "adapter.safetensors"
    assert lb.Adapter.load(newest).digest() == kept.digest()  # what a lost session leaves


def test_stale_modules_are_told(monkeypatch):
    import PIL

    assert session.outdated() == []
    monkeypatch.setattr(PIL, "__version__", "1.0")
    with pytest.raises(SettingsError, match="PIL 1.0 .* restart the session"):
        notebook.begin()


def test_uploads_of_both_generations_of_widgets_are_kept(tmp_path):
    eight = ({"name": "a.jpg", "content": memoryview(b"a")}, {"name": "../../b.jpg", "content": memoryview(b"b")})
    assert session.keep_uploads(tmp_path, eight) == "2 added: a.jpg, b.jpg"
    assert session.keep_uploads(tmp_path, {"C:\\photos\\c.png": {"content": b"c"}, "..": {"content": b"d"}}) == "1 added: c.png"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.jpg": b"a", "b.jpg": b"b", "c.png": b"c"}


def test_nothing_is_kept_where_there_is_no_drive(tmp_path, capsys):
    assert notebook.storage("auto") is None and notebook.storage("") is None
    assert "download" in capsys.readouterr().out
    assert notebook.storage(tmp_path / "safe") == tmp_path / "safe" and (tmp_path / "safe").is_dir()


def test_the_upload_button_keeps_what_it_gets(tmp_path, displayed):
    notebook.upload(tmp_path / "rex")
    button, said = displayed[-1].children
    button.set_trait(
        "value",
        ({"name": "a.jpg", "type": "", "size": 1, "content": memoryview(b"a"), "last_modified": datetime.now(timezone.utc)},),
    )
    assert (tmp_path / "rex/a.jpg").read_bytes() == b"a" and said.value == "1 added: a.jpg"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt does not name 'ohwx owl'")
def test_the_playground_draws_what_its_fields_say(done, displayed, capsys):
    base, adapter = lb.BaseModel.load("toybox", device="cpu"), lb.Adapter.load(done.folder / "drive/olga.safetensors")
    drawn = notebook.playground(base, [adapter], "a photo of ohwx owl", steps=1)
    prompt, numbers, button, _ = displayed[-1].children
    seed, count, weight = numbers.children
    prompt.value, seed.value, count.value, weight.value = "an owl", 3, 2, 0.5
    button.click()
    stated = [(picture.prompt, picture.seed, picture.adapters) for picture in drawn]
    assert stated == [("a photo of ohwx owl", 0, (("ohwx owl", 1.0),))] + [("an owl", n, (("ohwx owl", 0.5),)) for n in (3, 4)]
    again = lb.Composition(base, [(adapter, 0.5)]).generate("an owl", seeds=[4], steps=1)[0]
    assert again.image.tobytes() == drawn[-1].image.tobytes()
    assert len(displayed) == 3 and not button.disabled  # two sheets and the fields
    seed.value, count.value = 2**31 - 1, 1
    drawn.clear()
    button.click()
    assert drawn[0].seed == 2**31 - 1


def test_a_run_without_a_step_has_no_curve(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "running"}', encoding="utf-8")
    assert notebook.loss_curve(tmp_path) is None
