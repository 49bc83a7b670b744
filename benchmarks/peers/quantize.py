"""Quantizes an ONNX model with one of the peers, in the peers' own environment (`make peers`).

    .venv-peers/bin/python benchmarks/peers/quantize.py TOOL MODEL.onnx IMAGES.txt OUT.onnx --preprocess FILE.json
    .venv-peers/bin/python benchmarks/peers/quantize.py TOOL MODEL.onnx FEEDS.npz OUT.onnx

IMAGES.txt names the calibration images, one path a line: the same that our calibration draws. They go through
`deploy.artifact.preprocess` and the threads of `deploy.calibration.imagefolder`, which need numpy and Pillow only. FEEDS.npz has
an array for each input, a row a feed. Each tool is
used as its own documents advise for INT8 convolutional nets, and NNCF also for transformers; ONNX Runtime's is set to symmetric
ranges, because TensorRT accepts only those, `onnxruntime-asymmetric` aside. The versions in use go to standard output as JSON.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]

Feed = dict[str, np.ndarray]


def images(files: list[Path], preprocess: dict[str, object], batch_size: int) -> Iterator[np.ndarray]:
    """Batches (N, C, H, W), float32, of the images in order."""
    sys.path.insert(0, str(ROOT))
    from deploy.artifact.preprocess import Preprocess
    from deploy.calibration.imagefolder import batches

    load = Preprocess.from_json(preprocess).open
    return (batch for batch, _ in batches([(path, 0) for path in files], load, batch_size))


def rows(path: Path) -> list[Feed]:
    """The feeds of an .npz, one row each."""
    arrays = dict(np.load(path))
    count = len(next(iter(arrays.values())))
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(count)]


def onnxruntime(tool: str, model: Path, stream: Iterator[Feed], count: int, out: Path) -> None:
    """https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html and its TensorRT examples.

    With ONNX Runtime 1.24 `onnxruntime-entropy` gives the scales of `onnxruntime-minmax`: quantize_static makes one histogram
    of 128 bins for 128 levels, whose full range is the only threshold to choose, and has no option for the number of bins.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(stream, None)

    methods = {
        "onnxruntime-minmax": CalibrationMethod.MinMax,
        "onnxruntime-asymmetric": CalibrationMethod.MinMax,
        "onnxruntime-entropy": CalibrationMethod.Entropy,
        "onnxruntime-percentile": CalibrationMethod.Percentile,
    }
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        # Its symbolic shape inference fails on ViTs (IndexError in Concat, seen with 1.24); ONNX's own runs all the same.
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=not tool.endswith("-tensor"),
            calibrate_method=methods[tool.removesuffix("-tensor")],
            # Symmetric and without INT32 biases, as TensorRT's parser requires.
            extra_options={
                "ActivationSymmetric": tool != "onnxruntime-asymmetric",
                "WeightSymmetric": True,
                "QuantizeBias": False,
            },
        )


def modelopt(tool: str, model: Path, stream: Iterator[Feed], count: int, out: Path) -> None:
    """https://nvidia.github.io/Model-Optimizer/guides/_onnx_quantization.html: calibration data is one array an input."""
    from modelopt.onnx.quantization import quantize

    feeds = list(stream)
    quantize(
        str(model),
        quantize_mode="int8",
        calibration_data={name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]},
        calibration_method=tool.removeprefix("modelopt-"),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(out),
        log_level="WARNING",
    )


def nncf(tool: str, model: Path, stream: Iterator[Feed], count: int, out: Path) -> None:
    """https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html"""
    import nncf
    import onnx

    dataset = nncf.Dataset(list(stream))
    preset = nncf.QuantizationPreset.PERFORMANCE if tool == "nncf" else nncf.QuantizationPreset.MIXED
    kind = nncf.ModelType.TRANSFORMER if tool == "nncf-transformer" else None
    onnx.save(nncf.quantize(onnx.load(str(model)), dataset, preset=preset, model_type=kind, subset_size=count), str(out))


Run = Callable[[str, Path, Iterator[Feed], int, Path], None]
TOOLS: dict[str, Run] = {
    "onnxruntime-minmax": onnxruntime,
    "onnxruntime-minmax-tensor": onnxruntime,
    "onnxruntime-asymmetric": onnxruntime,
    "onnxruntime-entropy": onnxruntime,
    "onnxruntime-percentile": onnxruntime,
    "modelopt-max": modelopt,
    "modelopt-entropy": modelopt,
    "nncf": nncf,
    "nncf-mixed": nncf,
    "nncf-transformer": nncf,
}
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "nvidia-modelopt", "nncf", "onnx", "numpy")


def versions() -> dict[str, str]:
    installed = {entry.metadata["Name"]: entry.version for entry in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, metavar="IMAGES.txt|FEEDS.npz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--preprocess", type=Path, help="JSON, as in a manifest; for images")
    parser.add_argument("--input", default="input", help="name of the model's input (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="images a feed (default: %(default)s)")
    options = parser.parse_args()
    if options.data.suffix == ".npz":
        feeds = rows(options.data)
        count, stream = len(feeds), iter(feeds)
    elif options.preprocess is None:
        parser.error("images need --preprocess")
    else:
        files = [Path(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
        preprocess = json.loads(options.preprocess.read_text(encoding="utf-8"))
        count = len(files)
        stream = ({options.input: batch} for batch in images(files, preprocess, options.batch_size))
    TOOLS[options.tool](options.tool, options.model, stream, count, options.out)
    print(json.dumps(versions()))


if __name__ == "__main__":
    main()
