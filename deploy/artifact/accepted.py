"""What ONNX Runtime says of a graph that ONNX's own checker refuses: operators that ONNX has deprecated, or never had, run there."""

from deploy.host.extras import missing

try:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
except ImportError as error:
    raise missing(error, "a check of a graph that onnx refuses") or error from error

_FATAL_ONLY = 4


def refusal(model: bytes | str) -> str:
    """Why ONNX Runtime refuses a serialized graph, or the file at a path; "" where it takes it.

    A graph that it understands and has no kernel for, as for some operators in bfloat16, is taken.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except NoKernel:
        return ""
    except Exception as error:  # ONNX Runtime's errors have no common base
        return str(error)
    return ""
