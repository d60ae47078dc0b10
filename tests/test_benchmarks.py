"""The parts of benchmarks/gpu_day.py: each once, failures beside results, nothing begun that time is too short for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu_day(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_day

    return gpu_day


def counting(folder: Path, then: str) -> str:
    """Words for Python: adds a letter to `ran` in `folder`, then does `then`."""
    script = folder / "part.py"
    lines = "import sys", "open(sys.argv[1], 'a').write('x')", "open(sys.argv[2] + '/one.json', 'w').write('[1]')", then
    script.write_text("\n".join(lines))
    return f"{script} {folder / 'ran'} {{out}}"


@pytest.mark.parametrize(
    ("then", "outcome", "again"),
    [
        ("print('done')", "result", 0),
        ("print('first'); sys.exit('broken')", "error", 1),
        ("import signal, os; os.kill(os.getpid(), signal.SIGKILL)", "error", 1),
    ],
)
def test_a_part_runs_once_and_after_a_failure_if_asked(
    gpu_day: Any, tmp_path: Path, then: str, outcome: str, again: int
) -> None:
    file = tmp_path / "day.json"
    parts = [gpu_day.Part("one", 0, (counting(tmp_path, then),)), gpu_day.Part("other", 0, ("-c pass",))]
    for more in ({}, {}, {"again": True}):
        gpu_day.Day(file, tmp_path / "work", seconds=60).do(parts, **more)
        record = json.loads(file.read_text())["parts"]
        found = record["one"]
        assert outcome in found
        if outcome == "error":
            assert "broken" in found["error"] or found["error"] == "exit status -9"
    assert found["result" if outcome == "result" else "written"] == {"one": [1]}
    assert (tmp_path / "ran").read_text() == "x" * (1 + again)
    assert record["other"]["result"] == []


def test_what_cannot_run_waits_for_a_later_call(gpu_day: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "day.json"
    told = '-c "import sys; print(sys.argv[1])" {peer}'
    parts = [gpu_day.Part("long", 100, ("-c pass",)), gpu_day.Part("peer", 1, (told,), needs=("peer",))]
    gpu_day.Day(file, tmp_path, seconds=50).do(parts)
    assert json.loads(file.read_text())["parts"]["peer"]["missing"] == ["peer"]
    assert "long: not begun" in capsys.readouterr().out
    script = tmp_path / "with a blank.py"
    day = gpu_day.Day(file, tmp_path, seconds=200, scripts={"peer": script})
    day.do(parts)
    assert list(day.found["parts"]) == ["peer", "long"] and day.found["parts"]["peer"]["result"] == [str(script)]
    with pytest.raises(SystemExit, match="holds a real run"):
        gpu_day.Day(file, tmp_path, seconds=1, dry=True)


@pytest.mark.slow
def test_the_end_of_a_call_stops_a_part_with_its_processes_and_the_next_call_tries_it_again(
    gpu_day: Any, tmp_path: Path
) -> None:
    late = tmp_path / "late.py"
    late.write_text(f"import time\ntime.sleep(4)\nopen({str(tmp_path / 'late')!r}, 'w')")
    parts = [
        gpu_day.Part("one", 0, (counting(tmp_path, f"import subprocess\nsubprocess.run([sys.executable, {str(late)!r}])"),))
    ]
    day = gpu_day.Day(tmp_path / "day.json", tmp_path / "work", seconds=3)
    day.do(parts)
    assert "stopped" in day.found["parts"]["one"]
    time.sleep(2)
    assert not (tmp_path / "late").exists()
    late.write_text("")
    day = gpu_day.Day(tmp_path / "day.json", tmp_path / "work", seconds=60)
    day.do(parts)
    assert day.found["parts"]["one"]["result"] == {"one": [1]}


def test_names_are_used_once(gpu_day: Any) -> None:
    names = [part.name for part in gpu_day.PARTS]
    assert len(set(names)) == len(names)
