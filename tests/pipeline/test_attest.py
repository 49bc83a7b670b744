"""What a GPU is asked of a new engine. There is none here: the typed ONNX file on ONNX Runtime stands for the engine."""

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import onnx
import onnx_ir
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, file_digest
from deploy.artifact.summary import summary
from deploy.engine.flavour import load_flavour
from deploy.errors import ArtifactError, EngineError, ParityError, UsageError
from deploy.pipeline import attest, build_trt
from deploy.pipeline.attest import check_faster, engine_parity, largest_batch
from deploy.precision.macs import count_macs
from deploy.runtime.load import open_session
from deploy.runtime.profiling import LayerTime
from deploy.runtime.session import Session, SessionOptions
from tests.processors import processors

FORMATS = {"fp32": "Float", "fp16": "Half", "int8": "Int8"}


class OnTheCpu:
    """As a TensorRTSession on an engine: it computes as the typed file does, and is as slow and as far off as asked for."""

    def __init__(self, engine: Artifact, *, built: str | None = None, delay_s: float = 0.0, off: float = 0.0) -> None:
        plain = msgspec.structs.replace(engine.manifest, kind="onnx", target=None)
        self._session: Session = open_session(Artifact(engine.path, plain), "onnxruntime")
        self._built = FORMATS[built or engine.manifest.precision]
        sizes = {spec.name: engine.manifest.profiles[0][spec.name].opt for spec in engine.manifest.inputs}
        self._nodes = list(count_macs(onnx_ir.load(engine.onnx_path), sizes))
        self._delay_s = delay_s
        self._off = off
        self.inputs = self._session.inputs
        self.profiles = self._session.profiles
        self.dims = self._session.dims

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self._delay_s)
        return {name: array + self._off for name, array in self._session.run(feed).items()}

    def warmup(self, feed: Mapping[str, np.ndarray], runs: int) -> None:
        self._session.warmup(feed, 1)

    def to_device(self, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return feed

    def information(self) -> str:
        layers = [
            {
                "Name": node,
                "LayerType": "CaskConvolution",
                "TacticName": "",
                "Inputs": [{"Format/Datatype": self._built}],
                "Metadata": f"[ONNX Layer: {node}]",
            }
            for node in self._nodes
        ]
        return json.dumps({"Layers": layers})

    def layer_times(self, feed: Mapping[str, np.ndarray]) -> list[LayerTime]:
        return [LayerTime(name=node, operator="CaskConvolution", ms=0.1) for node in self._nodes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session.close()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`gpu(...)` lets engines be tried as `OnTheCpu(engine, ...)`, those in FP16 that they are timed against without a delay.

    No other program disturbs that.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(attest, "SLICE_S", 0.03)
    rtx = load_flavour("tensorrt-rtx")
    monkeypatch.setattr(build_trt, "load_flavour", lambda name: rtx)

    def open_one(engine: Artifact, backend: str, settings: SessionOptions, **options: Any) -> OnTheCpu:
        assert backend == "tensorrt-rtx:cuda_graph"  # what is timed here is the GPU, and not the launches of its kernels
        return OnTheCpu(engine, **options if engine.manifest.precision == "int8" else {})

    def have(**options: Any) -> None:
        monkeypatch.setattr(build_trt, "gpu_identity", lambda: ["Fake GPU", "9.0", "580.95"])
        monkeypatch.setattr(attest, "open_engine", lambda engine: OnTheCpu(engine, **options))
        monkeypatch.setattr(attest, "open_session", functools.partial(open_one, **options))

    with processors():
        yield have


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"input": rng.normal(size=(4, 1, 28, 28)).astype(np.float32)} for _ in range(4)]


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_on_a_gpu_the_engine_is_attested_and_compared(
    lenet5: Artifact, tmp_path: Path, gpu: Callable[..., None], precision: Any
) -> None:
    gpu()
    engine = deploy.build_trt(lenet5, tmp_path / "engine", precision=precision)
    engine.verify()
    share, parity = engine.manifest.precision_share, engine.manifest.engine_parity
    assert share is not None
    assert (share.origin, getattr(share, precision or "fp32")) == ("engine", 1)
    assert share.layers == share.time
    assert share.time is not None
    assert share.time[precision or "fp32"] == pytest.approx(1)
    assert parity is not None
    assert parity.by == f"tensorrt-rtx {load_flavour('tensorrt-rtx').version} on Fake GPU"
    assert parity.against == engine.manifest.files[ONNX].sha256 == file_digest(engine.onnx_path)
    assert [case.batch for case in parity.cases] == [1, 8]
    text = summary(engine)
    assert "(attested: the engine itself tells the precision of 100.0%)" in text
    assert "of the layers" in text
    assert "of the GPU time" in text
    assert "against the typed ONNX file on random batches 1, 8 (tensorrt-rtx" in text
    assert "the engine itself has not been run" not in text


