import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image

from deploy.artifact.preprocess import Preprocess
from deploy.data.image_folder import image_batches
from deploy.data.images import image_input
from deploy.data.records import RecordInput
from deploy.errors import DataError, UsageError, UserCodeError


def test_an_image_file_becomes_what_the_model_takes(tmp_path, make_artifact):
    Image.new("L", (4, 4), 7).save(tmp_path / "7.png")
    found = image_input(make_artifact(tmp_path, ("N", 1, 4, 4))).load(tmp_path / "7.png")
    np.testing.assert_array_equal(found, np.full((1, 4, 4), 7, dtype=np.float32))
    with pytest.raises(UsageError, match="makes 1x4x4 of"):
        image_input(make_artifact(tmp_path, ("N", 1, 4, 5))).load(tmp_path / "7.png")
    with pytest.raises(DataError, match="no image at"):
        image_input(make_artifact(tmp_path, ("N", 1, 4, 4))).load(tmp_path / "8.png")


@pytest.mark.parametrize(
    ("preprocess", "wanted", "size"),
    [
        (Preprocess(crop=8), 7, 7),
        (Preprocess(resize=(8, 8)), 7, 7),
        (Preprocess(resize=8), 7, 1),
        (Preprocess(), 7, 1),
        (Preprocess(), 1, 1),
    ],
)
def test_the_batch_size_is_one_where_sizes_differ(tmp_path, preprocess, wanted, size, make_artifact):
    found, reason = image_input(make_artifact(tmp_path, ("N", 3, "H", "W"), preprocess=preprocess)).batch_size(wanted)
    assert found == size
    assert bool(reason) == (wanted != size)


def with_function(tmp_path, make_artifact, text, *shape, dtype=TensorProto.FLOAT):
    (tmp_path / "prep.py").write_text(f"import numpy as np\n\ndef f(image):\n    {text}\n")
    preprocess = Preprocess.load(f"{tmp_path / 'prep.py'}:f", None)
    Image.new("L", (4, 4), 7).save(tmp_path / "7.png")
    return image_input(make_artifact(tmp_path, shape, preprocess=preprocess, dtype=dtype))


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("return np.full((1, 4, 4), 7, np.float32)", ("N", 1, 4, 4), TensorProto.FLOAT),
        ("return np.full((1, 1, 4, 4), 7, np.float32)", ("N", 1, 4, 4), TensorProto.FLOAT),
        ("return np.full((1, 1, 4, 4), 7, np.float32)", (1, 1, 4, 4), TensorProto.FLOAT),
        ("return np.full((1, 4, 4), 7, np.float32)", ("N", 1, "H", "W"), TensorProto.FLOAT),
        ("return np.full((1, 4, 4), 7, np.float32)", ("N", 1, 4, 4), TensorProto.FLOAT16),
        ("return np.full((1, 4, 4), 7, np.float16)", ("N", 1, 4, 4), TensorProto.FLOAT16),
        ("return np.full((1, 4, 4), 7, np.uint8)", ("N", 1, 4, 4), TensorProto.UINT8),
        ("return np.full((1, 4, 4), 7, np.int64)", ("N", 1, 4, 4), TensorProto.INT64),
        ("return np.full((16,), 7, np.float32)", ("N", 16), TensorProto.FLOAT),
        ("return np.full((1, 16), 7, np.float32)", ("N", 16), TensorProto.FLOAT),
        ("return np.full((5, 1, 4, 4), 7, np.float32)", ("N", 5, 1, 4, 4), TensorProto.FLOAT),
    ],
)
def test_a_function_may_make_any_input_with_or_without_the_batch(tmp_path, make_artifact, text, shape, dtype):
    source = with_function(tmp_path, make_artifact, text, *shape, dtype=dtype)
    for data in (tmp_path / "7.png", (tmp_path / "7.png").read_bytes()):
        image = source.load(data)
        assert image.ndim == len(shape) - 1
        assert (image == 7).all()
    (feed,) = [feed for feed, _ in image_batches(RecordInput(images=(source,)), [(tmp_path / "7.png", 0)], 1)]
    assert feed["x0"].dtype == source.spec.dtype
    assert feed["x0"].shape == (1, *image.shape)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("return np.zeros((1, 4, 5), np.float32)", ("N", 1, 4, 4), "returns float32 1x4x5"),
        ("return np.zeros((4, 4, 1), np.float32)", ("N", 1, 4, 4), "returns float32 4x4x1"),
        ("return np.zeros((2, 1, 4, 4), np.float32)", ("N", 1, 4, 4), "returns float32 2x1x4x4"),
        ("return np.zeros((4, 4), np.float32)", ("N", 1, 4, 4), "returns float32 4x4"),
        ("return np.zeros((), np.float32)", ("N", 1, 4, 4), "returns float32 scalar"),
        ("return np.zeros((1, 4, 4))", ("N", 1, 4, 4), "returns float64 1x4x4"),
        ("return np.full((1, 4, 4), np.nan, np.float32)", ("N", 1, 4, 4), "returns NaN or infinity"),
        ("return np.full((1, 4, 4), -np.inf, np.float32)", ("N", 1, 4, 4), "returns NaN or infinity"),
        ("return np.zeros((1, 4, 4), np.uint8)", ("N", 1, 4, 4), "returns uint8 1x4x4"),
        ("return np.zeros((1, 4, 4), object)", ("N", 1, 4, 4), "returns object 1x4x4"),
    ],
)
def test_an_array_that_does_not_fit_is_named_with_the_function_and_its_line(tmp_path, make_artifact, text, shape, message):
    source = with_function(tmp_path, make_artifact, text, *shape)
    with pytest.raises(UserCodeError, match=rf"7\.png: prep\.py:f {message} \(.*/prep\.py:3\); the model takes x0: float32"):
        source.load(tmp_path / "7.png")


def test_a_function_is_for_models_with_one_input_and_does_not_run_before_an_image_comes(tmp_path, make_artifact):
    (tmp_path / "prep.py").write_text("1 / 0\ndef f(image): ...\n")
    preprocess = Preprocess.load(f"{tmp_path / 'prep.py'}:f", None)
    with pytest.raises(UsageError, match="images can be fed to a model with one input"):
        image_input(make_artifact(tmp_path, ("N", 4), ("N", 4), preprocess=preprocess))
    source = image_input(make_artifact(tmp_path, ("N", 4), preprocess=preprocess))
    Image.new("L", (4, 4), 7).save(tmp_path / "7.png")
    with pytest.raises(UserCodeError, match="ZeroDivisionError"):
        source.load(tmp_path / "7.png")


@pytest.mark.parametrize("module", ["deploy.data.images", "deploy.evaluation.classifier"])
def test_what_a_service_needs_loads_no_calibration(module):
    code = f"import {module}, sys; print(*[name for name in sys.modules if name.startswith(('deploy.calibration', 'torch', 'onnx'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
