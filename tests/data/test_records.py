import csv
import json

import msgspec
import numpy as np
import pytest
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import TensorSpec
from deploy.data.calibration_set import calibration_set
from deploy.data.image_folder import image_batches, image_feeds
from deploy.data.records import record_input
from deploy.errors import DataError, UsageError

IMAGE = TensorSpec(name="image", dtype="float32", shape=("N", 1, 4, 4))
NAMES = [f"{label}/{index}.png" for label in ("dark", "light") for index in range(3)]


@pytest.fixture
def folder(tmp_path):
    """Six 4 x 4 images of the shades 0 to 5, in two classes."""
    for shade, name in enumerate(NAMES):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), shade).save(tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def net(tmp_path, make_artifact):
    """Makes an artifact that takes an image and inputs of the given names, dtypes and shapes."""

    def make(*inputs: tuple[str, str, tuple[int | str, ...]], first: TensorSpec = IMAGE, **changes: object) -> Artifact:
        artifact = make_artifact(tmp_path, ("N", 1, 4, 4))
        specs = [first, *(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in inputs)]
        return Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, inputs=specs, **changes), artifact.bare)

    return make


def write(folder, columns, rows):
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", *columns], *([name, *row] for name, row in zip(NAMES, rows, strict=False))])


VECTORS = [[shade + 0.5, -shade] for shade in range(6)]


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (["v_0", "v_1"], VECTORS),
        (["v_1", "other", "v_0"], [[second, "x", first] for first, second in VECTORS]),
        (["v"], [[json.dumps(vector)] for vector in VECTORS]),
    ],
    ids=["a column an element", "in another order", "a list"],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_image_comes_with_the_numbers_of_its_row(net, folder, columns, rows, batch_size):
    write(folder, columns, rows)
    seen = {}
    for feed in calibration_set(net(("v", "float32", ("N", 2))), folder).feeds(batch_size):
        assert feed["v"].dtype == np.float32
        seen |= {int(image[0, 0, 0]): vector.tolist() for image, vector in zip(feed["image"], feed["v"], strict=True)}
    assert seen == dict(enumerate(VECTORS))


@pytest.mark.parametrize(
    ("dtype", "shape", "cell", "expected"),
    [
        ("float32", ("N",), "1.5", 1.5),
        ("float16", ("N", 1), "1.5", [1.5]),
        ("float64", ("N", 1), "1e300", [1e300]),
        ("int64", ("N",), str(2**60 + 1), 2**60 + 1),
        ("int32", ("N",), "3.0", 3),
        ("uint8", ("N", 2), "[0, 255]", [0, 255]),
        ("bool", ("N", 2), "[true, false]", [True, False]),
        ("bool", ("N",), "True", True),
        ("float32", ("N", 2, 2), "[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("float32", ("N", 2, 2), "[1, 2, 3, 4]", [[1, 2], [3, 4]]),
        ("int64", ("N", "T"), "[5, 6, 7]", [5, 6, 7]),
    ],
)
def test_a_cell_becomes_what_the_input_takes(net, folder, dtype, shape, cell, expected):
    write(folder, ["v"], [[cell]] * 6)
    found = record_input(net(("v", dtype, shape)), [folder]).load(folder / NAMES[0])["v"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "shape", "cell", "message"),
    [
        ("float32", ("N",), "", "'' in 'v' is no number"),
        ("float32", ("N",), "tall", "'tall' in 'v' is no number"),
        ("float32", ("N",), "nan", "is missing, none or not finite: nan"),
        ("float32", ("N",), "-inf", "is missing, none or not finite: -inf"),
        ("float64", ("N", 2), "[1, Infinity]", r"is missing, none or not finite: \[1.0, inf\]"),
        ("int64", ("N",), "inf", "is missing, none or not finite: inf"),
        ("float32", ("N",), "1e39", "1e.39 of 'v' is no float32"),
        ("int64", ("N",), "1.5", "1.5 of 'v' is no int64"),
        ("uint8", ("N",), "256", "256 of 'v' is no uint8"),
        ("bool", ("N",), "2", "2 of 'v' is no bool"),
        ("float32", ("N", 2), "[1, 2, 3]", "has 3 for 'v'; expected 2"),
        ("float32", ("N", 2), "1", "has one number for 'v'; expected 2"),
        ("float32", ("N", 2), "[1, null]", "is missing, none or not finite"),
        ("float32", ("N", 2), "[1, 2", r"'\[1, 2' in 'v' is no number, and no list"),
        ("float32", ("N", 2, 2), "[[1, 2], [3]]", r"the lists in 'v' are not all of one length: \[\[1, 2\], \[3\]\]"),
    ],
)
def test_a_cell_that_the_input_cannot_take_is_named_with_its_row(net, folder, dtype, shape, cell, message):
    write(folder, ["v"], [[cell]] * 6)
    with pytest.raises(DataError, match=rf"metadata\.csv: the row of dark/0\.png.*{message}|{message}"):
        record_input(net(("v", dtype, shape)), [folder]).load(folder / NAMES[0])


@pytest.mark.parametrize(("cell", "message"), [("[0.5]", r"\[0\.5\] in 'v_0' is not one number"), ("inf", "not finite")])
def test_a_cell_of_one_element_that_is_not_one_number_is_named(net, folder, cell, message):
    write(folder, ["v_0", "v_1"], [[cell, 1]] * 6)
    with pytest.raises(DataError, match=rf"metadata\.csv: the row of dark/0\.png: .*{message}"):
        record_input(net(("v", "float32", ("N", 2))), [folder]).load(folder / NAMES[0])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["w"], "has no column 'v' for v: float32 Nx2, and none for each element, v_0 to v_1; it has file_name, w"),
        (["v_0"], "has 1 columns v_0 to v_0; expected v: float32 Nx2: one for each element, v_0 to v_1"),
        (["v_0", "v_1", "v_2"], "has 3 columns v_0 to v_2; expected"),
        (["v_1", "v_2"], "has 2 columns v_1 to v_2; expected"),
    ],
)
def test_columns_that_are_not_those_of_the_input_are_refused_at_once(net, folder, columns, message):
    write(folder, columns, [[1] * len(columns)] * 6)
    with pytest.raises(DataError, match=message):
        record_input(net(("v", "float32", ("N", 2))), [folder])