def test_an_engine_that_was_built_in_another_precision_is_refused(
    lenet5: Artifact, tmp_path: Path, gpu: Callable[..., None]
) -> None:
    gpu(built="fp32")
    with pytest.raises(EngineError, match=r"fp16 was asked for, and 0% of the multiply-accumulates run in it"):
        deploy.build_trt(lenet5, tmp_path / "engine", precision="fp16")
    assert not (tmp_path / "engine").exists()


def test_an_engine_that_computes_something_else_is_refused(lenet5: Artifact, tmp_path: Path, gpu: Callable[..., None]) -> None:
    gpu(off=1.0)
    with pytest.raises(ParityError, match=r"the engine for .*: output 'logits' is off by 1 at batch 1"):
        deploy.build_trt(lenet5, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_int8_that_is_slower_than_fp16_is_refused_unless_allowed(
    lenet5: Artifact, tmp_path: Path, gpu: Callable[..., None]
) -> None:
    gpu(delay_s=0.01)
    with pytest.raises(
        EngineError, match=r"INT8 is slower than FP16 here at batch 32, 0\.\d+ times as fast .* keep it with `allow_slower`"
    ):
        deploy.build_trt(lenet5, tmp_path / "engine", int8=True, calib=feeds())
    assert not (tmp_path / "engine").exists()
    engine = deploy.build_trt(lenet5, tmp_path / "engine", int8=True, calib=feeds(), allow_slower=True)
    assert (engine.path / ENGINE).is_file()
    with pytest.raises(UsageError, match="`allow_slower` needs `int8`"):
        deploy.build_trt(lenet5, tmp_path / "other", allow_slower=True)


def test_an_int8_artifact_is_timed_against_the_model_that_it_was_made_from(
    lenet5: Artifact, tmp_path: Path, gpu: Callable[..., None]
) -> None:
    gpu(delay_s=0.01)
    quantized = deploy.quantize(lenet5, tmp_path / "quantized", calib=feeds())
    with pytest.raises(EngineError, match="INT8 is slower than FP16 here"):
        deploy.build_trt(quantized, tmp_path / "engine", int8=True)
    deploy.build_trt(quantized, tmp_path / "engine")  # as it is: nobody asked for INT8 to be worth it
    with pytest.raises(ArtifactError, match=r"has no FP32 artifact that it was made from, .*`allow_slower` leaves that out"):
        alone = tmp_path / "alone.onnx"
        alone.write_bytes(quantized.onnx_path.read_bytes())
        deploy.build_trt(alone, tmp_path / "other", int8=True)


def test_an_rtx_engine_that_this_gpu_cannot_run_is_attested_from_the_network(
    lenet5: Artifact, tmp_path: Path, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu()
    monkeypatch.setattr(attest, "open_engine", lambda engine: None)
    engine = deploy.build_trt(lenet5, tmp_path / "engine", precision="fp16")
    assert engine.manifest.precision_share is not None
    assert engine.manifest.precision_share.origin == "network"
    assert engine.manifest.engine_parity is None


def test_parity_follows_the_batches_of_the_profile(lenet5: Artifact, tmp_path: Path) -> None:
    engine = deploy.build_trt(lenet5, tmp_path / "engine", shapes=["input=2x1x28x28:3x1x28x28:4x1x28x28"])
    with OnTheCpu(engine) as session:
        parity = engine_parity(session, engine, "Fake GPU")  # type: ignore[arg-type]
    assert [case.batch for case in parity.cases] == [2, 3]
    assert parity.worst.max_abs < 1e-5


@pytest.mark.parametrize(("int8_s", "fp16_s", "worth"), [(0.0, 0.03, True), (0.03, 0.0, False)])
def test_the_two_are_timed_in_turns(lenet5: Artifact, tmp_path: Path, int8_s: float, fp16_s: float, worth: bool) -> None:
    engine = deploy.build_trt(lenet5, tmp_path / "engine")
    with processors(), OnTheCpu(engine, delay_s=int8_s) as int8, OnTheCpu(engine, delay_s=fp16_s) as fp16:
        if worth:
            assert check_faster(int8, fp16, "net", "INT8").value > 1.5  # type: ignore[arg-type]
        else:
            with pytest.raises(EngineError, match="net: INT8 is slower than FP16 here"):
                check_faster(int8, fp16, "net", "INT8")  # type: ignore[arg-type]


def test_a_gate_that_other_programs_disturb_refuses_only_what_is_slower_all_the_same(
    lenet5: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attest, "SLICE_S", 0.01)
    monkeypatch.setattr(attest, "ROUNDS", 5)
    engine = deploy.build_trt(lenet5, tmp_path / "engine")
    with OnTheCpu(engine, delay_s=0.03) as slow, OnTheCpu(engine, delay_s=0.0075) as fast, caplog.at_level(logging.WARNING):
        with processors(waiting=0.7):
            ratio = check_faster(slow, fast, "net", "INT8")  # type: ignore[arg-type]
        assert ratio.value < 1 < ratio.high  # either may have been 5 times too slow
        assert "net: whether INT8 is faster than FP16 at batch 32 is uncertain, 0." in caplog.text
        assert "threads waited for a core in" in caplog.text
        with processors(waiting=0.1), pytest.raises(EngineError, match="INT8 is slower"):
            check_faster(slow, fast, "net", "INT8")  # type: ignore[arg-type]


def test_the_two_are_timed_at_the_largest_batch_of_all_profiles(
    lenet5: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attest, "SLICE_S", 0.001)
    shapes = ["input=8x1x28x28:8x1x28x28:16x1x28x28", "input=1x1x28x28:2x1x28x28:4x1x28x28"]
    engine = deploy.build_trt(lenet5, tmp_path / "engine", shapes=shapes)
    with OnTheCpu(engine) as session:
        seen: list[int] = []
        plain = session.run
        monkeypatch.setattr(session, "run", lambda feed: [seen.append(feed["input"].shape[0]), plain(feed)][1])
        check_faster(session, session, "net", "INT8")  # type: ignore[arg-type]
        assert set(seen) == {16}
        monkeypatch.setattr(session, "profiles", ())
        assert largest_batch(session) == session.dims()  # type: ignore[arg-type]


def test_the_typed_file_is_the_one_that_is_compared_with(lenet5: Artifact, tmp_path: Path) -> None:
    engine = deploy.build_trt(lenet5, tmp_path / "engine", precision="fp16")
    with OnTheCpu(engine) as session:
        model = onnx.load(engine.onnx_path)
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 2:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float16(2), tensor.name))
        onnx.save(model, engine.onnx_path)
        with pytest.raises(ParityError):
            engine_parity(session, engine, "Fake GPU")  # type: ignore[arg-type]
