import os
import subprocess
import sys
import types
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from deploy.errors import FactoryError, UsageError
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


def write(folder: Path, **files: str) -> None:
    """`a__b="..."` writes folder/a/b.py."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py") if not name.endswith("init") else None
        path = path or folder.joinpath(*name.removesuffix("init").rstrip("_").split("__"), "__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files(spec: str, **args: object) -> list[str]:
    """Names of the source files of what is built, relative to the current folder."""
    built, _ = build_model(model=spec, args=args)
    for file in built.source_files:
        assert os.path.isabs(file.path)
        assert file.sha256 == sha256(Path(file.path).read_bytes()).hexdigest()
    return [os.path.relpath(file.path) for file in built.source_files]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["package", "folder"])
@pytest.mark.parametrize(
    ("flags", "pythonpath"), [(["-P"], None), (["-P"], "."), ([], None)], ids=["command", "PYTHONPATH", "-m"]
)
def test_project_with_its_own_models_package_builds(tmp_path: Path, kind: str, flags: list[str], pythonpath: str | None) -> None:
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


def test_file_and_current_folder_are_importable_and_nothing_else_is_listed(project: Path) -> None:
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


def test_module_imported_only_when_the_factory_runs_is_listed(project: Path) -> None:
    write(project, net=NET + "\ndef make():\n    import late\n    return Net()\n", late="")
    assert files("net.py:make") == ["net.py", "late.py"]


def test_file_in_a_package_supports_relative_imports_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path, deep__init="", deep__inner__init="", deep__inner__net="from ..base import BASE\n" + NET, deep__base="BASE = 1"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert set(files(f"{tmp_path}/deep/inner/net.py:Net")) == {
        "../deep/inner/net.py", "../deep/__init__.py", "../deep/inner/__init__.py", "../deep/base.py",
    }  # fmt: skip


def test_members_of_a_package_do_not_shadow_the_standard_library(project: Path) -> None:
    write(project, pack__init="", pack__net="import queue, neighbour\nqueue.Queue\n" + NET, pack__queue="", pack__neighbour="")
    sys.modules.pop("queue", None)
    assert "pack/queue.py" not in files("pack/net.py:Net")


@pytest.mark.parametrize("name", ["types", "torch", "deploy", "my-net"])
def test_file_may_have_a_name_that_means_something_else(project: Path, name: str) -> None:
    (project / f"{name}.py").write_text(NET)
    loaded = sys.modules.get(name)
    assert files(f"{name}.py:Net") == [f"{name}.py"]
    assert sys.modules.get(name) is loaded or name == "my-net"


def test_modules_of_the_embedding_program_are_left_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", own)
    write(project, net="from utils import SIZE\n" + NET, utils="SIZE = 3\n")
    assert files("net.py:Net") == ["net.py", "utils.py"]
    assert sys.modules["utils"] is own


def test_two_projects_with_modules_of_the_same_names_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_modules_of_an_earlier_project_are_not_importable_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", net="import helpers_of_a\n" + NET, helpers_of_a="")
    write(tmp_path / "b", net="import helpers_of_a\n" + NET)
    monkeypatch.chdir(tmp_path / "a")
    build_model(model="net.py:Net")
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(FactoryError, match="No module named 'helpers_of_a'"):
        build_model(model="net.py:Net")


def test_changed_file_is_imported_afresh_and_an_unchanged_one_is_not_run_again(project: Path) -> None:
    write(project, net="import base\n" + NET, base="import builtins\nbuiltins.runs = getattr(builtins, 'runs', 0) + 1\n")
    first, second = build_model(model="net.py:Net")[0], build_model(model="net.py:Net")[0]
    assert type(first.module) is type(second.module)
    assert sys.modules["builtins"].runs == 1  # type: ignore[attr-defined]
    write(project, net="import base\n" + NET.replace("hidden=3", "hidden=17"))
    third, _ = build_model(model="net.py:Net")
    assert third.module.fc.in_features == 17  # type: ignore[union-attr]
    assert third.source_files[0].sha256 == sha256((project / "net.py").read_bytes()).hexdigest() != first.source_files[0].sha256
    del sys.modules["builtins"].runs  # type: ignore[attr-defined]


def test_folder_that_the_file_puts_on_the_path_stays_importable_for_the_factory(project: Path) -> None:
    (project / "vendor").mkdir()
    (project / "vendor" / "thirdparty.py").write_text("")
    lines = "import os, sys\nsys.path.insert(0, os.path.join(os.path.dirname(__file__), 'vendor'))\n"
    write(project, net=lines + NET + "\ndef make():\n    import thirdparty\n    return Net()\n")
    before = list(sys.path)
    for _ in range(2):
        assert files("net.py:make") == ["net.py", "vendor/thirdparty.py"]
        assert sys.path == before


def test_module_of_the_current_folder_is_a_factory_too(project: Path) -> None:
    write(project, mynets__small="from .parts import X\n" + NET, mynets__parts="X = 1", mynets__init="")
    assert set(files("mynets.small:Net")) == {"mynets/small.py", "mynets/parts.py", "mynets/__init__.py"}


def test_of_an_installed_package_only_its_own_file_is_listed() -> None:
    built, _ = build_model(model="torchvision.models.squeezenet:SqueezeNet", args={"version": "1_1"})
    assert [Path(file.path).name for file in built.source_files] == ["squeezenet.py"]
    assert built.folder is None
    assert built.factory == "torchvision.models.squeezenet:SqueezeNet"


@pytest.mark.parametrize("spec", ["net.py", ":Net", "net.py:", "Net"])
def test_specification_without_both_parts_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"expected FILE.py:FACTORY or pkg.mod:FACTORY"):
        build_model(model=spec)


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        (NET, "nut.py:Net", r"no file .*nut\.py"),
        (NET, "net.py:Nut", r"net\.py has no 'Nut'; did you mean 'Net'\?"),
        ("x = 1\ndef f(:\n", "net.py:Net", r"net\.py:2: invalid syntax"),
        ("import helper\n", "net.py:Net", r"helper\.py:2: .*never closed"),
        ("\nimport not_there\n", "net.py:Net", r"cannot import .*net\.py: No module named 'not_there' \(.*net\.py:2\)\nimportable are"),
        ("from torch import nonsense\n", "net.py:Net", r"cannot import name 'nonsense'.*\(.*net\.py:1\)"),
        ("1 / 0\n", "net.py:Net", r"fails when it is imported: ZeroDivisionError: division by zero \(.*net\.py:1\)"),
        ("raise SystemExit(2)\n", "net.py:Net", r"fails when it is imported: SystemExit: 2"),
        ("Net = 3\n", "net.py:Net", r"net\.py:Net is a int; expected a class or function"),
        (NET + "\nnet = Net()\n", "net.py:net", r"net\.py:net is a module already made"),
        ("def Net():\n    return 3\n", "net.py:Net", r"net\.py:Net returned a int; expected a torch\.nn\.Module"),
        ("def Net():\n    return broken()\ndef broken():\n    raise KeyError('a')\n", "net.py:Net", r"failed: KeyError: 'a' \(.*net\.py:4\)"),
        ("import torch\ndef Net():\n    return torch.zeros(2) @ torch.zeros(3)\n", "net.py:Net", r"failed: RuntimeError: .*\(.*net\.py:3\)"),
        (NET, "not_there.mod:Net", r"cannot import not_there\.mod: No module named 'not_there'"),
        (NET, "torch.nn:Linea", r"torch\.nn has no 'Linea'; did you mean 'Linear'"),
    ],
)  # fmt: skip
def test_factory_that_cannot_be_used_is_an_error_that_says_where(project: Path, text: str, spec: str, message: str) -> None:
    write(project, net=text, helper="\nx = (\n")
    before = list(sys.path)
    with pytest.raises(FactoryError, match=message):
        build_model(model=spec)
    assert sys.path == before


def test_relative_import_outside_a_package_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    project: Path, monkeypatch: pytest.MonkeyPatch, shadow: str, net: str
) -> None:
    monkeypatch.delitem(sys.modules, "fractions", raising=False)
    write(project, **{f"nets__{shadow}": "", "nets__net": net})
    with pytest.raises(FactoryError) as caught:
        build_model(model="nets/net.py:Net")
    first, second = str(caught.value).splitlines()
    assert str(project / "nets" / "net.py") in first
    assert second.startswith(f"{project / 'nets' / shadow}.py has the name of the standard library's module {shadow!r}")
    assert second.endswith("rename it")


def test_an_error_that_has_nothing_to_do_with_such_a_file_gets_no_hint(project: Path) -> None:
    write(project, random="", net="import torch\ntorch.no_such_thing\n")
    with pytest.raises(FactoryError) as caught:
        build_model(model="net.py:Net")
    assert "rename it" not in str(caught.value)


def test_wrong_arguments_are_refused_with_the_signature(project: Path) -> None:
    write(project, net=NET)
    with pytest.raises(UsageError, match=r"unexpected keyword argument 'hiden'; it is Net\(num_classes=4, hidden=3\)"):
        build_model(model="net.py:Net", args={"hiden": 5})


def test_file_that_failed_can_be_mended_and_built(project: Path) -> None:
    write(project, net="import base\n1 / 0\n", base="")
    with pytest.raises(FactoryError, match="ZeroDivisionError"):
        build_model(model="net.py:Net")
    write(project, net="import base\n" + NET)
    assert files("net.py:Net") == ["net.py", "base.py"]


def test_default_device_of_the_process_does_not_reach_the_factory(project: Path) -> None:
    write(project, net=NET)
    with torch.device("meta"):
        built, _ = build_model(model="net.py:Net")
    assert built.module.fc.weight.device.type == "cpu"  # type: ignore[union-attr]


def test_mere_folder_comes_before_a_package_of_its_name_that_is_elsewhere_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "other", models__init="raise RuntimeError('another project')\n")
    write(tmp_path / "project", models__deep__net="from models.deep.blocks import X\n" + NET, models__deep__blocks="X = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "other")
    monkeypatch.chdir(tmp_path / "project")
    assert files("models/deep/net.py:Net") == ["models/deep/net.py", "models/deep/blocks.py"]


def test_folder_with_the_name_of_an_installed_package_does_not_hide_it(project: Path) -> None:
    write(project, mlxtend__net="import mlxtend.data\n" + NET)
    assert files("mlxtend/net.py:Net") == ["mlxtend/net.py"]
