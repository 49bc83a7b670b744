from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import FORMAT, Manifest, Source, Stage
from deploy.artifact.tensors import TensorSpec
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import ArtifactError, CheckpointError, FactoryError, UsageError
from deploy.intake import isolation
from deploy.intake.build import BuiltModel, build_model, rebuild
from deploy.intake.weightsfile import save_weights
from deploy.models import create

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes{default}, sizes=(3, 5)):
        super().__init__()
        assert isinstance(sizes, tuple)
        self.body = nn.Linear(*sizes)
        self.fc = nn.Linear(sizes[1], num_classes)

    def forward(self, x):
        return self.fc(self.body(x))

def fixed():
    return Net(4)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET.format(default="=4"))
    return tmp_path


def checkpoint(path: Path, module: nn.Module, prefix: str = "") -> Path:
    torch.save({f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}, path)
    return path


def artifact_of(built: BuiltModel, out: Path) -> Artifact:
    """An artifact with weights and source, and no graph, which rebuilding does not read."""
    with ArtifactWriter(out) as writer:
        save_weights(built.module, writer.path / "weights.safetensors")
        source = Source(
            factory=built.factory, args=built.args, files=list(built.source_files), weights=None, state_dict="", random=True,
            folder=built.folder,
        )  # fmt: skip
        return writer.commit(
            Manifest(
                format=FORMAT, kind="onnx", name="x", precision="fp32", source=source, parent=None, files={}, inputs=[],
                outputs=[], profiles=[], preprocess=None, classes=None, parity=None, accuracy=None, calibration=None,
                exclusions=[], tools={}, stage=Stage(name="export", request=""), created="",
            )
        )  # fmt: skip


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_reference_architecture_comes_with_its_interface_and_seeded_weights() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    built, report = build_model(arch="lenet5")
    assert torch.equal(torch.get_rng_state(), before)
    assert report is None
    assert built.inputs == (TensorSpec(name="input", dtype="float32", shape=(1, 1, 28, 28)),)
    assert (built.outputs, built.preprocess, built.num_classes) == (("logits",), "mnist", 10)
    assert (built.factory, built.args, built.source_files) == ("lenet5", {}, ())
    assert not built.module.training
    assert same_weights(built.module, build_model(arch="lenet5")[0].module)
    assert not same_weights(built.module, build_model(arch="lenet5", seed=1)[0].module)


def test_checkpoint_is_loaded_and_reported(tmp_path: Path) -> None:
    source = create("lenet5")
    built, report = build_model(arch="lenet5", weights=checkpoint(tmp_path / "w.pt", source, "module."))
    assert same_weights(built.module, source)
    assert report is not None
    assert report.summary() == "10 of 10 tensors loaded by name; prefix 'module.' taken off"


@pytest.mark.parametrize("match", ["name", "order"])
@pytest.mark.parametrize("arch", ["lenet5", "mobilenet_v1", "torchvision:squeezenet1_1", "timm:test_resnet"])
def test_number_of_classes_is_read_from_the_checkpoint(tmp_path: Path, arch: str, match: Any) -> None:
    source = build_model(arch=arch, num_classes=7)[0].module
    built, report = build_model(arch=arch, weights=checkpoint(tmp_path / "w.pt", source), match=match)
    assert (built.num_classes, built.args) == (7, {"num_classes": 7})
    assert same_weights(built.module, source)
    assert report is not None
    assert report.complete


def test_number_of_classes_of_a_users_factory_is_read_too(project: Path) -> None:
    source = build_model(model="net.py:Net", num_classes=9)[0].module
    weights = checkpoint(project / "w.pt", source)
    assert build_model(model="net.py:Net", weights=weights)[0].args == {"num_classes": 9}
    (project / "net.py").write_text(NET.format(default=""))  # which must be given one
    built, _ = build_model(model="net.py:Net", weights=weights)
    assert built.args == {"num_classes": 9}
    assert same_weights(built.module, source)


