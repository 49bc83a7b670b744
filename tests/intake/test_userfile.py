import sys
from collections.abc import Callable
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


def test_module_of_the_current_folder_is_a_factory_too(
    project: Path, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
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
        ("Net = 3\n", "net.py:Net", r"net\.py:Net is an int; expected a class or function"),
        (NET + "\nnet = Net()\n", "net.py:net", r"net\.py:net is a module already made"),
        ("def Net():\n    return 3\n", "net.py:Net", r"net\.py:Net returned an int; expected a torch\.nn\.Module"),
        ("def Net():\n    return broken()\ndef broken():\n    raise KeyError('a')\n", "net.py:Net", r"failed: KeyError: 'a' \(.*net\.py:4\)"),
        ("import torch\ndef Net():\n    return torch.zeros(2) @ torch.zeros(3)\n", "net.py:Net", r"failed: RuntimeError: .*\(.*net\.py:3\)"),
        (NET, "not_there.mod:Net", r"cannot import not_there\.mod: No module named 'not_there'"),
        (NET, "torch.nn:Linea", r"torch\.nn has no 'Linea'; did you mean 'Linear'"),
    ],
)  # fmt: skip
def test_factory_that_cannot_be_used_is_an_error_that_says_where(
    project: Path, text: str, spec: str, message: str, write: Callable[..., None]
) -> None:
    write(project, net=text, helper="\nx = (\n")
    before = list(sys.path)
    with pytest.raises(FactoryError, match=message):
        build_model(model=spec)
    assert sys.path == before


def test_wrong_arguments_are_refused_with_the_signature(project: Path, write: Callable[..., None]) -> None:
    write(project, net=NET)
    with pytest.raises(UsageError, match=r"unexpected keyword argument 'hiden'; it is Net\(num_classes=4, hidden=3\)"):
        build_model(model="net.py:Net", args={"hiden": 5})


def test_file_that_failed_can_be_mended_and_built(
    project: Path, write: Callable[..., None], files: Callable[..., list[str]]
) -> None:
    write(project, net="import base\n1 / 0\n", base="")
    with pytest.raises(FactoryError, match="ZeroDivisionError"):
        build_model(model="net.py:Net")
    write(project, net="import base\n" + NET)
    assert files("net.py:Net") == ["net.py", "base.py"]


def test_default_device_of_the_process_does_not_reach_the_factory(project: Path, write: Callable[..., None]) -> None:
    write(project, net=NET)
    with torch.device("meta"):
        built, _ = build_model(model="net.py:Net")
    assert built.module.fc.weight.device.type == "cpu"  # type: ignore[union-attr]


def test_code_under_a_path_that_is_not_utf8_is_refused_by_name(project: Path) -> None:
    try:
        Path("caf\udce9").mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    Path("caf\udce9/net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    with pytest.raises(FactoryError, match=r"net.py is not UTF-8, and PyTorch cannot export .*: rename it"):
        build_model(model="caf\udce9/net.py:make")
