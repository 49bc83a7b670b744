"""What a GPU says of a new engine: the precision of its layers, the time they take, what it computes, and whether INT8 or FP8 pays."""

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import onnx_ir

from deploy.artifact.artifact import Artifact, parent_record
from deploy.artifact.manifest import ENGINE, ONNX, Manifest, PrecisionShare, Stage
from deploy.artifact.onnxfile import load_model
from deploy.artifact.tensors import Profile, TensorSpec, batch_dim, random_feed
from deploy.artifact.writer import ArtifactWriter
from deploy.engine.attestation import check_honoured, engine_share, network_share
from deploy.engine.builder import BuiltEngine, build_engine
from deploy.engine.flavour import Flavour
from deploy.engine.layers import engine_layers
from deploy.engine.options import BuildOptions
from deploy.errors import BackendError, EngineError
from deploy.evidence.disturbance import Measured, Round, Turn, take_rounds, take_turn
from deploy.evidence.parity import TOLERANCES, Parity, Tolerance, compare, constant_outputs, tiny_outputs
from deploy.evidence.timing import Ratio, sample
from deploy.host.versions import tool_versions
from deploy.pipeline.stage import fp32_source
from deploy.precision.cpu import CpuGraph
from deploy.precision.formats import ConvertOptions
from deploy.precision.half.convert import convert_onnx
from deploy.precision.half.emulate import Emulate
from deploy.precision.macs import Macs, count_macs
from deploy.precision.prepare import Prepare
from deploy.progress import Progress
from deploy.runtime.backends.tensorrt import TensorRTSession
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions

logger = logging.getLogger(__name__)

ROUNDS, SLICE_S, SAMPLES = 9, 0.1, 2000
_WARMUP = 10
_THREADS = 1
"""What a session on a GPU needs of the processor: the thread that launches."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Share of the multiply-accumulates, the layers and the time in each precision, precision by node, and parity."""

    share: PrecisionShare
    by_node: dict[str, str]
    parity: Parity


def open_engine(engine: Artifact) -> TensorRTSession | None:
    """A session on a new engine; None on a machine whose GPU tensorrt-rtx does not build for.

    Raises BackendError where a `tensorrt` engine, which was built on this GPU, cannot be loaded.
    """
    target = engine.manifest.target
    assert target is not None
    try:
        session = open_session(engine, target.flavour, SessionOptions(contexts=1))
    except BackendError as error:
        if target.flavour == "tensorrt":
            raise
        logger.warning("the engine cannot run on this machine, and its precision is read from the typed network: %s", error)
        return None
    assert isinstance(session, TensorRTSession)
    return session


def prove(
    session: TensorRTSession,
    engine: Artifact,
    typed: Mapping[str, str],
    macs: Macs,
    gpu: str,
    tolerance: Tolerance | None = None,
) -> Proof:
    """Attest the engine as it was built, and compare it with its typed ONNX file.

    typed: precision by node of the typed network. macs: multiply-accumulates by node. gpu: its name. Raises EngineError and ParityError.
    """
    feed = random_feed(session.inputs, session.dims())
    times = {layer.name: layer.ms for layer in session.layer_times(feed)}
    share, by_node = engine_share(engine_layers(session.information()), typed, macs, times)
    return Proof(share=share, by_node=by_node, parity=engine_parity(session, engine, gpu, tolerance))


