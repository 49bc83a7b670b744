"""The stage `export` of a bare ONNX file: prepared once, for everything that is made from it, and compared with the file."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.decode import Decode
from deploy.artifact.manifest import ONNX, Manifest
from deploy.artifact.onnxfile import declare_shapes, external_files, load_graph, load_model, model_specs, open_onnx, save_model
from deploy.artifact.tensors import Dim, default_profile, format_shape, parse_shapes, row_count
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.data.calibration_set import CalibrationSet, calibration_set
from deploy.data.evidence_feeds import parity_feeds
from deploy.data.npz_folder import holds_npz
from deploy.errors import PrecisionError
from deploy.evaluation.gate import Expected, check_expected
from deploy.evidence.parity import TOLERANCES, Tolerance, judge
from deploy.host.versions import tool_versions
from deploy.pipeline.export_interface import (
    check_classes,
    check_decode,
    copy_decode,
    copy_functions,
    image_fields,
    load_preprocesses,
    read_classes,
    try_decode,
    upright,
)
from deploy.pipeline.export_options import ExportOptions
from deploy.pipeline.export_parity import REAL_ROWS
from deploy.pipeline.written import Case, copied, prove
from deploy.precision.constants import FoldConstants
from deploy.precision.cpu import CpuGraph
from deploy.precision.graph import opset_version
from deploy.precision.int8.options import OPSET
from deploy.precision.prepare import Prepare
from deploy.progress import Progress, silent

logger = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[Dim]]
"""The shapes of inputs whose rank the file does not say, by name."""


def export_onnx_file(
    options: ExportOptions, out: Path, *, expected: Expected | None = None, progress: Progress = silent
) -> Artifact:
    """A bare ONNX file to an artifact that has no eager module: its graph prepared, and compared with the file by ONNX Runtime.

    A graph in FP32 of an opset before `OPSET` is raised to it, and its constants are folded. Where that computes something else, it
    stays undone, and a graph that cannot be compared is copied as it is; both with a warning. Raises ArtifactError when the file is
    not valid ONNX, PrecisionError when ONNX Runtime runs it on none of the feeds in `data`, BackendError, DataError, OutputError,
    UsageError, UserCodeError, and what `check_expected` raises.
    """
    assert options.onnx is not None
    shapes = {}
    for text in options.inputs:
        name, (shape,) = parse_shapes(text, what="the input", expected="NAME=Nx3x224x224: the file says the dtype")
        shapes[name] = shape
    bare = open_onnx(options.onnx, shapes)
    check_output(out, bare)
    names = read_classes(options.classes) if options.classes else None
    check_classes(names, [spec.shape for spec in bare.manifest.outputs])
    decode = Decode.load(options.decode) if options.decode else None
    check_decode(decode, names, bare.manifest.outputs)
    inputs = bare.manifest.inputs
    preprocesses = load_preprocesses(options.preprocess, inputs, probe=options.data is None or holds_npz(options.data))
    if options.exif_orientation:
        preprocesses = upright(preprocesses)
    manifest = msgspec.structs.replace(
        bare.manifest,
        name=options.name or out.resolve().name,
        files={},
        **image_fields(preprocesses, inputs),
        decode=decode,
        classes=names,
        tools=tool_versions(),
    )
    source = dataclasses.replace(bare, manifest=manifest)
    with ArtifactWriter(out) as writer:
        copy_functions(preprocesses, options.preprocess, inputs, writer.path)
        copy_decode(decode, options.decode, writer.path)
        data = None
        if options.data is not None:
            data = calibration_set(dataclasses.replace(source, path=writer.path), options.data, most=REAL_ROWS)
        manifest = _written(source, writer, data, shapes, progress)
        if expected is not None:
            written = writer.describe(manifest)
            expected.check(written)
            manifest = msgspec.structs.replace(written.manifest, accuracy=check_expected(written, expected, progress))
        return writer.commit(manifest)


def _written(
    source: Artifact, writer: ArtifactWriter, data: CalibrationSet | None, shapes: Shapes, progress: Progress
) -> Manifest:
    """Write the graph of `source`, prepared where that can be compared; its manifest."""
    manifest = source.manifest
    progress("running the ONNX file")
    cases = _cases(source, data, shapes)
    if cases:
        try_decode(manifest.decode, manifest.classes, cases[-1].expected, writer.path)
    progress("preparing the graph")
    model = _prepared(source, cases, shapes)
    if model is None:
        for name in [source.bare or ONNX, *sorted(external_files(load_graph(source.onnx_path).graph))]:
            shutil.copyfile(source.onnx_path.parent / name, writer.path / (ONNX if name == source.bare else name))
        return manifest
    save_model(model, writer.path / ONNX)
    manifest = _described(manifest, model)
    del model  # its weights are as large as the file
    parity = prove(
        writer.describe(manifest),
        cases,
        _tolerance(manifest),
        against="file",
        remedy="the file itself can be used without an export",
        progress=progress,
    )
    return msgspec.structs.replace(manifest, parity=parity)


def _cases(source: Artifact, data: CalibrationSet | None, shapes: Shapes) -> list[Case]:
    """What ONNX Runtime makes of the file on rows of `data`, else on made-up input; none where it does not run that.

    Raises PrecisionError where it does not run `data`, nor made-up input of the shapes that were given.
    """
    found: list[Case] = []
    failed = ""
    try:
        run = CpuGraph.read(source.onnx_path)
        for kind, feed, maybe, _ in parity_feeds(source, data):
            try:
                results = run(copied(feed))
            except PrecisionError as error:  # of a batch or of sizes that it does not take
                failed = failed or str(error)
                continue
            if all(np.isfinite(array).all() for array in results.values() if array.dtype.kind == "f"):
                found.append(Case(kind, feed, results, maybe and bool(found)))
            else:
                failed = failed or "its outputs are not finite"
    except PrecisionError as error:
        failed = str(error)
    if not found and data is not None:
        raise PrecisionError(f"{source.shown} does not run on `data`: {failed}")
    if not found and shapes:
        given = ", ".join(f"{name} {format_shape(shape)}" for name, shape in shapes.items())
        raise PrecisionError(f"{source.shown} does not run with {given} on made-up input: {failed}; give feeds with `data`")
    if not found:
        logger.warning(
            "%s is taken as it is, for it does not run on made-up input: %s; give feeds with `data`", source.shown, failed
        )
    return found


def _prepared(source: Artifact, cases: Sequence[Case], shapes: Shapes) -> ir.Model | None:
    """The graph with as much of the preparation as leaves its results the same; None where nothing is left to be done."""

    def load() -> ir.Model:
        model = load_model(source.onnx_path)
        declare_shapes(model, shapes)
        return model

    if not cases:
        return None
    declared = load() if shapes else None
    for what, opset, fold in _ways(source):
        model = load()
        try:
            changed = Prepare(opset=opset)(model).modified
            changed |= fold and FoldConstants()(model).modified
            changed |= _set_outputs(model, cases)
            wrong = _differs(model, cases, _tolerance(source.manifest)) if changed else ""
        except PrecisionError as error:
            wrong = str(error)
        if not wrong:
            return model if changed else declared
        logger.warning("%s is taken without %s: %s", source.shown, what, wrong)
    return declared


def _ways(source: Artifact) -> Iterator[tuple[str, int, bool]]:
    """What to prepare, the most first: what it is called, the least opset, and whether constants are folded."""
    if source.manifest.precision == "fp32":
        version = opset_version(load_model(source.onnx_path))
        if version < OPSET:
            yield f"raising its opset from {version} to {OPSET}", OPSET, True
        yield "folding its constants", 1, True
    yield "any preparation", 1, False


def _set_outputs(model: ir.Model, cases: Sequence[Case]) -> bool:
    """Correct the declared shapes of outputs where the file was seen to make others; returns whether any was wrong."""
    changed = False
    for value in model.graph.outputs:
        shape = value.shape
        for case in cases:
            shape = _fitting(shape, case.expected[value.name or ""].shape, _named_sizes(model.graph, case))
        if shape != value.shape:
            value.shape = shape
            changed = True
    return changed


def _named_sizes(graph: ir.Graph, case: Case) -> dict[str, int]:
    """The sizes of the inputs' symbolic dimensions in a case."""
    return {
        str(dim.value): size
        for value in graph.inputs
        for dim, size in zip(value.shape or (), case.feed[value.name or ""].shape, strict=True)
        if not isinstance(dim, int)
    }


