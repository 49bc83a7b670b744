"""A conversion to another number format: its result, and the comparison with the FP32 graph."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Exclusion
from deploy.artifact.onnxfile import model_specs, save_model
from deploy.artifact.tensors import Feed, TensorSpec, batch_dim, example_dims, random_feeds, row_count
from deploy.data.image_folder import image_feeds
from deploy.errors import ParityError
from deploy.evidence.parity import PARITY_BATCHES, Parity, compare
from deploy.precision.cpu import ONNXRUNTIME_VERSION, CpuGraph
from deploy.precision.formats import ConvertOptions
from deploy.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A graph in another number format, its inputs and outputs, the nodes left in FP32 and its parity with the FP32 graph."""

    model: ir.Model
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    exclusions: list[Exclusion]
    parity: Parity

    def save(self, path: Path) -> None:
        """Write the ONNX file, with the weights beside it where they exceed 2 GB. Raises OSError."""
        save_model(self.model, path)


def compare_converted(
    artifact: Artifact,
    source: ir.Model,
    model: ir.Model,
    options: ConvertOptions,
    *,
    emulation: ir.Model | None = None,
    exclusions: list[Exclusion],
    remedy: str,
    progress: Progress,
) -> Converted:
    """`model` with its evidence: compared with `source`, the FP32 graph of `artifact`, on random input and on images.

    emulation: what is run in place of `model`, where the CPU does not round as the format does. remedy: what to try if it is
    too far off. Raises ParityError, DataError.
    """
    reference, converted = CpuGraph(source), CpuGraph(emulation or model)
    cases = []
    for data, feed in _parity_feeds(artifact, options):
        batch = row_count(feed)
        progress(f"comparing with FP32 on {data} input, batch {batch}")
        what = f"{artifact.location} in {options.precision.upper()}"
        try:
            case = compare(converted(feed), reference(feed), options.tolerance(), data=data, batch=batch, what=what)
        except ParityError as error:
            raise ParityError(f"{error}; nothing was written: try {remedy}") from error
        cases.append(case)
    by = f"{'emulation on ' * (emulation is not None)}onnxruntime {ONNXRUNTIME_VERSION}"
    inputs, outputs = model_specs(model)
    return Converted(
        model=model,
        inputs=_with_dtypes(artifact.manifest.inputs, inputs),
        outputs=_with_dtypes(artifact.manifest.outputs, outputs),
        exclusions=exclusions,
        parity=Parity(against=artifact.manifest.digest, by=by, tolerance=options.tolerance(), cases=cases),
    )


def random_inputs(artifact: Artifact, options: ConvertOptions) -> list[Feed]:
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
    for feed in random_inputs(artifact, options):
        yield "random", feed
    if options.data is not None:
        seen: set[int] = set()  # batches may be of one fixed size
        for size in PARITY_BATCHES:
            feed = next(image_feeds(artifact, options.data, batch_size=size, count=size))
            if (found := len(next(iter(feed.values())))) not in seen:
                seen.add(found)
                yield "images", feed


def _with_dtypes(specs: list[TensorSpec], found: list[TensorSpec]) -> list[TensorSpec]:
    """`specs` with the dtypes of `found`; names and symbolic dimensions stay as the user knows them."""
    assert [spec.name for spec in specs] == [spec.name for spec in found]
    return [dataclasses.replace(spec, dtype=other.dtype) for spec, other in zip(specs, found, strict=True)]
