"""An ONNX graph in half precision, compared with the graph in FP32."""

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import load_model, model_specs
from deploy.artifact.tensors import Feed, TensorSpec, batch_dim, example_dims, random_feeds, row_count
from deploy.data.image_folder import image_feeds
from deploy.errors import ParityError
from deploy.evidence.parity import PARITY_BATCHES, Parity, compare
from deploy.precision.converted import Converted
from deploy.precision.cpu import ONNXRUNTIME_VERSION, CpuGraph
from deploy.precision.formats import IMAGES, ConvertOptions
from deploy.precision.half.emulate import Emulate
from deploy.precision.half.rewrite import convert_model
from deploy.progress import Progress, silent

_IMAGE_BATCH = 8


def convert_onnx(artifact: Artifact, options: ConvertOptions, progress: Progress = silent) -> Converted:
    """Convert the graph of `artifact`, which is in FP32, in memory and compare it with the FP32 graph.

    Activation ranges are seen on random input at the batch sizes of `PARITY_BATCHES` and on `IMAGES` images of
    `options.data`; parity is checked on the same random input and on images at the same batch sizes, the half-precision
    graph emulated in FP32. Raises PrecisionError, ParityError (the result is too far off), DataError and BackendError
    (ONNX Runtime is not installed).
    """
    source = load_model(artifact.onnx_path)
    model = source.clone()
    exclusions = convert_model(
        model,
        options.precision,
        _range_feeds(artifact, options, progress),
        half_io=options.fp16_io,
        shown=artifact.shown,
        progress=progress,
    )
    parity = _parity(artifact, source, model, options, progress)
    inputs, outputs = model_specs(model)
    return Converted(
        model=model,
        inputs=_with_dtypes(artifact.manifest.inputs, inputs),
        outputs=_with_dtypes(artifact.manifest.outputs, outputs),
        exclusions=exclusions,
        parity=parity,
    )


def _range_feeds(artifact: Artifact, options: ConvertOptions, progress: Progress) -> Iterator[Feed]:
    feeds = _random_feeds(artifact, options)
    total = len(feeds) + (0 if options.data is None else -(-IMAGES // _IMAGE_BATCH))
    done = 0
    for feed in feeds:
        progress("reading activation ranges", done, total)
        yield feed
        done += 1
    if options.data is not None:
        for feed in image_feeds(artifact, options.data, batch_size=_IMAGE_BATCH, count=IMAGES):
            progress("reading activation ranges", done, max(total, done + 1))
            yield feed
            done += 1


def _random_feeds(artifact: Artifact, options: ConvertOptions) -> list[Feed]:
    """Random feeds at `PARITY_BATCHES`; as many, of other seeds, where the batch is fixed."""
    specs = artifact.manifest.inputs
    batch = batch_dim(specs)
    dims = example_dims(specs, batch)
    profile = options.profile or next(iter(artifact.manifest.profiles), {})
    for spec in specs:
        if spec.name in profile:
            dims |= {dim: size for dim, size in zip(spec.shape, profile[spec.name].opt, strict=True) if isinstance(dim, str)}
    return random_feeds(specs, dims)


def _parity_feeds(artifact: Artifact, options: ConvertOptions) -> Iterator[tuple[str, Feed]]:
    for feed in _random_feeds(artifact, options):
        yield "random", feed
    if options.data is not None:
        seen: set[int] = set()  # batches may be of one fixed size
        for size in PARITY_BATCHES:
            feed = next(image_feeds(artifact, options.data, batch_size=size, count=size))
            if (found := len(next(iter(feed.values())))) not in seen:
                seen.add(found)
                yield "images", feed


def _parity(artifact: Artifact, source: ir.Model, half: ir.Model, options: ConvertOptions, progress: Progress) -> Parity:
    emulation = half.clone()
    Emulate()(emulation)
    reference, emulated = CpuGraph(source), CpuGraph(emulation)
    cases = []
    for data, feed in _parity_feeds(artifact, options):
        batch = row_count(feed)
        progress(f"comparing with FP32 on {data} input, batch {batch}")
        try:
            case = compare(
                emulated(feed),
                reference(feed),
                options.tolerance(),
                data=data,
                batch=batch,
                what=f"{artifact.location} in {options.precision.upper()}",
            )
        except ParityError as error:
            other = "--bf16, which has the range of FP32" if options.precision == "fp16" else "--fp16, which is finer"
            raise ParityError(f"{error}; nothing was written: try {other}") from error
        cases.append(case)
    return Parity(
        against=artifact.manifest.digest,
        by=f"emulation on onnxruntime {ONNXRUNTIME_VERSION}",
        tolerance=options.tolerance(),
        cases=cases,
    )


def _with_dtypes(specs: list[TensorSpec], found: list[TensorSpec]) -> list[TensorSpec]:
    """`specs` with the dtypes of `found`; names and symbolic dimensions stay as the user knows them."""
    assert [spec.name for spec in specs] == [spec.name for spec in found]
    return [dataclasses.replace(spec, dtype=other.dtype) for spec, other in zip(specs, found, strict=True)]
