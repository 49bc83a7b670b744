import subprocess
import sys

import pytest

from deploy.errors import UsageError
from deploy.precision.int8.options import QuantizeOptions, quantize_settings


def test_the_options_load_no_heavy_library():
    code = (
        "import deploy.precision.int8.options, sys;"
        "print(*sorted({'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'ml_dtypes', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "maximum"}, "max, percentile, mse, entropy"),
        ({"percentile": 5}, "`percentile` must be 50 to 100, not 5"),
        ({"fp8": True, "method": "mse"}, "`method` mse counts the steps of INT8: with `fp8`, take percentile, max or auto"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, not 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        QuantizeOptions(**options)


def test_the_result_does_not_depend_on_the_batch_size():
    assert quantize_settings(QuantizeOptions(batch_size=8)) == quantize_settings(QuantizeOptions(batch_size=2))
    assert quantize_settings(QuantizeOptions(per_tensor=True)) != quantize_settings(QuantizeOptions())


def test_the_default_method_is_that_of_the_codes():
    assert [quantize_settings(QuantizeOptions(fp8=fp8))["method"] for fp8 in (False, True)] == ["auto", "max"]
    assert quantize_settings(QuantizeOptions(method="auto")) == quantize_settings(QuantizeOptions())
    assert QuantizeOptions(fp8=True, method="percentile").chosen_method == "percentile"
