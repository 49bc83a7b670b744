"""The user's modules and those of the process do not get in one another's way."""

import fractions
import os
import subprocess
import sys
import types
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from deploy.errors import FactoryError
from deploy.intake.build import build_model

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4, hidden=3):
        super().__init__()
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.fc(x)
"""


@pytest.mark.parametrize("kind", ["package", "folder"])
@pytest.mark.parametrize(
    ("flags", "pythonpath"), [(["-P"], None), (["-P"], "."), ([], None)], ids=["command", "PYTHONPATH", "-m"]
)
def test_project_with_its_own_models_package_builds(
    tmp_path: Path, kind: str, flags: list[str], pythonpath: str | None, write: Callable[..., None]
) -> None:
    # `-P` leaves the current folder off sys.path, as the command `deploy` does; `python -m deploy` puts it there.
    write(
        tmp_path,
        models__net="from models.blocks import Block\nfrom .head import HEAD\nimport models.extra\n"
        + NET.replace("super().__init__()", "super().__init__(); self.block = Block(); self.classes = HEAD"),
        models__blocks="from torch import nn\nclass Block(nn.Identity): pass\n",
        models__head="HEAD = 1\n",
        models__extra="",
    )
    if kind == "package":
        write(tmp_path, models__init="")
    script = (
        "import sys; before = list(sys.path); from deploy.intake.build import build_model; import deploy.models\n"
        "built, _ = build_model(model='models/net.py:Net')\n"
        "assert type(built.module).__module__ == 'models.net', type(built.module).__module__\n"
        "assert sys.modules['models'] is not deploy.models and sys.path == before\n"
        "print([f.path for f in built.source_files])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": pythonpath} if pythonpath else {}
    done = subprocess.run(
        [sys.executable, *flags, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [os.path.relpath(path, tmp_path) for path in eval(done.stdout)]
    assert found[0] == "models/net.py"
    expected = {"models/net.py", "models/blocks.py", "models/head.py", "models/extra.py"}
    assert set(found) == expected | ({"models/__init__.py"} if kind == "package" else set())


def test_file_and_current_folder_are_importable_and_nothing_else_is_listed(
    project: Path, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    write(
        project,
        nets__mine="import blocks\nimport common.layers\nimport json, numpy, safetensors\n" + NET,
        nets__blocks="",
        common__layers="",
        unrelated="",
    )
    before = list(sys.path)
    assert files("nets/mine.py:Net") == ["nets/mine.py", "nets/blocks.py", "common/layers.py"]
    assert sys.path == before


def test_module_imported_only_when_the_factory_runs_is_listed(
    project: Path, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    write(project, net=NET + "\ndef make():\n    import late\n    return Net()\n", late="")
    assert files("net.py:make") == ["net.py", "late.py"]


def test_file_in_a_package_supports_relative_imports_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    write(
        tmp_path, deep__init="", deep__inner__init="", deep__inner__net="from ..base import BASE\n" + NET, deep__base="BASE = 1"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert set(files(f"{tmp_path}/deep/inner/net.py:Net")) == {
        "../deep/inner/net.py", "../deep/__init__.py", "../deep/inner/__init__.py", "../deep/base.py",
    }  # fmt: skip


def test_members_of_a_package_do_not_shadow_the_standard_library(
    project: Path, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    write(project, pack__init="", pack__net="import queue, neighbour\nqueue.Queue\n" + NET, pack__queue="", pack__neighbour="")
    sys.modules.pop("queue", None)
    assert "pack/queue.py" not in files("pack/net.py:Net")


@pytest.mark.parametrize("name", ["types", "torch", "deploy", "my-net"])
def test_file_may_have_a_name_that_means_something_else(project: Path, name: str, files: Callable[..., list[str]]) -> None:
    (project / f"{name}.py").write_text(NET)
    loaded = sys.modules.get(name)
    assert files(f"{name}.py:Net") == [f"{name}.py"]
    assert sys.modules.get(name) is loaded or name == "my-net"


def test_modules_of_the_embedding_program_are_left_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    own = types.ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", own)
    write(project, net="from utils import SIZE\n" + NET, utils="SIZE = 3\n")
    assert files("net.py:Net") == ["net.py", "utils.py"]
    assert sys.modules["utils"] is own


def test_two_projects_with_modules_of_the_same_names_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    found = []
    for project, size in (("a", 3), ("b", 5), ("a", 3)):
        write(
            tmp_path / project, net="from utils import SIZE\n" + NET.replace("hidden=3", "hidden=SIZE"), utils=f"SIZE = {size}\n"
        )
        monkeypatch.chdir(tmp_path / project)
        built, _ = build_model(model="net.py:Net")
        found.append((built.module.fc.in_features, [file.path for file in built.source_files]))  # type: ignore[union-attr]
    assert [size for size, _ in found] == [3, 5, 3]
    assert found[1][1] == [str(tmp_path / "b" / "net.py"), str(tmp_path / "b" / "utils.py")]
    assert found[0] == found[2]


def test_modules_of_an_earlier_project_are_not_importable_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    write(tmp_path / "a", net="import helpers_of_a\n" + NET, helpers_of_a="")
    write(tmp_path / "b", net="import helpers_of_a\n" + NET)
    monkeypatch.chdir(tmp_path / "a")
    build_model(model="net.py:Net")
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(FactoryError, match="No module named 'helpers_of_a'"):
        build_model(model="net.py:Net")


def test_changed_file_is_imported_afresh_and_an_unchanged_one_is_not_run_again(project: Path, write: Callable[..., None]) -> None:
    write(project, net="import base\n" + NET, base="import builtins\nbuiltins.runs = getattr(builtins, 'runs', 0) + 1\n")
    first, second = build_model(model="net.py:Net")[0], build_model(model="net.py:Net")[0]
    assert type(first.module) is type(second.module)
    assert sys.modules["builtins"].runs == 1  # type: ignore[attr-defined]
    write(project, net="import base\n" + NET.replace("hidden=3", "hidden=17"))
    third, _ = build_model(model="net.py:Net")
    assert third.module.fc.in_features == 17  # type: ignore[union-attr]
    assert third.source_files[0].sha256 == sha256((project / "net.py").read_bytes()).hexdigest() != first.source_files[0].sha256
    del sys.modules["builtins"].runs  # type: ignore[attr-defined]


def test_folder_that_the_file_puts_on_the_path_stays_importable_for_the_factory(
    project: Path, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    (project / "vendor").mkdir()
    (project / "vendor" / "thirdparty.py").write_text("")
    lines = "import os, sys\nsys.path.insert(0, os.path.join(os.path.dirname(__file__), 'vendor'))\n"
    write(project, net=lines + NET + "\ndef make():\n    import thirdparty\n    return Net()\n")
    before = list(sys.path)
    for _ in range(2):
        assert files("net.py:make") == ["net.py", "vendor/thirdparty.py"]
        assert sys.path == before


def test_relative_import_outside_a_package_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    write(tmp_path / "loose", net="from .blocks import X\n" + NET, blocks="X = 1")
    monkeypatch.chdir(tmp_path / "loose")
    with pytest.raises(FactoryError, match=r"relative import.*\n.*add __init__.py, or run from the folder above"):
        build_model(model="net.py:Net")


@pytest.mark.parametrize(
    ("shadow", "net"),
    [
        ("random", "from random import noise\n"),  # the standard library's own was loaded first, and hides the user's
        ("fractions", "import fractions\nHALF = fractions.Fraction(1, 2)\n"),  # the user's hides the standard library's
        ("fractions", NET.replace("super().__init__()", "super().__init__(); import fractions; fractions.Fraction(1, 2)")),
    ],
)
def test_a_file_with_the_name_of_a_module_of_the_standard_library_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, shadow: str, net: str, write: Callable[..., None]
) -> None:
    monkeypatch.delitem(sys.modules, fractions.__name__)  # put back afterwards
    write(project, **{f"nets__{shadow}": "", "nets__net": net})
    with pytest.raises(FactoryError) as caught:
        build_model(model="nets/net.py:Net")
    first, second = str(caught.value).splitlines()
    assert str(project / "nets" / "net.py") in first
    assert second.startswith(f"{project / 'nets' / shadow}.py has the name of the standard library's module {shadow!r}")
    assert second.endswith("rename it")


def test_an_error_that_has_nothing_to_do_with_such_a_file_gets_no_hint(project: Path, write: Callable[..., None]) -> None:
    write(project, random="", net="import torch\ntorch.no_such_thing\n")
    with pytest.raises(FactoryError) as caught:
        build_model(model="net.py:Net")
    assert "rename it" not in str(caught.value)


def test_mere_folder_comes_before_a_package_of_its_name_that_is_elsewhere_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    write(tmp_path / "other", models__init="raise RuntimeError('another project')\n")
    write(tmp_path / "project", models__deep__net="from models.deep.blocks import X\n" + NET, models__deep__blocks="X = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "other")
    monkeypatch.chdir(tmp_path / "project")
    assert files("models/deep/net.py:Net") == ["models/deep/net.py", "models/deep/blocks.py"]


def test_folder_with_the_name_of_an_installed_package_does_not_hide_it(
    project: Path, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    write(project, mlxtend__net="import mlxtend.data\n" + NET)
    assert files("mlxtend/net.py:Net") == ["mlxtend/net.py"]


def test_modules_of_deploy_that_the_factory_imports_are_not_the_users(
    project: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    names = ["deploy.models.mlp", "deploy.artifact.find", "deploy.words"]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    write(project, net="import deploy.models.mlp, deploy.artifact.find, deploy.words\n" + NET)
    assert files("net.py:Net") == ["net.py"]
    first = {name: sys.modules[name] for name in names}
    assert files("net.py:Net") == ["net.py"]
    assert {name: sys.modules[name] for name in names} == first
