from typing import Any

import pytest

from deploy.errors import UsageError
from deploy.pipeline.build_trt_options import BuildTrtOptions
from deploy.precision.int8.options import QuantizeOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8": True, "fp8": True}, "`int8` and `fp8` exclude one another"),
        ({"fp8": True, "precision": "bf16"}, "`fp8` takes fp16 for the rest"),
        ({"int8": True, "precision": "fp16", "fp16_io": True}, "`int8` takes fp16 for the rest"),
        ({"allow_slower": True}, "`allow_slower` needs `int8` or `fp8`"),
        ({"quantization": QuantizeOptions(method="max")}, "the options of quantization need `int8` or `fp8`"),
        ({"int8": True, "quantization": QuantizeOptions(fp8=True)}, "are options beside it"),
        ({"fp8": True, "quantization": QuantizeOptions(method="mse")}, "`method` mse counts the steps of INT8"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildTrtOptions(**options)


def test_what_is_quantized_to_and_the_rest_are_said_once() -> None:
    assert BuildTrtOptions(precision="fp16").quantize is None
    quantization = QuantizeOptions(per_tensor=True)
    options = BuildTrtOptions(fp8=True, precision="fp16", quantization=quantization)
    assert (options.quantizes, options.quantize) == ("fp8", QuantizeOptions(per_tensor=True, fp8=True, fp16=True))
