"""An ONNX graph in half precision, compared with the graph in FP32."""

from collections.abc import Iterator

from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import load_model
from deploy.artifact.tensors import Feed
from deploy.data.image_folder import image_feeds
from deploy.precision.converted import Converted, compare_converted, random_inputs
from deploy.precision.formats import IMAGES, ConvertOptions
from deploy.precision.half.emulate import Emulate
from deploy.precision.half.options import half_precision
from deploy.precision.half.rewrite import convert_model
from deploy.progress import Progress, silent

_IMAGE_BATCH = 8


def convert_onnx(artifact: Artifact, options: ConvertOptions, progress: Progress = silent) -> Converted:
    """Convert the graph of `artifact`, which is in FP32, in memory and compare it with the FP32 graph.

    Activation ranges are read on random input at the batch sizes of `PARITY_BATCHES` and on `IMAGES` images of
    `options.data`; parity is checked on the same random input and on images at the same batch sizes, the half-precision
    graph emulated in FP32. Raises PrecisionError, ParityError (the result is too far off), DataError and BackendError
    (ONNX Runtime is not installed).
    """
    precision = half_precision(options.precision)
    source = load_model(artifact.onnx_path)
    model = source.clone()
    exclusions = convert_model(
        model,
        precision,
        _range_feeds(artifact, options, progress),
        half_io=options.fp16_io,
        shown=artifact.shown,
        progress=progress,
    )
    emulation = model.clone()
    Emulate()(emulation)
    remedy = "bf16, which has the range of FP32" if precision == "fp16" else "fp16, which is finer"
    return compare_converted(
        artifact, source, model, options, emulation=emulation, exclusions=exclusions, remedy=remedy, progress=progress
    )


def _range_feeds(artifact: Artifact, options: ConvertOptions, progress: Progress) -> Iterator[Feed]:
    feeds = random_inputs(artifact, options)
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
