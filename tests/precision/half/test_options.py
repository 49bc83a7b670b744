import subprocess
import sys

import ml_dtypes
import numpy as np

from deploy.precision.half.options import LARGEST, OPSET, PRECISIONS


def test_the_options_load_no_heavy_library():
    code = (
        "import deploy.precision.half.options, sys;"
        "print(*sorted({'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'ml_dtypes', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_largest_numbers_are_those_of_the_formats():
    assert set(PRECISIONS) == set(LARGEST) == set(OPSET)
    assert LARGEST["fp16"] == np.finfo(np.float16).max
    assert LARGEST["bf16"] == float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
