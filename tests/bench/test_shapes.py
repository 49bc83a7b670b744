import msgspec
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import ShapeRange, TensorSpec
from deploy.bench.bench import bench
from deploy.bench.options import BenchOptions
from deploy.bench.plan import make_plan
from deploy.bench.shapes import bench_dims, read_shapes, shown_shapes
from deploy.errors import UsageError


def dynamic(artifact: Artifact, **changes: object) -> Manifest:
    """The manifest of an image model of any size, without a profile or preprocessing but in `changes`."""
    inputs = [TensorSpec(name="x", dtype="float32", shape=("batch", 3, "H", "W"))]
    return msgspec.structs.replace(
        artifact.manifest, **{"inputs": inputs, "profiles": [], "preprocess": None} | changes  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def manifest(shared_lenet5: Artifact) -> Manifest:
    return dynamic(shared_lenet5)


@pytest.mark.parametrize("text", ["x", "=1x2", "x=", "x=1x3xHx4", "x=1x0", "x=1:2", "x=1:"])
def test_text_that_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"shape"):
        BenchOptions(shapes=(text,))


def test_an_input_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"`shapes` names 'x' twice"):
        read_shapes(["x=1x2", "x=1x2"])


def test_shapes_give_the_sizes_whatever_batch_they_name(manifest: Manifest) -> None:
    dims = bench_dims(manifest, read_shapes(["x=7x3x64x80"]))
    assert dims == {"H": 64, "W": 80}
    assert shown_shapes(manifest, dims) == {"x": "batchx3x64x80"}


def test_a_profile_goes_before_the_preprocessing_and_shapes_before_both(shared_lenet5: Artifact) -> None:
    crop = Preprocess(crop=(32, 48))
    assert bench_dims(dynamic(shared_lenet5, preprocess=crop), {}) == {"H": 32, "W": 48}
    profile = {"x": ShapeRange(min=(1, 3, 8, 8), opt=(4, 3, 16, 24), max=(4, 3, 32, 32))}
    both = dynamic(shared_lenet5, preprocess=crop, profiles=[profile])
    assert bench_dims(both, {}) == {"H": 16, "W": 24}
    assert bench_dims(both, {"x": (1, 3, 9, 11)}) == {"H": 9, "W": 11}


def test_the_layout_of_the_preprocessing_is_heeded(shared_lenet5: Artifact) -> None:
    last = [TensorSpec(name="x", dtype="float32", shape=("batch", "H", "W", 3))]
    crop = Preprocess(crop=(32, 48), layout="hwc")
    assert bench_dims(dynamic(shared_lenet5, preprocess=crop, inputs=last), {}) == {"H": 32, "W": 48}


@pytest.mark.parametrize("preprocess", [None, Preprocess(), Preprocess(resize=256)])
def test_a_dimension_without_a_size_names_the_option(shared_lenet5: Artifact, preprocess: Preprocess | None) -> None:
    with pytest.raises(UsageError, match=r"x: float32 batchx3xHxW: .* gives 'H' a size: give it with `shapes` NAME=SHAPE"):
        bench_dims(dynamic(shared_lenet5, preprocess=preprocess), {})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": (1, 3, 8, 8)}, "unknown input 'y'; expected one of x"),
        ({"x": (3, 8, 8)}, "'x' has 3 dimensions 3x8x8; expected x: float32 batchx3xHxW"),
        ({"x": (1, 4, 8, 8)}, "'x' has shape 1x4x8x8; expected x: float32 batchx3xHxW"),
    ],
)
def test_shapes_that_the_inputs_cannot_have_are_refused(
    manifest: Manifest, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UsageError, match=rf"`shapes`: {message}"):
        bench_dims(manifest, shapes)


def test_inputs_that_share_a_dimension_must_agree(shared_lenet5: Artifact) -> None:
    inputs = [TensorSpec(name=name, dtype="float32", shape=("batch", "length")) for name in ("x", "y")]
    manifest = dynamic(shared_lenet5, inputs=inputs)
    assert bench_dims(manifest, {"y": (1, 5)}) == {"length": 5}  # one of them is enough
    with pytest.raises(UsageError, match=r"`shapes`: 'y' has shape 1x6: 'length' is 6 here and 5 in another input"):
        bench_dims(manifest, {"x": (1, 5), "y": (1, 6)})


def test_a_model_of_fixed_sizes_needs_no_shapes(shared_lenet5: Artifact) -> None:
    plan = make_plan([shared_lenet5], BenchOptions(backends=("null",)), named=True)
    assert plan.baseline.sizes(3) == {"batch": 3}
    assert shown_shapes(shared_lenet5.manifest, plan.baseline.dims) == {}


def test_a_dynamic_model_is_measured_at_the_shapes_asked_for(resizable: Artifact) -> None:
    options = BenchOptions(
        baseline="openvino", backends=("onnxruntime",), batches=(1, 2), seconds=0.1, threads=1, shapes=("x=1x3x20x24",)
    )
    result = bench([resizable], options)
    assert [(row.backend, row.batch) for row in result.results] == [
        ("openvino", 1), ("onnxruntime", 1), ("openvino", 2), ("onnxruntime", 2),
    ]  # fmt: skip
    assert result.conditions["shapes"] == {"x": "batchx3x20x24"}
    with pytest.raises(UsageError, match=r"give it with `shapes`"):
        bench([resizable], BenchOptions(backends=("onnxruntime",)))