def engine_parity(session: Session, engine: Artifact, gpu: str, tolerance: Tolerance | None = None) -> Parity:
    """Compare what `session` computes on `gpu` with the typed ONNX file of `engine`, on random input.

    The batches are those of `_batches`. The ONNX file runs on ONNX Runtime, half precision emulated in FP32. Raises
    ParityError beyond the tolerance of the precision.
    """
    manifest = engine.manifest
    assert manifest.target is not None
    tolerance = tolerance or TOLERANCES[manifest.precision]
    model = load_model(engine.onnx_path)
    Prepare()(model)
    Emulate()(model)
    reference = CpuGraph(model)
    dims = session.dims()
    batch = batch_dim(session.inputs)
    cases, references = [], []
    for seed, size in enumerate(_batches(session, batch), start=1):
        feed = random_feed(session.inputs, {**dims, batch: size} if batch else dims, seed=seed)
        expected = reference({name: _as_fp32(array) for name, array in feed.items()})
        references.append(expected)
        cases.append(
            compare(
                session.run(feed), expected, tolerance, data="random", batch=size, what=f"the engine for {engine.manifest.name}"
            )
        )
    return Parity(
        against=manifest.files[ONNX].sha256,
        by=f"{manifest.target.flavour} {manifest.target.version} on {gpu}",
        tolerance=tolerance,
        cases=cases,
        constant=constant_outputs(references),
        tiny=tiny_outputs(references, cases, tolerance),
    )


def check_faster(quantized: TensorRTSession, fp16: Session, what: str, label: str) -> Ratio:
    """How many times as fast as FP16 the `quantized` engine, in `label` (`INT8`, `FP8`), is, at the largest batch, on arrays in device memory, measured in turns.

    Small batches would time the launches of kernels, which cost both the same. Raises EngineError when it is slower, beyond the
    interval of the ratio, which is as wide as what other programs did on the processors allows (`disturbance`); where that makes the
    ratio uncertain and it may be faster, a warning says so.
    """
    dims = largest_batch(quantized)
    feed = quantized.to_device(random_feed(quantized.inputs, dims))
    sessions: dict[str, Session] = {"fp16": fp16, label: quantized}
    for session in sessions.values():
        session.warmup(feed, _WARMUP)

    def turn(session: Session) -> Turn:
        return take_turn(os.getpid(), _THREADS, lambda: sample(lambda: session.run(feed), SLICE_S, SAMPLES))

    rounds: list[Round[str]] = []
    take_rounds(lambda _: Round({name: turn(session) for name, session in sessions.items()}), ROUNDS, rounds)
    measured = Measured.of(rounds, ROUNDS)
    ratio = measured.ratio("fp16", label)
    batch = batch_dim(quantized.inputs)
    where = f" at batch {dims[batch]}" if batch else ""
    spread = f"{ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
    if ratio.high < 1:
        raise EngineError(
            f"{what}: {label} is slower than FP16 here{where}, {spread};"
            " build it in FP16, leave layers out with `exclude`, or keep it with `allow_slower`"
        )
    if measured.certain(label) and measured.certain("fp16"):
        logger.info("%s is %s%s", label, spread.replace(" (", " as FP16 ("), where)
    else:
        logger.warning(
            "%s: whether %s is faster than FP16%s is uncertain, %s: %s; compare the two with `deploy bench` on a quieter machine",
            what, label, where, spread, measured.reason(*sessions),
        )  # fmt: skip
    return ratio


def largest_batch(session: Session) -> dict[str, int]:
    """Sizes of the symbolic dimensions: the largest batch of all profiles, and the optimum of its profile for the others."""
    batch = batch_dim(session.inputs)
    if batch is None or not session.profiles:
        return session.dims()
    spec = next(spec for spec in session.inputs if batch in spec.shape)
    axis = spec.shape.index(batch)
    profile = max(session.profiles, key=lambda profile: profile[spec.name].max[axis])
    sizes = {
        dim: profile[each.name].opt[place]
        for each in session.inputs
        if each.name in profile
        for place, dim in enumerate(each.shape)
        if isinstance(dim, str)
    }
    return {**session.dims(), **sizes, batch: profile[spec.name].max[axis]}


def _batches(session: Session, batch: str | None) -> list[int]:
    """The smallest and the optimal batch of the first profile; the one there is where the batch is fixed."""
    if batch is None or not session.profiles:
        return [_fixed(session.inputs)]
    spec = next(spec for spec in session.inputs if batch in spec.shape)
    shapes = session.profiles[0][spec.name]
    axis = spec.shape.index(batch)
    return sorted({shapes.min[axis], shapes.opt[axis]})


