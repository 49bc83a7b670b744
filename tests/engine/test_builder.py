"""Engines are built from typed ONNX files with the real TensorRT-RTX builder, which needs no GPU."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from deploy.artifact.manifest import Exclusion
from deploy.artifact.tensors import Profile, ShapeRange
from deploy.engine.attestation import check_honoured, network_share
from deploy.engine.builder import BuildOptions, BuiltEngine, _set_options, build_engine, options_of
from deploy.engine.cuda import Gpu
from deploy.engine.flavour import RTX_TARGETS, Flavour, load_flavour
from deploy.engine.network import parse_network
from deploy.errors import EngineError, UsageError
from deploy.precision.macs import count_macs

SHAPES: Profile = {"x": ShapeRange(min=(1, 3, 8, 8), opt=(4, 3, 8, 8), max=(8, 3, 8, 8))}
MACS = {"stem": 4 * 8 * 8 * 8 * 27, "head": 4 * 5 * 8}

# A convolution in `T` and a matrix product in FP32; {c} casts between them.
MIXED = """
    <ir_version: 10, opset_import: ["" : 20]>
    mixed (float[batch, 3, 8, 8] x) => (float[batch, 5] y)
    <{t}[8, 3, 3, 3] w, float[8, 5] v> {{
        [in] a = Cast<to = {code}>(x)
        [stem] b = Conv<pads = [1, 1, 1, 1]>(a, w)
        [pool] c = GlobalAveragePool(b)
        [flat] d = Flatten(c)
        [out] e = Cast<to = 1>(d)
        [head] y = MatMul(e, v)
    }}
"""

QUANTIZED = """
    <ir_version: 10, opset_import: ["" : 20]>
    quantized (float[batch, 3, 8, 8] x) => (float[batch, 8, 8, 8] y)
    <float s = {0.05}, int8 z = {0}, int8[8, 3, 3, 3] w, float ws = {0.02}, int8 wz = {0}> {
        [q] a = QuantizeLinear(x, s, z)
        [dq] b = DequantizeLinear(a, s, z)
        [dqw] c = DequantizeLinear(w, ws, wz)
        [stem] y = Conv<pads = [1, 1, 1, 1]>(b, c)
    }
"""

REFUSED = """
    <ir_version: 10, opset_import: ["" : 20]>
    refused (float[batch, 12, 16] x) => (float[batch, 3, 5, 5] y, float[batch, 3, 5, 5] z)
    <int64[2] image = {5, 5}, int64[2] block = {2, 2}> {
        [first_fold] y = Col2Im(x, image, block)
        a = Neg(x)
        [second_fold] z = Col2Im(a, image, block)
    }
"""

# Between nodes that are taken: two of operators that TensorRT lacks, and two of one that nobody knows.
REFUSED_OF_ALL_SORTS = """
    <ir_version: 10, opset_import: ["" : 20, "com.acme" : 1]>
    refused (float[batch, 12, 16] x) => (float[batch, 3, 5, 5] y, float[batch, 12, 16] v)
    <int64[2] image = {5, 5}, int64[2] block = {2, 2}> {
        r = Relu(x)
        [fold] y = Col2Im(r, image, block)
        [first_odd] t = com.acme.Swirl(r)
        s = Neg(t)
        [second_odd] u = com.acme.Swirl(s)
        [det] w = Det(r)
        v = Add(u, w)
    }
