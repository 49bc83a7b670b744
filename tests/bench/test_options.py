import pytest

from deploy.bench.options import BenchOptions, parse_backends
from deploy.errors import UsageError


def test_a_comma_parts_backends_and_variants() -> None:
    texts = ["onnxruntime:cuda,openvino", "eager:fp16,channels_last,tensorrt", "null", "openvino"]
    assert parse_backends(texts) == ("onnxruntime:cuda", "openvino", "eager:fp16,channels_last", "tensorrt", "null")
    assert parse_backends(["eager,fp16"]) == ("eager", "fp16")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backends": ("tensorflow",)}, "unknown backend 'tensorflow'; expected auto or one of onnxruntime"),
     ({"backends": ("eager:int8",)}, "eager has no variant 'int8'"), ({"batches": (0,)}, "batch size"),
     ({"seconds": 0.0}, "`seconds` must be more than 0"), ({"load_seconds": -1.0}, "`load_seconds` must be more than 0"),
     ({"threads": 0}, "`threads` must be 1 or more"), ({"baseline": "tensorrt-rtx"}, "an engine or a package cannot be the baseline"),
     ({"shapes": ("x",)}, "cannot read `shapes` 'x'; expected NAME=SHAPE")],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchOptions(**options)  # type: ignore[arg-type]
