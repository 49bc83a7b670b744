"""Engines are built from typed ONNX files with the real TensorRT-RTX builder, which needs no GPU."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import pytest

from deploy.artifact.manifest import Exclusion
from deploy.artifact.tensors import Profile, ShapeRange
from deploy.engine import builder
from deploy.engine.attestation import check_honoured, network_share
from deploy.engine.builder import BuildOptions, _set_options, build_engine, checked, options_of
from deploy.engine.cuda import Gpu
from deploy.engine.cuda.driver import has_gpu
from deploy.engine.flavour import RTX_TARGETS, Flavour
from deploy.errors import BackendError, EngineError, UsageError
from deploy.precision.macs import count_macs
from tests.engine.graphs import SHAPES, build, mixed, save

MACS = {"stem": 4 * 8 * 8 * 8 * 27, "head": 4 * 5 * 8}


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


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_weights_are_left_out_only_on_a_gpu(rtx: Flavour, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="`strip`: tensorrt-rtx leaves weights out only on a machine with a GPU"):
        build(rtx, mixed(tmp_path / "m.onnx", "fp16"), options=BuildOptions(strip=True))


def test_where_weights_are_left_out_the_engine_is_for_one_kind_of_gpu(
    rtx: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def have(capability: str) -> None:
        gpu = Gpu(name="NVIDIA X", compute_capability=capability, driver=None)
        monkeypatch.setattr(builder, "has_gpu", lambda: True)
        monkeypatch.setattr(builder, "open_device", lambda: SimpleNamespace(gpu=lambda: gpu))

    asked: list[BuildOptions] = []
    monkeypatch.setattr(builder, "_set_options", lambda config, flavour, options: asked.append(options))
    path = mixed(tmp_path / "m.onnx", "fp16")
    have("8.9")
    for targets, taken in (((), ("8.9",)), (("8.6",), ("8.6",))):
        made = build(rtx, path, options=BuildOptions(strip=True, targets=targets))
        assert asked[-1].targets == taken == tuple(made.target.targets)
        assert made.target.stripped
    assert options_of(made.target, Gpu(name="NVIDIA X", compute_capability="8.6", driver=None)).strip
    with pytest.raises(UsageError, match="`strip` with tensorrt-rtx takes one of the `targets` alone"):
        build(rtx, path, options=BuildOptions(strip=True, targets=("8.6", "8.9")))
    have("9.0")
    with pytest.raises(
        BackendError, match="`strip` needs a GPU that tensorrt-rtx runs on: TensorRT-RTX does not run on NVIDIA X"
    ):
        build(rtx, path, options=BuildOptions(strip=True))


def test_weights_that_are_left_out_may_be_others_than_those_of_the_build(rtx: Flavour, tmp_path: Path) -> None:
    config = build(rtx, mixed(tmp_path / "m.onnx", "fp16")).network.builder.create_builder_config()
    for asked in (False, True):
        _set_options(config, rtx, BuildOptions(strip=asked))
        assert config.get_flag(rtx.trt.BuilderFlag.STRIP_PLAN) == config.get_flag(rtx.trt.BuilderFlag.REFIT) == asked
    assert not config.get_flag(rtx.trt.BuilderFlag.REFIT_IDENTICAL)


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
    maker = build(rtx, mixed(tmp_path / "m.onnx", "fp32")).network.builder
    for asked in (False, True):
        config = maker.create_builder_config()
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


@pytest.mark.parametrize("name", ["stem[0]/conv", "a]b[c", "[ONNX Layer: x]", "a b;c"])
def test_a_node_is_found_by_its_name_whatever_is_in_it(rtx: Flavour, tmp_path: Path, name: str) -> None:
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["c"], name=name), onnx.helper.make_node("Relu", ["c"], ["y"], name="r")]
    ends = [onnx.helper.make_tensor_value_info(*each) for each in (("x", 1, (1, 3, 8, 8)), ("y", 1, (1, 4, 6, 6)))]
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight]), ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    sizes = ShapeRange(min=(1, 3, 8, 8), opt=(1, 3, 8, 8), max=(1, 3, 8, 8))
    built = build_engine(rtx, tmp_path / "m.onnx", [{"x": sizes}], BuildOptions())
    assert network_share(built.network.definition, rtx.trt, {name: 1})[1] == {name: "fp32"}


def test_fp8_is_built_for_gpus_that_have_it_alone(rtx: Flavour) -> None:
    assert checked(rtx, BuildOptions(), fp8=True).targets == ("8.9", "12.0")
    assert checked(rtx, BuildOptions(targets=("12.0",)), fp8=True).targets == ("12.0",)
    with pytest.raises(UsageError, match=r"`targets` 8.0, 8.6: FP8 needs compute capability 8.9 or later, and 8.0 is older"):
        checked(rtx, BuildOptions(targets=("8.9", "8.0", "8.6")), fp8=True)


@pytest.mark.parametrize(("capability", "fits"), [("8.6", False), ("8.9", True), ("9.0", True), ("10.0", True)])
def test_fp8_with_tensorrt_is_for_the_gpu_that_is_there(capability: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="NVIDIA X", compute_capability=capability, driver=None)
    monkeypatch.setattr(builder, "open_device", lambda: SimpleNamespace(gpu=lambda: gpu))
    flavour = Flavour(name="tensorrt", version="11.4", trt=SimpleNamespace())  # type: ignore[arg-type]
    if fits:
        assert checked(flavour, BuildOptions(), fp8=True) == BuildOptions()
        with pytest.raises(UsageError, match=r"`hardware_compatible` is for every GPU from compute capability 8.0 on"):
            checked(flavour, BuildOptions(hardware_compatible=True), fp8=True)
    else:
        with pytest.raises(BackendError, match=r"FP8 needs .* and NVIDIA X \(8.6\) is older"):
            checked(flavour, BuildOptions(), fp8=True)
