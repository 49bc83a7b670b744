import argparse
import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deploy.host.core_probe import CoreProbe, CoreState, remember

Script = Callable[[str], ModuleType]


@pytest.fixture
def harness(script: Script) -> ModuleType:
    return script("bench_harness")


def bench_document(samples: int, rounds: int = 15, rows: int = 10) -> dict[str, Any]:
    """A document like that of `deploy bench --json`."""
    values = np.random.default_rng(0).lognormal(size=(rows, rounds * samples)).round(6).tolist()
    return {"results": [{"p50_ms": 1.0, "samples_ms": row, "rounds": [samples] * rounds, "backend": "eager"} for row in values]}


@pytest.mark.parametrize("name", ["common", "harness"])
def test_a_namespace_of_another_program_does_not_stand_in_for_the_harness(
    script: Script, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # as a program with a folder of that name leaves it
    assert script("gpu_tables").markdown(["a"], []).startswith("| a |")


def test_a_small_document_is_kept_as_it_is(harness: ModuleType) -> None:
    document = {**bench_document(2), "flags": [True, None], "text": ["a [ b ]", "c"], "empty": []}
    assert json.loads(harness.encode(document)) == document


@pytest.mark.parametrize("samples", [150, 500, 5000])
def test_raw_samples_are_thinned_until_the_document_fits(harness: ModuleType, samples: int) -> None:
    document = bench_document(samples)
    text = harness.encode(document)
    assert len(text.encode()) <= harness.MOST_BYTES
    kept = json.loads(text)
    assert kept["thinned"].startswith("1 of ")
    for before, after in zip(document["results"], kept["results"], strict=True):
        assert list(after) == list(before)
        assert len(after["rounds"]) == 15
        assert sum(after["rounds"]) == len(after["samples_ms"]) < len(before["samples_ms"])
        assert set(after["samples_ms"]) <= set(before["samples_ms"])
        assert np.median(after["samples_ms"]) == pytest.approx(np.median(before["samples_ms"]), rel=0.1)


def test_samples_are_thinned_by_label_and_round_and_under_a_load(harness: ModuleType) -> None:
    document = {
        "parts": [{"rows": [{"samples_ms": {"engine": [[3.0, 1.0, 2.0], [4.0]], "eager": [[5.0, 6.0]]}}]}],
        "loads": [{"rate": 5, "samples_ms": [float(value) for value in range(9)]}],
    }
    thinned = harness.thin(document, 3)
    assert thinned["parts"] == [{"rows": [{"samples_ms": {"engine": [[2.0], [4.0]], "eager": [[6.0]]}}]}]
    assert thinned["loads"] == [{"rate": 5, "samples_ms": [1.0, 4.0, 7.0]}]
    assert harness.thin(document, 1)["parts"][0]["rows"][0]["samples_ms"]["engine"][0] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("document", [{"flips": list(range(100_000))}, {"text": "x" * 200_001}])
def test_results_that_cannot_be_thinned_are_refused_and_nothing_is_written(
    harness: ModuleType, document: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="at most 200,000 are kept"):
        harness.publish("large", document, "text", tmp_path / "results")
    assert list(tmp_path.iterdir()) == []


def test_results_are_dated_markdown_and_json(harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness.publish("net-1.5", {"a": [1, 2]}, "# Net\n", tmp_path / "new")
    assert sorted(path.name[10:] for path in (tmp_path / "new").iterdir()) == ["-net-1.5.json", "-net-1.5.md"]
    (document,) = (tmp_path / "new").glob("*.json")
    assert document.read_text() == '{\n "a": [1, 2]\n}\n'
    assert capsys.readouterr().out.startswith("# Net\n")


@pytest.mark.parametrize("share", [0.0, 0.004, 0.5, 1.0])
def test_flags_come_back_as_they_were_packed(harness: ModuleType, share: float) -> None:
    flags = np.random.default_rng(0).random(10_003) < share
    np.testing.assert_array_equal(harness.unpack(harness.pack(flags), len(flags)), flags)


def test_sides_take_turns_in_an_order_that_rotates(harness: ModuleType) -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], int]:
        def run() -> int:
            order.append(name)
            return len(order)

        return run

    values = harness.in_turns({name: side(name) for name in "abc"}, 3, warm_up=1)
    assert "".join(order) == "abcbcacababc"
    assert values == {"a": [6, 8, 10], "b": [4, 9, 11], "c": [5, 7, 12]}