def test_number_of_classes_that_must_be_given_and_cannot_be_read_is_asked_for(project: Path) -> None:
    (project / "net.py").write_text(NET.format(default=""))
    with pytest.raises(UsageError, match=r"net\.py:Net must be given the number of classes: set `num_classes`"):
        build_model(model="net.py:Net")
    torch.save({"other": torch.ones(3)}, project / "w.pt")
    with pytest.raises(UsageError, match="cannot be read from the checkpoint: set `num_classes`"):
        build_model(model="net.py:Net", weights=project / "w.pt")


def test_another_architecture_is_not_mistaken_for_another_number_of_classes(tmp_path: Path) -> None:
    state = create("lenet5").state_dict()
    torch.save({**state, "conv1.weight": torch.ones(6, 3, 5, 5)}, tmp_path / "w.pt")  # three channels, not three classes
    with pytest.raises(CheckpointError, match=r"by name: 1 of another shape\n.*conv1.weight is 6x3x5x5, expected 6x1x5x5"):
        build_model(arch="lenet5", weights=tmp_path / "w.pt")


def test_given_number_of_classes_is_not_overruled_by_the_checkpoint(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "w.pt", create("lenet5", num_classes=7))
    with pytest.raises(CheckpointError, match="Try: `num_classes` 7"):
        build_model(arch="lenet5", num_classes=5, weights=weights)
    built, report = build_model(arch="lenet5", num_classes=5, weights=weights, allow_partial=True)
    assert report is not None
    assert [mismatch.name for mismatch in report.mismatched] == ["fc3.weight", "fc3.bias"]
    assert built.module(torch.zeros(1, 1, 28, 28)).shape == (1, 5)


def test_number_of_classes_is_not_advised_for_a_factory_that_takes_none(project: Path) -> None:
    (project / "net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 5)\n")
    torch.save(torch.nn.Linear(3, 7).state_dict(), project / "w.pt")
    with pytest.raises(CheckpointError, match="weight is 7x3, expected 5x3") as caught:
        build_model(model="net.py:make", weights=project / "w.pt")
    assert "num_classes" not in str(caught.value)


def test_old_parallel_mobilenet_goes_onto_the_feature_net_by_order(tmp_path: Path) -> None:
    state = {name: t for name, t in create("mobilenet_v1").state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "old.pth.tar")
    built, report = build_model(arch="mobilenet_v1_features", weights=tmp_path / "old.pth.tar", match="order")
    assert report is not None
    assert (len(report.loaded), len(report.unexpected), report.found_under) == (65, 72, "state_dict")
    assert torch.equal(built.module.state_dict()["conv7.3.weight"], state["model.6.3.weight"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "either an architecture or a model's"),
        ({"arch": "mlp", "model": "a.py:B"}, UsageError, "either an architecture or a model's"),
        ({"arch": "mlp", "num_classes": 3, "args": {"num_classes": 4}}, UsageError, "contradict one another"),
        ({"arch": "mlp", "args": {"num_classes": "many"}}, UsageError, "must be a whole number, not 'many'"),
        (
            {"arch": "convnet", "args": {"dropout": object()}},
            UsageError,
            "'dropout' is an object, which the manifest cannot record",
        ),
        ({"model": "net.py:fixed", "num_classes": 3}, UsageError, r"net\.py:fixed takes no num_classes"),
        ({"arch": "keras:x"}, UsageError, "unknown architecture 'keras:x'; expected .* torchvision:NAME or timm:NAME"),
        ({"arch": "mlp", "weights": Path("none.pt")}, CheckpointError, "no checkpoint at none.pt"),
    ],
)
@pytest.mark.usefixtures("project")
def test_what_cannot_be_built_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_model(**options)


def test_number_of_classes_may_come_as_a_model_argument() -> None:
    built, _ = build_model(arch="mlp", args={"num_classes": 3})
    assert (built.num_classes, built.args) == (3, {"num_classes": 3})


def test_lazy_layers_need_a_size(project: Path) -> None:
    (project / "net.py").write_text("from torch import nn\ndef make():\n    return nn.LazyLinear(2)\n")
    with pytest.raises(FactoryError, match=r"net\.py:make leaves 'weight' without a shape"):
        build_model(model="net.py:make")


