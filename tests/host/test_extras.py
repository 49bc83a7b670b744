import tomllib
from pathlib import Path

import pytest

from deploy.host.extras import EXTRAS, extra_of, missing

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_the_project_file_says(extra: str) -> None:
    listed = {name.partition(">")[0].partition("[")[0] for name in PROJECT["optional-dependencies"][extra]}
    assert set(EXTRAS[extra].values()) | {"deploy"} == listed | {"deploy"}


@pytest.mark.parametrize(("module", "extra"), [("onnx.helper", "export"), ("grpc", "serving"), ("onnxruntime", "cpu")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(module: str, extra: str) -> None:
    error = missing(ModuleNotFoundError("no", name=module), "deploy bench")
    assert str(error) == f"deploy bench needs {module.partition('.')[0]}, which is not installed: pip install 'deploy[{extra}]'"


def test_a_module_of_no_extra_is_somebody_elses_fault() -> None:
    assert extra_of("json") is None
    assert missing(ModuleNotFoundError("no", name="my_net"), "deploy export") is None