def _fitting(declared: ir.Shape | None, seen: Sequence[int], sizes: Mapping[str, int]) -> ir.Shape:
    """`declared` with every dimension open that is not of the size seen."""
    if declared is None or len(declared) != len(seen):
        return ir.Shape([None] * len(seen))
    return ir.Shape(
        [
            dim if (dim == size if isinstance(dim, int) else sizes.get(str(dim.value), size) == size) else None
            for dim, size in zip(declared, seen, strict=True)
        ]
    )


def _differs(model: ir.Model, cases: Sequence[Case], tolerance: Tolerance) -> str:
    """Why the results of a graph are not those of the file; "" where they are."""
    run = CpuGraph(model)
    for case in cases:
        _, wrong = judge(run(copied(case.feed)), case.expected, tolerance, data=case.data, batch=row_count(case.feed))
        if wrong:
            return f"it computes something else then: {wrong}"
    return ""


def _tolerance(manifest: Manifest) -> Tolerance:
    return TOLERANCES[manifest.precision]


def _described(manifest: Manifest, model: ir.Model) -> Manifest:
    """`manifest` with the inputs and outputs of the prepared graph."""
    inputs, outputs = model_specs(model)
    bounds = {spec.name: spec.bounds for spec in manifest.inputs}
    inputs = [dataclasses.replace(spec, bounds=bounds.get(spec.name)) for spec in inputs]
    profile = default_profile(inputs)
    return msgspec.structs.replace(manifest, inputs=inputs, outputs=outputs, profiles=[profile] if profile else [])