"""


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    return load_flavour("tensorrt-rtx")


def save(text: str, path: Path) -> Path:
    """Write a graph; tensors that are declared and not computed become initializers full of ones."""
    model = onnx.parser.parse_model(text)
    for value in model.graph.value_info:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        ones = np.ones(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        model.graph.initializer.append(onnx.numpy_helper.from_array(ones, value.name))
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


def mixed(path: Path, precision: str) -> Path:
    name, code = {"fp16": ("float16", 10), "bf16": ("bfloat16", 16), "fp32": ("float", 1)}[precision]
    return save(MIXED.format(t=name, code=code), path)


def build(rtx: Flavour, path: Path, profile: Profile = SHAPES, options: BuildOptions | None = None) -> BuiltEngine:
    return build_engine(rtx, path, [profile], options or BuildOptions())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_is_built_and_its_precision_read_back_from_the_network(rtx: Flavour, tmp_path: Path, precision: str) -> None:
    path = mixed(tmp_path / "mixed.onnx", precision)
    built = build(rtx, path)
    assert len(built.plan) > 1000
    assert built.target.flavour == "tensorrt-rtx"
    assert built.target.gpu is None
    macs = count_macs(onnx_ir.load(path), {"x": SHAPES["x"].opt})
    assert macs == MACS
    share, by_node = network_share(built.network.definition, rtx.trt, macs)
    assert by_node == {"stem": precision, "head": "fp32"}
    assert share.origin == "network"
    stem = MACS["stem"] / sum(MACS.values())
    assert getattr(share, precision) == pytest.approx(1 if precision == "fp32" else stem)
    assert share.int8 == 0


def test_a_layer_behind_dequantize_linear_counts_as_int8(rtx: Flavour, tmp_path: Path) -> None:
    path = save(QUANTIZED, tmp_path / "quantized.onnx")
    built = build(rtx, path)
    share, _ = network_share(built.network.definition, rtx.trt, count_macs(onnx_ir.load(path), {"x": SHAPES["x"].opt}))
    assert share.int8 == 1


def test_a_network_in_fp32_does_not_pass_for_fp16(rtx: Flavour, tmp_path: Path) -> None:
    path = mixed(tmp_path / "mixed.onnx", "fp32")
    macs = count_macs(onnx_ir.load(path), {"x": SHAPES["x"].opt})
    _, by_node = network_share(build(rtx, path).network.definition, rtx.trt, macs)
    with pytest.raises(EngineError, match=r"fp16 was asked for, and 0% .* stem \(fp32\), head \(fp32\)"):
        check_honoured("fp16", by_node, macs, [], "engine")
    with pytest.raises(EngineError, match="head"):
        check_honoured("fp16", by_node, macs, [Exclusion(node="stem", reason="overflow")], "engine")
    excluded = [Exclusion(node=node, reason="overflow") for node in MACS]
    check_honoured("fp16", by_node, macs, excluded, "engine")
    check_honoured("fp32", by_node, macs, [], "engine")


def test_progress_is_told_while_building(rtx: Flavour, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_engine(rtx, mixed(tmp_path / "m.onnx", "fp16"), [SHAPES], BuildOptions(), lambda *step: seen.append(step))
    assert ("parsing", 0, 0) in seen
    assert any(done == total > 0 for _, done, total in seen)


def test_every_refused_node_is_listed_by_name_with_a_remedy(rtx: Flavour, tmp_path: Path) -> None:
    path = save(REFUSED, tmp_path / "refused.onnx")
    shapes = ShapeRange(min=(1, 12, 16), opt=(1, 12, 16), max=(1, 12, 16))
    with pytest.raises(EngineError) as caught:
        build(rtx, path, {"x": shapes})
    text = str(caught.value)
    assert "refuses 2 nodes" in text
    assert "Col2Im 'first_fold'" in text
    assert "Col2Im 'second_fold'" in text
    assert "transposed convolution" in text


def test_refused_nodes_of_all_sorts_are_listed_in_one_run(rtx: Flavour, tmp_path: Path) -> None:
    path = save(REFUSED_OF_ALL_SORTS, tmp_path / "refused.onnx")
    with pytest.raises(EngineError) as caught:
        parse_network(rtx, path)
    first, *lines = str(caught.value).splitlines()
    assert "refuses 4 nodes" in first
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "Col2Im 'fold'", "Det 'det'", "Swirl 'first_odd'", "Swirl 'second_odd'",
    ]  # fmt: skip
    assert all("; " in line for line in lines)  # the remedy


def test_an_operator_that_tensorrt_does_not_know_is_named_with_its_domain(rtx: Flavour, tmp_path: Path) -> None:
    graph = """
        <ir_version: 10, opset_import: ["" : 20, "com.acme" : 1]>
        swirls (float[batch, 3, 8, 8] x) => (float[batch, 3, 8, 8] y) { a = Relu(x) [odd] y = com.acme.Swirl(a) }
    """
    with pytest.raises(EngineError) as caught:
        build_engine(rtx, save(graph, tmp_path / "swirls.onnx"), [SHAPES], BuildOptions(), shown="their file")
    first, second = str(caught.value).splitlines()
    assert first.endswith("refuses 1 node of their file:")
    assert second.startswith("  Swirl 'odd': operator Swirl of domain com.acme is not known to tensorrt-rtx; replace it")


def test_a_file_that_is_no_onnx_is_an_error(rtx: Flavour, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot parse .*bad\.onnx"):
        build(rtx, tmp_path / "bad.onnx")


def test_a_profile_that_does_not_fit_is_an_error(rtx: Flavour, tmp_path: Path) -> None:
    wrong = ShapeRange(min=(1, 4, 8, 8), opt=(1, 4, 8, 8), max=(1, 4, 8, 8))
    with pytest.raises(EngineError, match="Dimension mismatch for tensor x and profile 0"):
        build(rtx, mixed(tmp_path / "m.onnx", "fp32"), {"x": wrong})


@pytest.mark.parametrize(
    "options",
    [BuildOptions(tf32=True), BuildOptions(opt_level=0), BuildOptions(opt_level=5)],
)
def test_builder_options_are_taken(rtx: Flavour, tmp_path: Path, options: BuildOptions) -> None:
    assert build(rtx, mixed(tmp_path / "m.onnx", "fp32"), options=options).plan


def test_options_that_the_flavour_does_not_have_are_refused(rtx: Flavour, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`timing_cache`: tensorrt-rtx times nothing"):
        build(rtx, mixed(tmp_path / "m.onnx", "fp32"), options=BuildOptions(timing_cache=tmp_path / "cache"))
    for option in (BuildOptions(version_compatible=True), BuildOptions(hardware_compatible=True)):
        with pytest.raises(UsageError, match="tensorrt-rtx has neither"):
            build(rtx, mixed(tmp_path / "m.onnx", "fp32"), options=option)
    with pytest.raises(UsageError, match="0 to 5"):
        BuildOptions(opt_level=9)


def test_an_engine_is_built_for_the_targets_that_are_named(rtx: Flavour, tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.onnx", "fp16")
    every = build(rtx, path)
    one = build(rtx, path, options=BuildOptions(targets=("8.9",)))
    two = build(rtx, path, options=BuildOptions(targets=("8.0", "12.0")))
    assert (every.target.targets, one.target.targets) == (list(RTX_TARGETS), ["8.9"])
    assert two.target.targets == ["8.0", "12.0"]
    with pytest.raises(EngineError, match=r"Cannot compile operation 'head' for Turing \(SM75\): FP32 GEMM is not supported"):
        build(rtx, path, options=BuildOptions(targets=("7.5",)))
    with pytest.raises(
        UsageError, match=r"`targets` 9\.0: tensorrt-rtx \S+ builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1, and not for it"
    ):
        build(rtx, path, options=BuildOptions(targets=("9.0",)))
    for wrong in ("sm89", "89", "8.9.1", ""):
        with pytest.raises(UsageError, match="compute capabilities such as"):
            BuildOptions(targets=(wrong,))
    with pytest.raises(UsageError, match="twice"):
        BuildOptions(targets=("8.9", "8.9"))


def test_the_workspace_is_limited(rtx: Flavour, tmp_path: Path) -> None:
    built = build(rtx, mixed(tmp_path / "m.onnx", "fp16"), options=BuildOptions(workspace=64))
    assert built.target.workspace == 64
    config = built.network.builder.create_builder_config()
    _set_options(config, rtx, BuildOptions(workspace=64))
    assert config.get_memory_pool_limit(rtx.trt.MemoryPoolType.WORKSPACE) == 64 << 20
    with pytest.raises(UsageError, match="1 MiB or more"):
        BuildOptions(workspace=0)


def test_tf32_is_off_unless_asked_for(rtx: Flavour, tmp_path: Path) -> None:
    builder = build(rtx, mixed(tmp_path / "m.onnx", "fp32")).network.builder
    for asked in (False, True):
        config = builder.create_builder_config()
        assert config.get_flag(rtx.trt.BuilderFlag.TF32)  # TensorRT's own default
        _set_options(config, rtx, BuildOptions(tf32=asked))
        assert config.get_flag(rtx.trt.BuilderFlag.TF32) == asked


def test_ctrl_c_stops_a_build_at_its_next_step(rtx: Flavour, tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.onnx", "fp16")
    whole: list[str] = []
    build_engine(rtx, path, [SHAPES], BuildOptions(), lambda phase, *_: whole.append(phase))
    phases: list[str] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        if len(phases) == 2:  # the first is of parsing
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does, while TensorRT is at work
            time.sleep(0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(rtx, path, [SHAPES], BuildOptions(), interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    stopped = len(phases)
    time.sleep(0.1)
    assert 2 <= len(phases) == stopped < len(whole)


@pytest.mark.parametrize("starts", [True, False], ids=["after", "before"])
def test_ctrl_c_while_the_thread_of_the_build_starts_leaves_no_build_behind(
    rtx: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name != "deploy build":
            return start(thread)
        if starts:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    phases: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        build_engine(rtx, mixed(tmp_path / "m.onnx", "fp16"), [SHAPES], BuildOptions(), lambda phase, *_: phases.append(phase))
    stopped = len(phases)
    time.sleep(0.2)
    assert len(phases) == stopped


def test_an_error_of_the_progress_callback_ends_the_build_and_is_raised(rtx: Flavour, tmp_path: Path) -> None:
    def fail(phase: str, done: int, total: int) -> None:
        if phase != "parsing":
            raise ZeroDivisionError(phase)

    with pytest.raises(ZeroDivisionError):
        build_engine(rtx, mixed(tmp_path / "m.onnx", "fp16"), [SHAPES], BuildOptions(), fail)


def test_several_profiles_are_built_into_one_engine(rtx: Flavour, tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.onnx", "fp16")
    large: Profile = {"x": ShapeRange(min=(16, 3, 8, 8), opt=(32, 3, 8, 8), max=(64, 3, 8, 8))}
    one, two = (build_engine(rtx, path, profiles, BuildOptions()) for profiles in ([SHAPES], [SHAPES, large]))
    assert len(two.plan) > len(one.plan)


def test_what_an_engine_is_rebuilt_with_is_what_it_was_built_with(rtx: Flavour, tmp_path: Path) -> None:
    asked = BuildOptions(opt_level=2, tf32=True, workspace=32, targets=("8.6",))
    target = build(rtx, mixed(tmp_path / "m.onnx", "fp16"), options=asked).target
    ada = Gpu(name="Fake", compute_capability="8.9", driver=None)
    assert options_of(target, ada) == dataclasses.replace(asked, targets=())  # those that are always built for hold it
    turing = Gpu(name="Fake", compute_capability="7.5", driver=None)
    assert options_of(target, turing).targets == ("7.5",)


COLLECTION_WHILE_TENSORRT_LOGS = """
import gc
import sys
import threading
from pathlib import Path

from deploy.engine import network
from deploy.engine.flavour import load_flavour

make_logger = network.make_logger


def collecting(trt):
    log = make_logger(trt)

    class Collecting(type(log)):
        def log(self, severity, message):
            if gc.isenabled():  # what Python does on its own, only not as seldom
                gc.collect()
            super().log(severity, message)

    return Collecting()


rtx = load_flavour("tensorrt-rtx")
garbage = []
garbage += [garbage, network.parse_network(rtx, Path(sys.argv[1]))]  # a cycle, as a traceback makes one
gc.disable()
del garbage
network.make_logger = collecting
gc.enable()
network.parse_network(rtx, Path(sys.argv[1]))
assert gc.isenabled()
print("done")
"""


def test_garbage_that_holds_an_older_builder_is_not_collected_while_tensorrt_logs(rtx: Flavour, tmp_path: Path) -> None:
    path = save(MIXED.format(t="float16", code=10), tmp_path / "model.onnx")
    command = [sys.executable, "-c", COLLECTION_WHILE_TENSORRT_LOGS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "done\n", done.stderr