def test_an_input_called_like_an_element_of_another_is_itself(net, folder):
    write(folder, ["v", "v_0"], [["[1, 2]", 3]] * 6)
    found = record_input(net(("v", "float32", ("N", 2)), ("v_0", "float32", ("N",))), [folder]).load(folder / NAMES[0])
    assert found["v"].tolist() == [1, 2]
    assert found["v_0"] == 3


def test_a_table_that_is_not_there_and_an_image_without_a_row_are_named(net, folder):
    artifact = net(("v", "float32", ("N", 1)))
    with pytest.raises(
        DataError, match=r"takes 'v' with every image, and .*data has no table of it: metadata\.csv or metadata\.par"
    ):
        record_input(artifact, [folder])
    write(folder, ["v"], [[1]] * 5)
    with pytest.raises(DataError, match=r"light/2\.png has no row in .*metadata\.csv"):
        record_input(artifact, [folder]).load(folder / NAMES[5])


def test_rows_whose_images_are_not_there_are_named(net, folder, caplog):
    write(folder, ["v"], [[1]] * 6)
    (folder / NAMES[1]).unlink()
    (folder / NAMES[2]).unlink()
    data = calibration_set(net(("v", "float32", ("N", 1))), folder)
    assert "no image at" in caplog.text
    assert "dark/1.png" in caplog.text
    assert "nor 1 more" in caplog.text
    assert data.count == 4


@pytest.mark.parametrize(
    "inputs",
    [[("v", "float32", (2,))], [("v", "float32", ())], [("v", "float32", ("T", 2))], [("v", "bfloat16", ("N", 2))]],
    ids=["without the batch", "a scalar", "another dimension", "bfloat16"],
)
def test_an_input_that_has_no_row_an_image_is_refused(net, folder, inputs):
    write(folder, ["v"], [[1]] * 6)
    with pytest.raises(UsageError, match="takes"):
        record_input(net(*inputs), [folder])


def test_every_image_input_has_its_own_preprocessing(net, folder, tmp_path):
    Image.new("RGB", (2, 2), (7, 8, 9)).save(tmp_path / "right.png")
    write(folder, ["right"], [["../right.png"], ["../gone.png"], [""]])
    doubled = Preprocess(scale=2.0)
    artifact = net(("right", "float32", ("N", 3, 2, 2)), image="image", other_images={"right": doubled})
    source = record_input(artifact, [folder])
    found = source.load(folder / NAMES[0])
    assert found["image"].shape == (1, 4, 4)
    np.testing.assert_array_equal(found["right"][:, 0, 0], [14, 16, 18])
    with pytest.raises(DataError, match=r"the row of dark/1\.png: no image at .*gone\.png"):
        source.load(folder / NAMES[1])
    with pytest.raises(DataError, match=r"the row of dark/2\.png names no image in 'right'"):
        source.load(folder / NAMES[2])


def test_of_two_inputs_that_images_could_be_the_manifest_says_which(net, folder):
    write(folder, ["map"], [[json.dumps(np.ones((1, 4, 4)).tolist())]] * 6)
    inputs = ("map", "float32", ("N", 1, 4, 4))
    with pytest.raises(UsageError, match="images can be fed to a model with one input of four"):
        record_input(net(inputs), [folder])
    found = record_input(net(inputs, image="image"), [folder]).load(folder / NAMES[3])
    assert (found["image"].max(), found["map"].max()) == (3, 1)


def test_a_fixed_batch_is_filled_in_every_input(net, folder):
    write(folder, ["v"], [[shade] for shade in range(6)])
    first = TensorSpec(name="image", dtype="float32", shape=(4, 1, 4, 4))
    feeds = list(image_feeds(net(("v", "int64", (4,)), first=first), folder, batch_size=1, count=6))
    assert [(feed["image"].shape, feed["v"].shape) for feed in feeds] == [((4, 1, 4, 4), (4,))] * 2
    for feed in feeds:
        np.testing.assert_array_equal(feed["image"][:, 0, 0, 0], feed["v"])


def test_rows_of_many_sizes_go_one_by_one(net, folder):
    write(folder, ["v"], [[json.dumps([1] * (shade + 1))] for shade in range(6)])
    source = record_input(net(("v", "int64", ("N", "T"))), [folder])
    size, reason = source.batch_size(8)
    assert (size, reason) == (1, "images go one by one, because 'v' may be of many sizes")
    samples = [(folder / name, 0) for name in NAMES]
    assert [feed["v"].shape for feed, _ in image_batches(source, samples, size)] == [(1, count) for count in range(1, 7)]


def test_the_digest_is_of_the_table_and_the_images_it_names_too(net, folder, tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "right.png")
    artifact = net(
        ("right", "float32", ("N", 1, 4, 4)),
        ("v", "float32", ("N",)),
        image="image",
        other_images={"right": Preprocess(channels=1)},
    )
    digests = []
    for value, shade in ((1, 7), (2, 7), (2, 8)):
        write(folder, ["v", "right"], [[value, "../right.png"]] * 6)
        Image.new("L", (4, 4), shade).save(tmp_path / "right.png")
        digests.append(calibration_set(artifact, folder).digest())
    assert len(set(digests)) == 3
