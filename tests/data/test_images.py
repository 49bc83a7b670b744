import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from deploy.artifact.preprocess import Preprocess
from deploy.data.images import image_input
from deploy.errors import DataError, UsageError


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


@pytest.mark.parametrize("module", ["deploy.data.images", "deploy.evaluation.classifier"])
def test_what_a_service_needs_loads_no_calibration(module):
    code = f"import {module}, sys; print(*[name for name in sys.modules if name.startswith(('deploy.calibration', 'torch', 'onnx'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
