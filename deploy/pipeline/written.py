"""The written file, run on every backend of the CPU that is installed, against the source that it was made from."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest
from deploy.artifact.onnxfile import load_model
from deploy.artifact.tensors import Feed, TensorSpec, dynamic_sizes, format_shape, row_count, size_of_batch
from deploy.data.evidence_feeds import NamedFeed
from deploy.errors import BackendError, DeployError, ParityError, PrecisionError
from deploy.evidence.parity import TOLERANCES, BackendParity, Parity, ParityCase, Tolerance, constant_outputs, judge, tiny_outputs
from deploy.host.memory import release
from deploy.precision.cpu import ONNXRUNTIME_VERSION, CpuGraph
from deploy.precision.half.emulate import Emulate
from deploy.precision.int8.cpu_form import CpuForm
from deploy.precision.int8.stored import Stored
from deploy.progress import Progress
from deploy.runtime.catalog import AUTO, BACKENDS, CPU_FORMS, onnx_file
from deploy.runtime.load import import_backend, open_session
from deploy.runtime.session import SessionOptions

logger = logging.getLogger(__name__)

_NO_MEMORY = re.compile("bad_alloc|failed to allocate|out of memory", re.IGNORECASE)
"""What ONNX Runtime and OpenVINO say where memory runs out."""


class Case(NamedTuple):
    """One feed, and what the source makes of it, by output name.

    maybe: of sizes nobody named. A backend other than the default one need not run it, but if it does it must be right.
    """

    data: str
    feed: Feed
    expected: Feed
    maybe: bool = False


def source_cases(source: Artifact, feeds: Sequence[NamedFeed]) -> list[Case]:
    """What the ONNX file of `source` makes of `feeds`, as it is written, with ONNX Runtime.

    A feed that it cannot run is left out if it need not run. Raises PrecisionError for another.
    """
    run: CpuGraph | None = None
    cases: list[Case] = []
    tried: list[str] = []
    other = False
    for data, feed, maybe, expected in feeds:
        if maybe and other:
            continue  # one other size is enough
        if expected is None:
            run = run or _opened(source)
            try:
                expected = run(copied(feed))
            except PrecisionError as error:
                if data != "random" and cases and row_count(feed) > row_count(cases[0].feed):  # rows that nobody gave together
                    logger.warning("%s does not run with %d rows: it is compared without", source.shown, row_count(feed))
                    continue
                if maybe:
                    tried += [f"{dim} {size}" for dim, size in dynamic_sizes(source.manifest.inputs, feed).items()]
                    continue
                shapes = ", ".join(f"{name} {format_shape(array.shape)}" for name, array in feed.items())
                made_up = "made-up input" if data == "random" else "input"
                raise PrecisionError(
                    f"{source.shown} cannot run {made_up} of the sizes {shapes}: {error}\nsay what it takes: give feeds with"
                    " `data`, a folder of .npz files"
                ) from error
        if not maybe or all(np.isfinite(array).all() for array in expected.values() if array.dtype.kind == "f"):
            cases.append(Case(data, feed, expected, maybe))
            other = other or maybe
    del run
    release(source.size)
    if tried and not other:
        logger.warning("%s does not run with %s: it is compared at one size alone", source.shown, ", ".join(tried))
    return cases


def _opened(source: Artifact) -> CpuGraph:
    try:
        return CpuGraph.read(source.onnx_path)
    except PrecisionError as error:
        raise PrecisionError(f"{source.shown} cannot be compared with: {error}") from error


def prove(
    written: Artifact,
    cases: Sequence[Case],
    tolerance: Tolerance,
    *,
    against: str,
    emulated: bool = False,
    engine: bool = False,
    remedy: str,
    progress: Progress,
) -> Parity:
    """The parity of the written ONNX file with its source, by the default backend, or `emulated` in half precision.

    engine: the file is what an engine is built from: no backend of the CPU is to run it. remedy: what to try if it is too far
    off. Raises ParityError where the emulation, or the default backend, is beyond the tolerance.
    """
    what = f"{written.manifest.name} in {written.manifest.precision.upper()}"
    release(written.size)  # what it was made from
    backends = [] if engine else _on_backends(written, cases, tolerance, progress)
    if emulated or engine or not backends:
        by = f"{'emulation on ' * emulated}onnxruntime {ONNXRUNTIME_VERSION}"
        progress("comparing the emulated file with its source" if emulated else "comparing with its source")
        first = judged(_file_runner(written, emulated=emulated), by, written.manifest.inputs, cases, tolerance)
        release(written.size)
        failed = [first, *backends[:1]]
    else:
        first = backends[0]
        failed = [first]
    for each in failed:
        if each.wrong is not None:
            raise ParityError(f"{what} on {each.by}: {each.wrong}; nothing was written: {remedy}")
    expected = [case.expected for case in cases]
    return Parity(
        against=against,
        by=first.by,
        tolerance=tolerance,
        cases=first.cases,
        backends=backends,
        constant=constant_outputs(expected),
        tiny=tiny_outputs(expected, first.cases, tolerance),
    )


def prove_cpu_form(written: Artifact, cases: Sequence[Case], tolerance: Tolerance, *, against: str, progress: Progress) -> Parity:
    """The parity of the CPU form of `written` on ONNX Runtime, in a session of the backend where that takes the file here.

    Raises ParityError where it is beyond the tolerance.
    """
    progress("comparing the CPU form")
    assert written.cpu_path is not None
    if onnx_file(written, CPU_FORMS) == written.cpu_path:
        with open_session(written, CPU_FORMS, SessionOptions(device="cpu")) as session:
            by = f"onnxruntime {ONNXRUNTIME_VERSION}"
            found = judged(session.run, by, written.manifest.inputs, cases, tolerance, backend=CPU_FORMS)
    else:
        by = f"onnxruntime {ONNXRUNTIME_VERSION} without VNNI, in 32 bits"
        found = judged(CpuGraph.read(written.cpu_path, cpu_form=True), by, written.manifest.inputs, cases, tolerance)
    release(written.size)
    if found.wrong is not None:
        raise ParityError(f"on {by}: {found.wrong}")
    expected = [case.expected for case in cases]
    constant, tiny = constant_outputs(expected), tiny_outputs(expected, found.cases, tolerance)
    return Parity(against=against, by=by, tolerance=tolerance, cases=found.cases, constant=constant, tiny=tiny)


def check_unrounded(written: Artifact, stored: Stored, cases: Sequence[Case], progress: Progress) -> None:
    """Compare the written quantized file, with what it rounds undone, with its source.

    Raises ParityError beyond the tolerance of FP32; where the rest is FP16, beyond that of BF16, for the tolerance of the file
    decides how exact it must be.
    """
    progress("comparing the file without its rounding")
    model = load_model(written.onnx_path)
    stored.unround(model)
    half = any(value.dtype == ir.DataType.FLOAT16 for value in model.graph.initializers.values())
    run = _emulated(model) if half else CpuGraph(model)
    found = judged(run, "", written.manifest.inputs, cases, TOLERANCES["bf16" if half else "fp32"])
    del run, model
    release(2 * stored.size)  # the weights, and what was laid out of them
    if found.wrong is not None:
        raise ParityError(
            f"{written.manifest.name} computes something else than its source, {stored.codes.label} aside: {found.wrong};"
            " nothing was written"
        )


def check_cpu_form(form: CpuForm, path: Path, manifest: Manifest, cases: Sequence[Case], progress: Progress) -> None:
    """Compare the CPU form in the file `path`, with what it rounds undone but for its biases, with the source.

    Raises ParityError beyond the tolerance of FP16: steps of a bias are far below those of activations.
    """
    progress("comparing the CPU form without its rounding")
    found = judged(CpuGraph(form.unrounded(path)), "", manifest.inputs, cases, TOLERANCES["fp16"])
    release(2 * form.stored.size)
    if found.wrong is not None:
        raise ParityError(f"it computes something else than its source, INT8 aside: {found.wrong}")


def copied(feed: Feed) -> Feed:
    """The same numbers in memory of their own: what runs on a feed may write to it."""
    return {name: array.copy() for name, array in feed.items()}


def _on_backends(written: Artifact, cases: Sequence[Case], tolerance: Tolerance, progress: Progress) -> list[BackendParity]:
    """Each backend that `auto` may take and that can open the file, ONNX Runtime first. One that cannot is said to."""
    found: list[BackendParity] = []
    for name in AUTO:
        try:
            by = f"{name} {import_backend(BACKENDS[name]).version(())}"
        except BackendError:
            continue  # not installed
        progress(f"comparing on {name}")
        try:
            session = open_session(written, name, SessionOptions(device="cpu"))
        except BackendError as error:
            logger.warning("%s cannot open the file, and is left out: %s", by, error)
            continue
        with session:
            found.append(judged(session.run, by, written.manifest.inputs, cases, tolerance, backend=name, first=not found))
        del session
        release(written.size)
    return found


def _file_runner(written: Artifact, *, emulated: bool) -> Callable[[Feed], Feed]:
    return _emulated(load_model(written.onnx_path)) if emulated else CpuGraph.read(written.onnx_path)


def _emulated(model: ir.Model) -> Callable[[Feed], Feed]:
    Emulate()(model)
    run = CpuGraph(model)
    return lambda feed: run({name: _plain(array) for name, array in feed.items()})


def judged(
    run: Callable[[Feed], Feed],
    by: str,
    inputs: Sequence[TensorSpec],
    cases: Sequence[Case],
    tolerance: Tolerance,
    *,
    backend: str = "",
    first: bool = True,
) -> BackendParity:
    """Every case until one is wrong. first: of the default backend, which must run every case.

    Raises BackendError and PrecisionError where memory runs out.
    """
    judged: list[ParityCase] = []
    wrong = None
    for case in cases:
        sizes, rows = dynamic_sizes(inputs, case.feed), size_of_batch(inputs, case.feed)
        try:
            results = {name: _plain(array) for name, array in run(_fitted(case.feed, inputs)).items()}
        except DeployError as error:
            if _NO_MEMORY.search(str(error)):
                raise  # that says nothing of the file
            if case.maybe and not first:
                continue
            wrong = f"it fails on {case.data} input at batch {rows}: {error}"
            break
        found, reason = judge(results, case.expected, tolerance, data=case.data, batch=rows, sizes=sizes)
        if reason:
            wrong = reason
            break
        judged.append(found)
    return BackendParity(backend=backend, by=by, cases=judged, wrong=wrong)


def _fitted(feed: Feed, inputs: Sequence[TensorSpec]) -> Feed:
    """A copy of `feed` with floats of the file's own type."""
    return {
        spec.name: feed[spec.name].astype(spec.dtype if spec.dtype == "float16" else feed[spec.name].dtype) for spec in inputs
    }


def _plain(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array
