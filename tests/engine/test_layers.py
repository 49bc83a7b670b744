"""The inspector's description of an engine. Names of tactics, formats and kinds of layers are those of published descriptions."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx

from deploy.engine.layers import EngineLayer, describe, engine_layers, nodes_in
from deploy.errors import EngineError
from tests.engine.graphs import HIDDEN, layer


def read(described: dict[str, Any]) -> EngineLayer:
    return engine_layers(json.dumps({"Layers": [described], "Bindings": ["x", "y"]}))[0]


@pytest.mark.parametrize(
    ("tactic", "precision", "sums"),
    [
        ("sm75_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_tilesize64x32x64", "int8", None),
        ("sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize64x64x64_stage3", "int8", None),
        ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize256x64x32_stage3", "fp16", "fp16"),
        ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f16_nhwckrsc_nhwc_tilesize256x64x32_stage3", "fp16", "fp32"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x64x32", "bf16", "fp32"),
        ("sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize64x128x32", "tf32", "fp32"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x32x16", "tf32", "fp32"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_f32f32_f32f32_f32_nhwckrsc_nhwc_tilesize32x32x8", "fp32", "fp32"),
        ("cutlass3x_sm90_tensorop_s64x128x16gemm_f16_f16_f32_f16_f16_128x128x64", "fp16", "fp32"),
        ("cutlass3x_sm100_tensorop_s128x128x32gemm_f8_f8_f32_f16_f16", "fp8", "fp32"),
        ("cutlass_tensorop_s1688fprop_optimized_tf32_128x64_16x6_nhwc_align4", "tf32", None),
        ("trt_turing_cutlass_image_network_first_layer_hmma_fprop_f16f16f32_nhwc_nhwc_k64r7s7c4_stride2x2", "fp16", None),
        ("ampere_h16816cudnn_128x128_ldg8_relu_exp_stages_64x3_large_nhwc_tn_v1", "fp16", "fp16"),
        ("volta_int8x4_icudnn_int8x4_128x32_relu_xregs_small_c32_nn_v1", None, None),
        ("ampere_scudnn_128x64_relu_xregs_large_nn_v", None, None),
        ("__myl_FcMulErf_0x0f1e2d", None, None),
        ("", None, None),
    ],
)
def test_the_name_of_a_tactic_tells_what_it_multiplies_and_adds_up(tactic: str, precision: str | None, sums: str | None) -> None:
    found = read(layer("a", "CaskConvolution", tactic, "a"))
    assert (found.precision, found.sums) == (precision, sums)


@pytest.mark.parametrize(
    ("inputs", "precision"),
    [
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Half(64,1:8,...)", "fp16"),
        ("BFloat16", "bf16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("FP8", "fp8"),
        ("UInt8", None),
        (HIDDEN, None),
        ("", None),
    ],
)
def test_a_layer_without_a_tactic_computes_in_the_type_of_its_input(inputs: str, precision: str | None) -> None:
    assert read(layer("a", "kgen", "", "a", inputs=inputs)).precision == precision


def test_indices_and_masks_are_no_operands_and_hidden_formats_leave_the_weights() -> None:
    gathered = layer("a", "gemm", "", "a", inputs="Int32")
    gathered["Inputs"] += [{"Name": "mask", "Format/Datatype": "Bool"}, {"Name": "w", "Datatype": "BFloat16"}]
    assert read(gathered).precision == "bf16"
    gathered["Inputs"] = [{"Name": "x", "Format": "Row major linear FP32 format (kLINEAR)", "Datatype": "Half"}]
    assert read(gathered).precision == "fp16"  # as TensorRT 11 has it
    hidden = read(layer("a", "CaskConvolution", "", "a", weights="Half"))
    assert (hidden.precision, hidden.by_weights) == ("fp16", True)
    constant = layer("a", "gemm", "", "a")
    constant["Constants"] = [{"Name": "axes", "Datatype": "Int64"}, {"Name": "w", "Datatype": "BFloat16", "Dimensions": [3, 4]}]
    assert (read(constant).precision, read(constant).by_weights) == ("bf16", True)
    shown = read(layer("a", "CaskConvolution", "", "a", inputs="Half", weights="Int8"))
    assert (shown.precision, shown.by_weights) == ("fp16", False)  # weights in INT8 alone


@pytest.mark.parametrize(
    ("kind", "tactic", "name", "role"),
    [
        ("CaskConvolution", "", "a", "computes"),
        ("CudaDepthwiseConvolution", "", "a", "computes"),
        ("gemm", "", "a", "computes"),
        ("matrix_multiply", "", "a", "computes"),
        ("fusion", "sm80_xmma_gemm_i8i8_i8i32_f32_tn", "__myl_FcCastAddErf", "computes"),
        ("kgen", "_gemm_mha_v2_tactic", "_gemm_mha_v2_myl0_4", "computes"),
        ("kgen", "", "__myl_FcNegExpAddDivMulMul_myl2_7", "computes"),
        ("kgen", "", "__myl_MoveConc_myl2_8", "fused"),
        ("Reformat", "", "Reformatting CopyNode for Input Tensor 0 to conv1", "moves"),
        ("NoOp", "", "conv1/reshape", "moves"),
    ],
)
def test_what_a_layer_does_is_told_by_its_kind_its_tactic_and_the_name_of_generated_code(
    kind: str, tactic: str, name: str, role: str
) -> None:
    assert read(layer(name, kind, tactic)).role == role


def test_nodes_are_in_the_metadata_and_else_in_the_name() -> None:
    assert read(layer("x", "gemm", "", "q_dq", "layer[0]/conv", "a b")).nodes == ("q_dq", "layer[0]/conv", "a b")
    assert nodes_in("[ONNX Layer: a]\x1f[ONNX Layer: b[1]][ONNX Layer: c]") == ("a", "b[1]", "c")
    assert read(layer("Conv_5 + Add_6 + Relu_7", "CaskConvolution")).nodes == ("Conv_5", "Add_6", "Relu_7")
    assert read(layer("/mlp/linear_fc1_14/Gemm_myl5_155", "gemm")).nodes == ("/mlp/linear_fc1_14/Gemm",)


class Inspected:
    """As ICudaEngine, IExecutionContext and IEngineInspector: formats are hidden until a context has the shapes of all inputs."""

    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self) -> None:
        self.execution_context: Any = None
        self.shapes: dict[str, tuple[int, ...]] = {}

    def create_engine_inspector(self) -> "Inspected":
        return self

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, 3, 8, 8) for size in (1, 4, 8)]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_engine_information(self, form: str) -> str:
        known = self.execution_context is self and self.shapes == {"x": (4, 3, 8, 8), "y": (4, 3, 8, 8)}
        return json.dumps({"Layers": [layer("a", "gemm", "", "a", inputs="Half" if known else HIDDEN)]})


@pytest.mark.parametrize(("room", "precision"), [(True, "fp16"), (False, None)])
def test_the_inspector_gets_a_context_with_the_optimal_shapes(room: bool, precision: str | None) -> None:
    fake: Any = Inspected()
    (found,) = engine_layers(describe(fake, fake if room else None, fake, ["x", "y"]))
    assert found.precision == precision


def test_what_the_inspector_is_asked_for_is_there() -> None:
    for kind, names in ((tensorrt_rtx.ICudaEngine, ("create_engine_inspector", "get_tensor_profile_shape")),
                        (tensorrt_rtx.IExecutionContext, ("set_input_shape",)),
                        (tensorrt_rtx.EngineInspector, ("execution_context", "get_engine_information"))):  # fmt: skip
        assert all(hasattr(kind, name) for name in names)


@pytest.mark.parametrize(
    ("described", "reason"),
    [("", "cannot be read"), ("{}", "Layers"), ('{"Layers": ["stem", "tail"]}', "built without detailed verbosity"), ("[1]", "cannot be read")],
)  # fmt: skip
def test_a_description_that_cannot_be_read_is_an_error(described: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        engine_layers(described)