def _fixed(inputs: tuple[TensorSpec, ...]) -> int:
    first = inputs[0].shape[0] if inputs and inputs[0].shape else 1
    return first if isinstance(first, int) else 1


def _as_fp32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def optimum(profiles: list[Profile]) -> dict[str, tuple[int, ...]]:
    return {name: shapes.opt for name, shapes in profiles[0].items()}


def write_engine(
    writer: ArtifactWriter,
    typed: Manifest,
    source: Artifact,
    built: BuiltEngine,
    profiles: list[Profile],
    flavour: Flavour,
    stage: Stage,
) -> Manifest:
    """Write an engine beside the typed ONNX file that it was built from; its manifest, without what a GPU says of it.

    typed: the manifest of that file. source: the artifact that it was made from.
    """
    (writer.path / ENGINE).write_bytes(built.plan)
    return msgspec.structs.replace(
        typed,
        kind="engine",
        name=writer.out.resolve().name,
        parent=parent_record(source, writer.out),
        profiles=profiles,
        tools=tool_versions() | {flavour.name: flavour.version},
        stage=stage,
        target=built.target,
    )


def attested(
    engine: Artifact,
    source: Artifact,
    built: BuiltEngine,
    flavour: Flavour,
    options: BuildOptions,
    *,
    gpu: list[str] | None,
    faster_than_fp16: bool,
    tolerance: Tolerance | None = None,
    progress: Progress,
) -> Manifest:
    """The manifest of a new engine with its precision share, and what `gpu`, by its name, says of it.

    Raises EngineError when the precision is not honoured, or the engine must be `faster_than_fp16` and is not.
    """
    manifest = engine.manifest
    macs = count_macs(onnx_ir.load(engine.onnx_path), optimum(manifest.profiles))
    share, by_node = network_share(built.network.definition, flavour.trt, macs)
    what = f"{source.shown} with {flavour.name}"
    parity = None
    session = open_engine(engine) if gpu else None
    if gpu and session is not None:
        with session:
            progress("attesting the engine")
            proof = prove(session, engine, by_node, macs, gpu[0], tolerance)
        share, by_node, parity = proof.share, proof.by_node, proof.parity
        check_honoured(manifest.precision, by_node, macs, manifest.exclusions, what, tf32=built.target.tf32)
        if faster_than_fp16:
            _check_worth(engine, source, flavour, options, what, progress)
    else:
        check_honoured(manifest.precision, by_node, macs, manifest.exclusions, what)
    return msgspec.structs.replace(manifest, precision_share=share, engine_parity=parity)


def _check_worth(
    engine: Artifact, source: Artifact, flavour: Flavour, options: BuildOptions, what: str, progress: Progress
) -> None:
    """Build the FP32 model that the quantized engine comes from in FP16, and time the two, with CUDA graphs. Raises EngineError."""
    label = engine.manifest.precision.upper()
    floating = fp32_source(source, f"{label} is timed against FP16, which is made from it (`allow_slower` leaves that out)")
    progress(f"timing {label} against FP16")
    profiles = engine.manifest.profiles
    converted = convert_onnx(floating, None, ConvertOptions(precision="fp16", profile=profiles[0]))
    with tempfile.TemporaryDirectory(prefix="deploy-") as folder, ArtifactWriter(Path(folder, "fp16")) as writer:
        converted.save(writer.path / ONNX)
        built = build_engine(flavour, writer.path / ONNX, profiles, options, progress, shown=f"{what} in FP16")
        (writer.path / ENGINE).write_bytes(built.plan)
        manifest = msgspec.structs.replace(
            engine.manifest, precision="fp16", target=built.target, inputs=converted.inputs, outputs=converted.outputs
        )
        half = writer.describe(manifest)
        backend, settings = f"{flavour.name}:cuda_graph", SessionOptions(contexts=1)
        with open_session(engine, backend, settings) as quantized, open_session(half, backend, settings) as fp16:
            check_faster(cast(TensorRTSession, quantized), fp16, what, label)
