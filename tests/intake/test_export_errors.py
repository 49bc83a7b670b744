"""A module that cannot be exported is an error with the line of the user's own file."""

import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError
from deploy.intake.exporter import export_graph


def spec(*shape: int | str, name: str = "x") -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def line_number(path: str, code: str) -> int:
    return next(number for number, line in enumerate(Path(path).read_text().splitlines(), 1) if code in line)


@pytest.fixture
def user_module(tmp_path: Path) -> ModuleType:
    """A user's own file with modules that cannot be exported."""
    source = textwrap.dedent("""
        import torch
        from torch import nn

        class Branches(nn.Module):
            def forward(self, x):
                if x.sum() > 0:
                    return x
                return -x

        class Svd(nn.Module):
            def forward(self, x):
                return torch.linalg.svd(x)[1]

        class Broken(nn.Module):
            def forward(self, x):
                return x.undefined()

        class View(nn.Module):
            def forward(self, x):
                x = x * 3
                return x.view(2, -1)

        class Equal(nn.Module):
            def forward(self, x):
                if x.shape[0] == 2:
                    return x + 1
                return x

        class Added(nn.Module):
            def forward(self, x):
                return torch.zeros(2, 3, 4) + x

        class Loop(nn.Module):
            def forward(self, x):
                return sum(x[i] for i in range(x.shape[0]))

        class Width(nn.Module):
            def forward(self, x):
                return x.reshape(x.shape[0], x.shape[1], 4)

        class Four(nn.Module):
            def forward(self, x):
                if x.shape[0] == 4:
                    return x + 1
                return x * 2

        class Deep(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner
            def forward(self, x):
                return self.inner(x) * 2
    """)
    module = ModuleType("user_nets")
    module.__file__ = str(tmp_path / "nets.py")
    Path(module.__file__).write_text(source)
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("Branches", "if x.sum() > 0:", "depends on the values of a tensor.*torch.where"),
        ("Svd", "torch.linalg.svd(x)", "linalg_svd has no ONNX counterpart"),
        ("Broken", "x.undefined()", "no attribute 'undefined'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_an_error_names_the_line_and_the_module_in_the_users_file(
    user_module: ModuleType, name: str, line: str, message: str, nested: bool
) -> None:
    module = getattr(user_module, name)()
    module = (user_module.Deep(module) if nested else module).eval()
    path = str(user_module.__file__)
    x = spec("batch", 3, 4)
    with pytest.raises(ExportError) as caught:
        export_graph(module, [x], {"x": torch.randn(2, 3, 4)}, ["y"], user_files=[path])
    text = str(caught.value)
    assert f"{path}:{line_number(path, line)}" in text
    assert re.search(message, text, re.DOTALL)
    assert (name if name != "Svd" or not nested else "'inner'") in text
    assert len(text.splitlines()) <= 2


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("View", "return x.view(2, -1)"),
        ("Equal", "if x.shape[0] == 2"),
        ("Added", "return torch.zeros(2, 3, 4) + x"),
        ("Loop", "return sum(x[i] for i in range(x.shape[0]))"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_batch_that_the_module_fixes_is_named_with_the_line_that_fixes_it(
    user_module: ModuleType, capfd: pytest.CaptureFixture[str], name: str, line: str, nested: bool
) -> None:
    inner = getattr(user_module, name)()
    path = str(user_module.__file__)
    module = user_module.Deep(inner) if nested else inner
    with pytest.raises(ExportError) as caught:
        export_graph(module, [spec("batch", 3, 4)], {"x": torch.randn(2, 3, 4)}, ["y"], user_files=[path])
    first, second = str(caught.value).splitlines()
    assert first == (
        f"{type(module).__name__} cannot be exported: {path}:{line_number(path, line)} in forward of {name}: {line}:"
        " the module's code fixes the dimension 'batch' that should stay dynamic"
    )
    assert "`static_batch`" in second
    assert capfd.readouterr().err == ""


def test_only_the_dimension_that_is_fixed_is_named(user_module: ModuleType) -> None:
    with pytest.raises(ExportError, match=r"in forward of Width: .*fixes the dimension 'W' that should stay dynamic\n"):
        export_graph(
            user_module.Width(),
            [spec("batch", 3, "W")],
            {"x": torch.randn(2, 3, 4)},
            ["y"],
            user_files=[str(user_module.__file__)],
        )


def test_a_dimension_that_no_file_of_the_users_fixes_is_named_without_a_line() -> None:
    module = nn.Unflatten(0, (2, 1))
    with pytest.raises(
        ExportError, match=r"Unflatten cannot be exported: the module's code fixes the dimension 'batch'"
    ) as caught:
        export_graph(module, [spec("batch", 3)], {"x": torch.randn(2, 3)}, ["y"])
    assert "static_batch" not in str(caught.value)  # of one row, it makes no two


def test_numpy_in_forward_is_called_that() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy((x * 2).numpy())

    with pytest.raises(
        ExportError, match=r"it computes in numpy, which torch\.export cannot follow .*\nuse torch's own functions"
    ):
        export_graph(Net(), [spec("batch", 3)], {"x": torch.randn(2, 3)}, ["y"])


def test_a_branch_on_a_size_that_leaves_others_open_is_a_warning(
    user_module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(user_module.__file__)
    module = user_module.Deep(user_module.Four())
    export_graph(module, [spec("batch", 3)], {"x": torch.randn(2, 3)}, ["y"], user_files=[path])
    number = line_number(path, "if x.shape[0] == 4")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "deploy.intake.exporter"]
    assert warning.startswith(f"{path}:{number} in forward: if x.shape[0] == 4: the module branches")
    assert warning.endswith("right only where batch != 4")
    caplog.clear()
    export_graph(
        nn.Conv2d(3, 4, 3, stride=2), [spec("batch", 3, "H", "W")], {"x": torch.randn(2, 3, 9, 8)}, ["y"], user_files=[path]
    )
    assert not [record for record in caplog.records if record.name == "deploy.intake.exporter"]


class Holds(nn.Module):
    """Calls its part, and has another one that it does not call."""

    def __init__(self, part: object, idle: nn.Module | None = None) -> None:
        super().__init__()
        self.part, self.idle = part, idle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)  # type: ignore[operator, no-any-return]


def script(module: nn.Module, how: str) -> nn.Module:
    with pytest.warns(FutureWarning if how == "script" else Warning):
        return torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.zeros(2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "outer", "what"),
    [
        ("script", lambda part: part, "it is"),
        ("trace", lambda part: part, "it is"),
        ("script", Holds, "it calls 'part', which is"),
        ("script", lambda part: nn.Sequential(nn.ReLU(), Holds(part)), r"it calls '1\.part', which is"),
    ],
)
def test_a_torchscript_module_is_named(how: str, outer: object, what: str) -> None:
    module = outer(script(nn.Linear(3, 3), how)).eval()  # type: ignore[operator]
    with pytest.raises(ExportError, match=rf"cannot be exported: .*{what} a TorchScript module"):
        export_graph(module, [spec("batch", 3)], {"x": torch.zeros(2, 3)}, ["y"], user_files=[__file__])


def test_a_torchscript_module_that_is_not_called_is_not_in_the_way() -> None:
    module = Holds(nn.Linear(3, 3), script(nn.Linear(3, 3), "script")).eval()
    export_graph(module, [spec("batch", 3)], {"x": torch.zeros(2, 3)}, ["y"])