def test_recorded_arguments_that_the_library_no_longer_takes_are_no_wrong_usage(tmp_path: Path) -> None:
    built, _ = build_model(arch="lenet5")
    built.args["depth"] = 3
    with pytest.raises(FactoryError, match=r"x cannot be rebuilt: cannot build lenet5 with .*lenet5 takes no argument 'depth'"):
        rebuild(artifact_of(built, tmp_path / "x"))


def test_registry_torchvision_and_timm_modules_are_rebuilt(tmp_path: Path) -> None:
    for index, arch in enumerate(("lenet5", "torchvision:lraspp_mobilenet_v3_large", "timm:test_vit")):
        built, _ = build_model(arch=arch, num_classes=3, seed=3)
        module = rebuild(artifact_of(built, tmp_path / str(index)))
        assert not module.training
        assert same_weights(module, built.module)


def test_users_module_is_rebuilt_from_any_folder_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "models").mkdir(parents=True)
    (project / "models" / "net.py").write_text("from models.more import X\n" + NET.format(default="=4"))
    (project / "models" / "more.py").write_text("X = 1\n")
    monkeypatch.chdir(project)
    built, _ = build_model(model="models/net.py:Net", args={"sizes": (6, 7)}, num_classes=2, seed=4)
    assert built.args == {"sizes": {"tuple": [6, 7]}, "num_classes": 2}
    assert built.factory == f"{project}/models/net.py:Net"
    artifact = artifact_of(built, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    module = rebuild(Artifact.open(artifact.path))
    assert same_weights(module, built.module)
    assert torch.equal(module(torch.ones(1, 6)), built.module(torch.ones(1, 6)))


def test_module_of_a_package_in_the_current_folder_is_rebuilt_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "ownnets").mkdir(parents=True)
    (tmp_path / "project" / "ownnets" / "small.py").write_text(NET.format(default="=4"))
    monkeypatch.chdir(tmp_path / "project")
    built, _ = build_model(model="ownnets.small:Net")
    monkeypatch.chdir(tmp_path)
    assert same_weights(rebuild(artifact_of(built, tmp_path / "out")), built.module)


def test_changed_or_missing_file_of_the_user_is_an_error_naming_file_and_digests(project: Path) -> None:
    (project / "part.py").write_text("X = 1\n")
    (project / "net.py").write_text("from part import X\n" + NET.format(default="=4"))
    built, _ = build_model(model="net.py:Net")
    artifact = artifact_of(built, project / "out")
    then = built.source_files[1].sha256
    (project / "part.py").write_text("X = 2\n")
    with pytest.raises(
        FactoryError, match=rf"part\.py has changed since .*: its SHA-256 is \w{{12}}, and {then[:12]} was exported"
    ):
        rebuild(artifact)
    (project / "part.py").unlink()
    with pytest.raises(FactoryError, match=rf"part\.py \(SHA-256 {then[:12]}\).* is gone: restore it or export again"):
        rebuild(artifact)
    (project / "part.py").write_text("X = 1\n")
    assert same_weights(rebuild(artifact), built.module)


def test_module_that_now_imports_another_file_is_not_rebuilt(project: Path) -> None:
    (project / "net.py").write_text("try:\n    import tuning\nexcept ImportError:\n    pass\n" + NET.format(default="=4"))
    built, _ = build_model(model="net.py:Net")
    artifact = artifact_of(built, project / "out")
    (project / "tuning.py").write_text("")
    isolation._programs.clear()  # as in another process
    with pytest.raises(FactoryError, match=r"now imports .*tuning\.py, which was no part of it"):
        rebuild(artifact)


def test_damaged_or_missing_weights_are_an_error(tmp_path: Path) -> None:
    artifact = artifact_of(build_model(arch="mlp")[0], tmp_path / "out")
    path = artifact.path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is damaged"):
        rebuild(artifact)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is missing: the eager module cannot be rebuilt"):
        rebuild(artifact)


def test_artifact_of_a_bare_onnx_file_has_no_module_to_rebuild(tmp_path: Path) -> None:
    artifact = artifact_of(build_model(arch="mlp")[0], tmp_path / "out")
    source = msgspec.structs.replace(artifact.manifest.source, factory=None)
    bare = Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, source=source))
    with pytest.raises(FactoryError, match="came from an ONNX file: there is no eager module to rebuild"):
        rebuild(bare)