@pytest.mark.parametrize(
    ("held_back", "kept"),
    [
        ("", [1, 2, 3]),
        ("24", [1, 6, 7]),  # measured after the second and the fourth round, which is before the third and the fifth
        ("2468", [1, 10, 11]),
        ("1", [3, 4, 5]),
        ("357", [1, 2, 9]),
        ("2 4 6 8 10", [1, 12, 2]),
    ],
)
def test_rounds_in_which_the_cores_were_held_back_are_taken_again(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, held_back: str, kept: list[int]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bad = set(map(int, held_back.split() if " " in held_back else held_back))
    moments = count()

    def measure(_: CoreProbe) -> CoreState:
        return CoreState(step_ns=18.0 if next(moments) in bad else 10.0, handoff_us=0.2)

    remember(CoreState(step_ns=10.0, handoff_us=0.2))
    monkeypatch.setattr(CoreProbe, "measure", measure)
    rounds = count(1)
    assert harness.in_turns({"a": lambda: next(rounds)}, 3, steady=True) == {"a": kept}


@pytest.mark.parametrize(
    ("conditions", "line"),
    [
        (
            {"cpu": "AMD", "cores": 2, "threads": 1, "load_average": [0.5, 1], "versions": {"torch": "2.1", "tensorrt": None}, "time": "now"},
            "AMD, 1 thread, load average 0.5 before; torch 2.1; now.\n",
        ),
        ({"cpu": "AMD", "cores": 2, "threads": 2, "load_average": [0, 1], "versions": {}, "time": "now"}, "AMD, 2 threads, load average 0 before; now.\n"),
        ({"cpu": "AMD", "cores": 1}, "AMD, 1 core.\n"),
    ],
)  # fmt: skip
def test_conditions_name_only_what_is_there(harness: ModuleType, conditions: dict[str, Any], line: str) -> None:
    assert harness.conditions_line(conditions) == line


def test_a_process_is_timed_and_weighed(harness: ModuleType, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import os, time; x = b'x' * 40_000_000; time.sleep(0.4); print(os.environ['XDG_CACHE_HOME'])",
    ]
    done = harness.run(command, tmp_path, weigh=True)
    assert (done.status, done.output) == (0, f"{tmp_path}\n")
    assert done.seconds > 0.4
    assert done.peak > 40_000_000
    with pytest.raises(SystemExit, match="no such thing"):
        harness.run([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path)
    assert harness.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, may_fail=True).status == 3


@pytest.mark.parametrize("target", ["peers", "serving-peers"])
def test_peers_that_are_missing_are_told_how_to_make(harness: ModuleType, target: str, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    harness.add_peers(parser, target)
    default = parser.parse_args([]).peers
    assert default == harness.HERE.parent / f".venv-{target}" / "bin" / "python"
    with pytest.raises(SystemExit, match=f"run `make {target}`"):
        harness.check_peers(tmp_path / "python", target)
    (tmp_path / "python").symlink_to(sys.executable)
    assert harness.check_peers(tmp_path / "python", target) == tmp_path / "python"


def test_goals_decide_the_exit_status(harness: ModuleType) -> None:
    goals = [harness.Goal(text="1 s (goal: 2 s)", met=True), harness.Goal(text="3 s (goal: 2 s)", met=False)]
    assert harness.bullets(goals) == "- 1 s (goal: 2 s): met\n- 3 s (goal: 2 s): NOT met\n"
    assert (harness.exit_status(goals[:1]), harness.exit_status(goals), harness.exit_status([])) == (0, 1, 0)
