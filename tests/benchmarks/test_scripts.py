"""The scripts of benchmarks/ and their results, without measuring anything."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
FILES = sorted(BENCHMARKS.rglob("*.py"))
SCRIPTS = [path.stem for path in FILES if path.parent == BENCHMARKS and "__main__" in path.read_text(encoding="utf-8")]

Script = Callable[[str], ModuleType]


def test_every_file_is_in_the_readme_and_nothing_else_is() -> None:
    listed = re.findall(
        r"`([\w/]+\.py)`", "".join(line for line in (BENCHMARKS / "README.md").read_text().splitlines(True) if line[0] == "|")
    )
    assert {path.relative_to(BENCHMARKS).as_posix() for path in FILES} == set(listed)


def test_every_script_is_a_row_with_what_it_proves_how_to_run_it_and_its_last_figure() -> None:
    rows = [
        re.split(r"\s*\|\s*", line.strip("| \n"))
        for line in (BENCHMARKS / "README.md").read_text().splitlines()
        if line[:1] == "|"
    ]
    table = {cells[0].strip("`"): cells for cells in rows if len(cells) == 4}
    for name in SCRIPTS:
        assert all(table[f"{name}.py"]), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(
    script: Script, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    module = script(name)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert (module.__doc__ or "").splitlines()[0] in capsys.readouterr().out


def test_no_file_of_results_is_larger_than_200_kB() -> None:
    sizes = {path.name: path.stat().st_size for path in RESULTS.iterdir()}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > 200_000} == {}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_report_can_be_made_again_from_the_json(script: Script, path: Path) -> None:
    name = path.stem[len("2026-01-01-") :].replace("-", "_")
    if name not in SCRIPTS:  # of a part: int8-accuracy-lenet5
        name = next((other for other in SCRIPTS if name.startswith(other)), "gpu_report")
    module = script(name)
    document = json.loads(path.read_text(encoding="utf-8"))
    text = module.report(document)
    assert text == path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_is_compared_by_image_from_what_the_results_keep(script: Script, seed: int) -> None:
    module = script("int8_accuracy")
    rng = np.random.default_rng(seed)
    right = {tool: rng.random(1003) < share for tool, share in (("fp32", 0.9), (module.DEFAULT, 0.88), ("nncf", 0.2))}
    case: dict[str, Any] = {"images": 1003, "calibrating": 512, "choosing": 100, "refused": {}}
    for tool, flags in right.items():
        module.enter(case, tool, module.judged(flags, right["fp32"]) | {"chosen": 90.0, "int8_share": 1.0})
    case = json.loads(json.dumps(case))
    changed = module.changes(case)
    for a in right:
        for b in right:
            gained, lost = (right[a] & ~right[b]).sum(), (right[b] & ~right[a]).sum()
            points, low, high = module.difference(changed[a], changed[b])
            assert points == pytest.approx(100 * (gained - lost) / 1003)
            assert low <= points <= high
    assert f"{100 * right['nncf'].mean():.2f} %" in module.table(case)
    default = module.goals("lenet5", case)[0]
    assert str(default).startswith(f"{100 * (right[module.DEFAULT].mean() - right['fp32'].mean()):+.2f} (")


def test_the_best_peer_is_the_one_that_is_best_on_the_images_that_choose(script: Script) -> None:
    module = script("int8_accuracy")
    right = {
        tool: np.arange(1000) < count
        for tool, count in (("fp32", 900), (module.DEFAULT, 890), ("nncf", 895), ("modelopt-max", 500))
    }
    case: dict[str, Any] = {"images": 1000, "calibrating": 512, "choosing": 100, "refused": {}}
    for tool, chosen in (("fp32", 90.0), (module.DEFAULT, 99.0), ("nncf", 80.0), ("modelopt-max", 85.0)):
        module.enter(case, tool, module.judged(right[tool], right["fp32"]) | {"chosen": chosen, "int8_share": 1.0})
    drop, against, *_ = module.goals("vit", case)
    assert "modelopt-max" in str(against)
    assert (drop.met, against.met) == (False, True)
    assert not module.goals("vit_outliers", case)[0].met
    case["chosen"]["nncf"] = 86.0
    assert not module.goals("vit", case)[1].met
