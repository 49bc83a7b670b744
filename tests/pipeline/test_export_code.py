"""A user's preprocessing function goes with the artifact: into all that is made of it, wherever that lies, and alike for all uses."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import deploy
from deploy.artifact import usercode
from deploy.artifact.artifact import Artifact
from deploy.data.calibration_set import calibration_set
from deploy.errors import ArtifactError, UsageError, UserCodeError
from deploy.evaluation import evaluate, predict
from deploy.runtime.load import load

CODE = """\
import numpy as np
from PIL import ImageOps

def prepare(image):
    small = ImageOps.pad(image.convert("RGB"), (8, 8), color=(114, 114, 114))
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 50

def prepare_one(image):
    return prepare(image)[None]
"""

WEIGHTS = ", ".join(f"{value:.3f}" for value in np.random.default_rng(0).standard_normal(81))
NET = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[batch, 3, 8, 8] x) => (float[batch, 3] scores)
    <float[3, 3, 3, 3] w = {{{WEIGHTS}}}, int64[2] axes = {{2, 3}}> {{
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        r = Relu(c)
        scores = ReduceMean <keepdims = 0> (r, axes)
    }}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net, code, and images of many sizes in three classes."""
    folder = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    onnx.save(onnx.parser.parse_model(NET), folder / "net.onnx")
    (folder / "prep.py").write_text(CODE)
    for index in range(12):
        path = folder / "images" / "abc"[index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10 + index, 30 - index, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def net(project: Path) -> Artifact:
    return deploy.export(project / "net", onnx=project / "net.onnx", preprocess=f"{project / 'prep.py'}:prepare")


def arrays(artifact: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """What `eval`, `predict` and a calibration feed of the images of `folder`, in order."""
    fed: dict[str, list[np.ndarray]] = {"eval": [], "predict": []}
    for name, module in (("eval", evaluate), ("predict", predict)):

        def recording(*args: Any, fed: list[np.ndarray] = fed[name], **settings: Any) -> Any:
            session = load(*args, **settings)
            run = session.run
            monkeypatch.setattr(session, "run", lambda feed: (fed.append(feed["x"].copy()), run(feed))[1])
            return session

        monkeypatch.setattr(module, "load", recording)
    deploy.evaluate(artifact, folder, batch_size=12)
    deploy.predict(artifact, sorted(folder.rglob("*.png")), batch_size=5)
    calibration = [feed["x"] for feed in calibration_set(artifact, folder, 12).feeds(5)]
    found = {"eval": fed["eval"][-1], "predict": np.concatenate(fed["predict"]), "calibration": np.concatenate(calibration)}
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", ["prepare", "prepare_one"])
def test_all_uses_feed_what_the_function_makes(name: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = deploy.export(tmp_path / "net", onnx=project / "net.onnx", preprocess=f"{project / 'prep.py'}:{name}")
    images = sorted((project / "images").rglob("*.png"))
    program: dict[str, Any] = {}
    exec(CODE, program)
    expected = np.stack([program["prepare"](Image.open(path)) for path in images])
    found = arrays(artifact, project / "images", monkeypatch)
    np.testing.assert_array_equal(found["eval"], expected)
    np.testing.assert_array_equal(found["predict"], expected)
    order = lambda rows: rows[np.lexsort(rows.reshape(len(rows), -1).T)]  # noqa: E731  (a calibration draws the images in another order)
    np.testing.assert_array_equal(order(found["calibration"]), order(expected))


def made_of(net: Artifact, project: Path, out: Path) -> dict[str, Artifact]:
    images = project / "images"
    return {
        "net": net,
        "half": deploy.convert(net, out / "half", precision="fp16", data=images),
        "half-io": deploy.convert(net, out / "half-io", precision="fp16", fp16_io=True, data=images),
        "int8": deploy.quantize(net, out / "int8", calib=images, eval_folder=images, max_drop=100),
        "engine": deploy.build_trt(net, out / "engine", precision="bf16"),
    }


def test_what_is_made_of_it_has_the_code_and_runs_where_it_was_moved(
    net: Artifact, project: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    code = {"prep.py": net.manifest.files["prep.py"]}
    moved = tmp_path / "elsewhere" / "moved"
    for name, made in made_of(net, project, tmp_path / "out").items():
        assert code.items() <= made.manifest.files.items()
        assert made.manifest.preprocess == net.manifest.preprocess
        shutil.copytree(made.path, moved / name)
    shutil.copytree(project / "images", tmp_path / "images")
    expected = deploy.predict(net, project / "images")
    shutil.rmtree(tmp_path / "out")
    for name in ("net", "half", "half-io", "int8"):
        Artifact.open(moved / name).verify()
        found = deploy.predict(moved / name, tmp_path / "images")
        for one, other in zip(found, expected, strict=True):
            assert dict(one.classes) == pytest.approx(dict(other.classes), abs=0.02)
    (moved / "int8" / "prep.py").write_text(CODE + "\n")
    refused = run("predict", moved / "int8", tmp_path / "images")
    assert (refused.status, "prep.py has " in refused.err) == (1, True)


def test_the_cache_knows_the_code(project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    images = project / "images"

    def quantized(name: str, code: str, function: str = "prepare") -> str:
        (tmp_path / "prep.py").write_text(code)
        artifact = deploy.export(tmp_path / name, onnx=project / "net.onnx", preprocess=f"{tmp_path / 'prep.py'}:{function}")
        caplog.clear()
        made = deploy.quantize(artifact, tmp_path / f"{name}-int8", calib=images)
        assert (made.path / "prep.py").read_text() == code
        made.verify()
        return caplog.text

    assert "made before" not in quantized("one", CODE + "# for this test\n")
    assert "made before" in quantized("same", CODE + "# for this test\n")
    assert "made before" not in quantized("other-code", CODE + "# for this test, edited\n")
    assert "made before" not in quantized("other-function", CODE + "# for this test\n", "prepare_one")


def test_an_export_is_made_again_when_the_code_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "prep.py").write_text("import numpy as np\ndef f(image):\n    return np.zeros((1, 28, 28), np.float32)\n")
    for expected in (False, True, False):
        caplog.clear()
        deploy.export(tmp_path / "net", arch="lenet5", preprocess=f"{tmp_path / 'prep.py'}:f")
        assert ("is up to date" in caplog.text) == expected
        if expected:
            (tmp_path / "prep.py").write_text((tmp_path / "prep.py").read_text() + "# edited\n")


def test_nothing_runs_when_an_artifact_is_opened_inspected_or_listed(
    project: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prep.py").write_text(f"with open({str(tmp_path / 'ran')!r}, 'w'):\n    pass\n" + CODE)
    artifact = deploy.export(tmp_path / "build" / "net", onnx=project / "net.onnx", preprocess="prep.py:prepare")
    (tmp_path / "ran").unlink()
    for arguments in (("inspect",), ("inspect", "build/net"), ("inspect", "build/net", "--json")):
        shown = run(*arguments)
        assert shown.status == 0, shown.err
    assert json.loads(shown.out)["preprocess"]["function"]["sha256"] == artifact.manifest.files["prep.py"].sha256
    assert "prep.py:prepare (the user's code, SHA-256" in run("inspect", "build/net").out
    artifact.verify()
    with load(artifact) as session:
        session(np.zeros((1, 3, 8, 8), np.float32))
    assert not (tmp_path / "ran").exists()
    deploy.predict(artifact, project / "images")
    assert (tmp_path / "ran").exists()
    assert sorted(path.name for path in artifact.path.iterdir()) == ["manifest.json", "model.onnx", "prep.py"]


MISTAKES = [
    ("return np.zeros((3, 8, 9), np.float32)", r"prep\.py:f returns float32 3x8x9 \(.*/prep\.py:2\)"),
    ("return np.zeros((3, 8, 8))", r"prep\.py:f returns float64 3x8x8 \(.*/prep\.py:2\)"),
    ("return image", r"prep\.py:f returns a[n]? \w*Image\w* \(.*/prep\.py:2\)"),
    ("return image.nothing", r"prep\.py:f fails: AttributeError: .* \(.*/prep\.py:3\)"),
    (
        "return np.load(__file__.replace('prep.py', 'mean.npy'))",
        r"FileNotFoundError.*\n(.*\n)?prep\.py alone goes into the artifact",
    ),
]


@pytest.mark.parametrize("images", [None, "data", "eval_folder"])
@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_found_by_the_export_in_the_users_own_file(
    text: str, message: str, images: str | None, project: Path, tmp_path: Path
) -> None:
    (tmp_path / "mean.npy").write_bytes(b"not read")
    good = "if image.filename.endswith('made-up.jpg'):\n        return np.zeros((3, 8, 8), np.float32)\n    " if images else ""
    (tmp_path / "prep.py").write_text(f"import numpy as np\ndef f(image):\n    {good}{text}\n")
    if images:
        message = message.replace("py:3", "py:5")
    more = {images: project / "images"} if images else {}
    with pytest.raises(UserCodeError, match=message) as caught:
        deploy.export(tmp_path / "out", onnx=project / "net.onnx", preprocess=f"{tmp_path / 'prep.py'}:f", **more)
    assert "deploy-" not in str(caught.value)
    assert str(tmp_path / "out") not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_made_up_image_has_a_format_and_the_name_of_a_file(project: Path, tmp_path: Path) -> None:
    code = "assert image.format == 'JPEG' and image.filename\n    return np.zeros((3, 8, 8), np.float32)"
    (tmp_path / "prep.py").write_text(f"import numpy as np\ndef f(image):\n    {code}\n")
    deploy.export(tmp_path / "out", onnx=project / "net.onnx", preprocess=f"{tmp_path / 'prep.py'}:f")


@pytest.mark.parametrize(
    "text",
    [
        "return np.asarray(image, np.float32).transpose(2, 0, 1)",  # images of the input's size only
        "assert image.mode == 'L'\n    return np.asarray(image.convert('RGB').resize((8, 8)), np.float32).transpose(2, 0, 1)",
        "assert image.width > 300\n    return np.zeros((3, 8, 8), np.float32)",
    ],
)
def test_a_function_for_images_of_one_kind_is_taken(text: str, project: Path, tmp_path: Path) -> None:
    (tmp_path / "prep.py").write_text(f"import numpy as np\ndef f(image):\n    {text}\n")
    assert deploy.export(tmp_path / "out", onnx=project / "net.onnx", preprocess=f"{tmp_path / 'prep.py'}:f").manifest.functions


def test_with_images_of_its_own_a_module_is_tried_on_those(project: Path, tmp_path: Path) -> None:
    (tmp_path / "prep.py").write_text(
        "import numpy as np\ndef f(image):\n    assert image.format == 'PNG'\n    return np.ones((1, 28, 28), np.float32)\n"
    )
    spec = f"{tmp_path / 'prep.py'}:f"
    with pytest.raises(UserCodeError, match="AssertionError"):
        deploy.export(tmp_path / "out", arch="lenet5", preprocess=spec)
    made = deploy.export(tmp_path / "out", arch="lenet5", preprocess=spec, data=project / "images")
    assert made.manifest.parity is not None
    assert "images" in {case.data for case in made.manifest.parity.cases}


def test_a_lost_file_of_the_parent_is_named(net: Artifact, tmp_path: Path) -> None:
    shutil.copytree(net.path, tmp_path / "net")
    (tmp_path / "net" / "prep.py").unlink()
    with pytest.raises(ArtifactError, match=r"prep\.py is missing"):
        deploy.convert(tmp_path / "net", tmp_path / "half", precision="fp16")


def test_exif_orientation_needs_a_preprocessing_and_goes_with_each(net: Artifact, project: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`exif_orientation` is a part of the preprocessing"):
        deploy.export(tmp_path / "out", onnx=project / "net.onnx", exif_orientation=True)
    assert net.manifest.preprocess is not None
    assert not net.manifest.preprocess.exif_orientation
    (tmp_path / "p.json").write_text('{"resize": 8, "resize_mode": "letterbox", "fill": 114}')
    for spec in ("none", str(tmp_path / "p.json"), f"{project / 'prep.py'}:prepare"):
        made = deploy.export(tmp_path / "out", onnx=project / "net.onnx", preprocess=spec, exif_orientation=True)
        assert made.manifest.preprocess is not None
        assert made.manifest.preprocess.exif_orientation


def test_a_module_that_is_gone_is_an_error_of_the_artifact_and_not_of_each_image(
    project: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone_later.py").write_text(CODE)
    deploy.export(tmp_path / "net", onnx=project / "net.onnx", preprocess="gone_later:prepare")
    (tmp_path / "gone_later.py").unlink()
    monkeypatch.delitem(sys.modules, "gone_later")
    usercode._loaded.clear()
    result = run("predict", "net", project / "images")
    assert result.status == 1
    assert result.err.count("no module 'gone_later' to import") == 1
