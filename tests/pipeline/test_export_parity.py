"""What an export is compared with, on which inputs, and what makes the comparison impossible."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import TensorSpec
from deploy.errors import ExportError, ParityError
from deploy.models.registry import ARCHITECTURES
from deploy.pipeline.export_parity import integer_bounds


def test_parity_is_recorded_at_three_batch_sizes(shared_lenet5: Artifact) -> None:
    parity = shared_lenet5.manifest.parity
    assert parity is not None
    assert parity.against == "eager"
    assert [(case.data, case.batch) for case in parity.cases] == [("random", 1), ("random", 2), ("random", 5)]
    for case in parity.cases:
        assert 0 <= case.outputs["logits"].max_abs < 1e-5
        assert case.outputs["logits"].cosine == pytest.approx(1, abs=1e-6)


def test_parity_is_checked_on_real_images_too(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (30, 26), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    artifact = deploy.export(tmp_path / "out", arch="lenet5", data=tmp_path / "images")
    assert artifact.manifest.parity is not None
    assert ("images", 6) in [(case.data, case.batch) for case in artifact.manifest.parity.cases]


def test_over_tolerance_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"output 'logits' is off by .* at most 0 is allowed"):
        deploy.export(tmp_path / "out", arch="lenet5", rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []


def test_eager_gives_nan_is_an_error_and_not_agreement(tmp_path: Path) -> None:
    state = ARCHITECTURES["lenet5"].create().state_dict()
    first = next(iter(state))
    state[first] = torch.full_like(state[first], float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ExportError, match="eager module itself gives NaN"):
        deploy.export(tmp_path / "out", arch="lenet5", weights=tmp_path / "nan.pth")


@pytest.mark.usefixtures("untouched")
def test_a_batch_that_the_module_itself_refuses_is_named_with_its_line(project: Path) -> None:
    (project / "one.py").write_text(
        "import torch\nclass One(torch.nn.Module):\n    def forward(self, x):\n        return x.reshape(1, 784)\n"
    )
    message = (
        rf"One cannot be exported: {project}/one\.py:4 in forward of One: return x\.reshape\(1, 784\): .*the dimension 'batch'"
        r".*it runs x \(1, 784\), and not x \(2, 784\): .*\n.*`static_batch`"
    )
    with pytest.raises(ExportError, match=message):
        deploy.export(project / "out", model="one.py:One", inputs=["x=1x784"])
    with pytest.raises(ExportError, match=rf"One cannot run x \(1, 3\): {project}/one\.py:4 in forward of One: .*\n.*`inputs`"):
        deploy.export(project / "out", model="one.py:One", inputs=["x=1x3"])


def test_where_random_input_gives_nan_parity_is_checked_on_images_alone(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    (project / "root.py").write_text(
        "import torch\nclass Root(torch.nn.Module):\n    def forward(self, x):\n        return torch.sqrt(x).mean((2, 3))\n"
    )
    with pytest.raises(ExportError, match="give some with `data`"):
        deploy.export(project / "out", model="root.py:Root", inputs=["x=1x3x4x4"])
    (project / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (4, 4), (9, 99, 199)).save(project / "images" / "a" / "1.png")
    artifact = deploy.export(
        project / "out", model="root.py:Root", inputs=["x=1x3x4x4"], preprocess="none", data=project / "images"
    )
    assert artifact.manifest.parity is not None
    assert [case.data for case in artifact.manifest.parity.cases] == ["images"]
    assert "parity is checked on real input alone" in caplog.text


TABLE = torch.rand(4, 5)

FEW: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[float, float]]]] = {
    "looked up": (lambda x, k: x + TABLE[k], {"k": (0, 4)}),
    "looked up before an error": (lambda x, k: x @ TABLE[k], {"k": (0, 4)}),
    "looked up after a sum": (lambda x, k: x + TABLE[k - 2], {}),
    "compared": (lambda x, k: x * (k == 1)[:, None], {}),
}


@pytest.mark.parametrize(("forward", "bounds"), FEW.values(), ids=FEW)
def test_made_up_integers_go_as_far_as_the_table(forward: Callable[..., Tensor], bounds: dict[str, tuple[float, float]]) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            return forward(x, k)

    specs = [TensorSpec(name="x", dtype="float32", shape=("batch", 5)), TensorSpec(name="k", dtype="int64", shape=("batch",))]
    assert integer_bounds(Module(), specs, {"batch": 16}) == bounds
    assert integer_bounds(Module(), specs[:1], {"batch": 16}) == {}
