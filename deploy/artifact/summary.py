"""Describes artifacts in text."""

from collections.abc import Mapping

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import (
    COMPUTE_PRECISIONS,
    CPU_ONNX,
    Accuracy,
    Manifest,
    PackageTarget,
    PrecisionShare,
    Score,
)
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import format_specs
from deploy.artifact.tuning import TunedPoint, Tuning
from deploy.evidence.parity import Parity, ParityCase, worst_of
from deploy.words import count_of

_LISTED = 10
_NOISIEST = 3
_QUIET_DB = 60


def summary(artifact: Artifact) -> str:
    """The kind, inputs, outputs and evidence of an artifact, in lines."""
    manifest = artifact.manifest
    lines = [f"{artifact.shown}: {kind_text(manifest)}, {manifest.precision}, {megabytes(artifact.size)}"]
    specs = format_specs([*manifest.inputs, *manifest.outputs], "\n").splitlines()
    labels = ["input"] * len(manifest.inputs) + ["output"] * len(manifest.outputs)
    lines += [_row(label, spec) for label, spec in zip(labels, specs, strict=True)]
    for profile in manifest.profiles:
        if manifest.kind != "onnx":
            lines += [_row("shapes", f"{name} {shapes}") for name, shapes in profile.items()]
    if manifest.target:
        built_for = manifest.target.gpu or f"compute capability {', '.join(manifest.target.targets)}"
        lines.append(_row("built for", built_for))
        if manifest.target.stripped:
            lines.append(_row("weights", "none in the engine file: loading it puts in those of the ONNX file beside it"))
    if manifest.package:
        lines.append(_row("built for", package_text(manifest.package)))
    if manifest.parity:
        if manifest.target:
            lines.append(_row("typed ONNX", parity_text(manifest.parity)))
            if manifest.engine_parity is None:
                lines.append(_row("", "that is the file which the engine was built from; the engine itself has not been run"))
        else:
            lines.append(_row("parity", parity_text(manifest.parity)))
            lines += [_row("", text) for text in backends_text(manifest.parity)]
            lines += [_row("CPU form", text) for text in cpu_form_text(manifest)]
    elif manifest.parent is None and manifest.source.factory is None:
        lines.append(_row("parity", "none: the bare ONNX file as it was"))
    if manifest.precision == "fp16" and manifest.parent and manifest.parity and _made_up(manifest.parity):
        lines.append(_row("ranges", "from random numbers alone: real input may overflow where these did not (--data)"))
    if manifest.engine_parity:
        lines.append(_row("engine", parity_text(manifest.engine_parity, "the typed ONNX file")))
    if manifest.calibration:
        lines += calibration_text(manifest)
    lines += [_row("accuracy" * (not index), text) for index, text in enumerate(accuracies_text(manifest))]
    if manifest.tuning is not None:
        lines += [_row("tuned", tuning_text(manifest.tuning)), _row("because", manifest.tuning.because)]
    if manifest.precision_share is not None:
        lines.append(_row("computes", share_text(manifest.precision_share)))
        for kind, shares in (("layers", manifest.precision_share.layers), ("GPU time", manifest.precision_share.time)):
            if shares is not None:
                lines.append(_row("", f"{_parts(shares)} of the {kind}"))
    lines += exclusions_text(manifest)
    return "\n".join(lines)


def kind_text(manifest: Manifest) -> str:
    """`ONNX`, `tensorrt 11.1 engine`, `AOTInductor package of torch 2.14.1`."""
    if manifest.target:
        return f"{manifest.target.flavour} {manifest.target.version} engine"
    return f"AOTInductor package of torch {manifest.package.torch}" if manifest.package else "ONNX"


def package_text(target: PackageTarget) -> str:
    """What a package runs on; the instruction sets themselves are in the manifest."""
    if target.gpu:
        return f"{target.gpu} (compute capability {target.compute_capability})"
    return f"the CPU, {target.machine} with the {count_of(len(target.instruction_sets), 'instruction set')} of the manifest"


def evidence(manifest: Manifest) -> list[str]:
    """The evidence about an artifact, in lines: parity, accuracy, calibration, precision share."""
    lines = []
    if manifest.parity:
        lines.append(f"parity: {parity_text(manifest.parity)}")
        lines += [f"parity: {text}" for text in backends_text(manifest.parity)]
    lines += [f"CPU form: {text}" for text in cpu_form_text(manifest)]
    if manifest.engine_parity:
        lines.append(f"engine: {parity_text(manifest.engine_parity, 'the typed ONNX file')}")
    if manifest.calibration:
        lines.append(" ".join(calibration_text(manifest)[0].split()))
    lines += [f"accuracy: {text}" for text in accuracies_text(manifest)]
    if manifest.tuning:
        lines.append(f"tuned: {tuning_text(manifest.tuning)}")
    if manifest.precision_share:
        lines.append(f"computes: {share_text(manifest.precision_share)}")
    if manifest.exclusions:
        kept = "floating point" if manifest.calibration else "FP32"
        lines.append(f"{count_of(len(manifest.exclusions), 'node')} left in {kept}")
    return lines


def parity_text(parity: Parity, against: str | None = None) -> str:
    worst = parity.worst
    random = [_batch_text(case) for case in parity.cases if case.data == "random"]
    seen = [f"random batches {', '.join(random)}"] * bool(random)
    for kind, noun in (("images", "image"), ("feeds", "row")):
        if rows := sum(case.batch for case in parity.cases if case.data == kind):
            seen.append(count_of(rows, noun))
    against = against or {"eager": "eager", "file": "the ONNX file as it was"}.get(parity.against, "its parent")
    noise = "" if worst.sqnr_db is None or worst.sqnr_db > _QUIET_DB else f", signal to noise {worst.sqnr_db:.0f} dB"
    noise += "" if worst.agreement is None else f", {worst.agreement:.2%} of the integers equal"
    return (
        f"max abs {worst.max_abs:.2g}, max rel {worst.max_rel:.2g}, cosine {worst.cosine:.6f}{noise} against {against}"
        f" on {' and '.join(seen)} ({parity.by})"
    )


def _made_up(parity: Parity) -> bool:
    return all(case.data == "random" for case in parity.cases)


def _batch_text(case: ParityCase) -> str:
    return str(case.batch) + (f" ({', '.join(f'{dim} {size}' for dim, size in case.sizes.items())})" if case.sizes else "")


def backends_text(parity: Parity) -> list[str]:
    """What the backends make of the written file, and what the comparison cannot show, in lines."""
    lines = []
    for each in parity.backends:
        if each.wrong is not None:
            lines.append(f"WRONG on {each.by}: {each.wrong}; it is not loaded there")
        elif each.by != parity.by:
            worst = worst_of(each.cases)
            lines.append(f"max abs {worst.max_abs:.2g}, cosine {worst.cosine:.6f} on {each.by}")
    if parity.constant:
        names = ", ".join(parity.constant)
        lines.append(f"proves nothing of {names}: the same number everywhere, in what it was made from too")
    if parity.tiny:
        lines.append(f"proves nothing of {', '.join(parity.tiny)}: nowhere above `atol`, {parity.tolerance.atol:g}")
    return lines


def cpu_form_text(manifest: Manifest) -> list[str]:
    """The parity of the file that ONNX Runtime runs on processors with VNNI, or why there is none; no line where none was asked for."""
    form = manifest.cpu_form
    if form is None:
        return []
    if form.parity is None:
        return [f"{CPU_ONNX} left out: {form.left_out}"]
    return [f"{CPU_ONNX}: {parity_text(form.parity)}; ONNX Runtime runs it where the processor has VNNI"]


def accuracies_text(manifest: Manifest) -> list[str]:
    """The accuracy on every backend that was judged, the worst first, each with the share that is quantized."""
    return [accuracy_text(each) + quantized_text(manifest) for each in manifest.accuracies or filter(None, [manifest.accuracy])]


def tuning_text(tuning: Tuning) -> str:
    """`mix 2: 10 of 14 units in INT8, 1.84 times as fast as floating point (1.80 to 1.88) on onnxruntime, batch 1`."""
    where = f"on {tuning.backend}, batch {tuning.batch}"
    point = next((each for each in tuning.points if each.name == tuning.result), None)
    if point is None or point.speedup is None:
        return f"{'floating point' if tuning.floats == 'fp32' else tuning.floats.upper()} {where}"
    return f"{point.name}: {len(point.int8)} of {count_of(len(tuning.units), 'unit')} in {tuning.codes.upper()}, {speedup_text(point, ' times as fast as floating point')} {where}"


def speedup_text(point: TunedPoint, what: str = "", why: str = "") -> str:
    """`1.84 (1.80 to 1.88)`, with `what` behind the number; in place of an interval that is no use, `uncertain` and `why`."""
    interval = f"{point.low:.2f} to {point.high:.2f}" if point.certain else f"uncertain{why}"
    return f"{point.speedup:.2f}{what} ({interval})"


def share_text(share: PrecisionShare) -> str:
    """The share of multiply-accumulates by precision, of how many nodes it is unknown, and who says so."""
    parts = _parts({name: getattr(share, name) for name in COMPUTE_PRECISIONS})
    unknown, origin = count_of(share.unknown, "node"), f"({_origin_text(share)})"
    if share.fp16_sums:
        origin = f"with sums in FP16 for at least {share.fp16_sums:.1%} {origin}"
    if share.unknown and parts:
        return f"{parts} of the multiply-accumulates that can be counted, those of {unknown} cannot {origin}"
    if share.unknown:
        return f"unknown: the multiply-accumulates of {unknown} cannot be counted {origin}"
    if not parts:
        return f"no multiply-accumulates: no convolution and no matrix product {origin}"
    return f"{parts} of the multiply-accumulates {origin}"


def _origin_text(share: PrecisionShare) -> str:
    if share.coverage is None:
        return f"read from the {share.origin}"
    told = f"the engine itself tells the precision of {share.coverage:.1%}"
    return f"attested: {told}" if share.origin == "engine" else f"read from the network, not attested: {told}"


def _parts(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.1%} {name}" for name, share in shares.items() if share > 0)


def calibration_text(manifest: Manifest) -> list[str]:
    """The calibration data and method, and the noisiest layers, of an artifact that was calibrated."""
    calibration = manifest.calibration
    assert calibration is not None
    extras = [f"{count_of(len(calibration.smoothed), 'activation')} smoothed"] * bool(calibration.smoothed)
    extras += ["bias correction"] * calibration.bias_correction + ["ranges equalized"] * calibration.equalized
    weights = "one scale a weight" if calibration.per_tensor else "a scale for each output channel"
    rows = count_of(calibration.rows, "image" if calibration.kind == "images" else "row")
    skipped = f" ({len(calibration.skipped)} unreadable left out)" if calibration.skipped else ""
    noisy = [f"{layer.node} {layer.sqnr_db:.0f} dB" for layer in calibration.layers[:_NOISIEST] if layer.sqnr_db is not None]
    return [
        _row(
            "calibrated", f"{calibration.method} over {rows}{skipped}; {', '.join([weights, *extras])}{quantized_text(manifest)}"
        ),
        _row("noisiest", f"{', '.join(noisy)} (signal to noise of the layer by itself)"),
    ]


def preprocess_text(preprocess: Preprocess) -> str:
    """How an image becomes an input, and what is done about its EXIF orientation."""
    exif = "turned upright by the EXIF orientation" if preprocess.exif_orientation else "EXIF orientation ignored"
    function = preprocess.function
    if function is not None:
        code = f"SHA-256 {function.sha256[:12]}" if function.sha256 else "no file"
        return f"{function} (the user's code, {function.version or code}), {exif}"
    shown = {key: value for key, value in preprocess.to_json().items() if value is not None and key != "exif_orientation"}
    return f"{', '.join(f'{key} {value}' for key, value in shown.items())}, {exif}"


def accuracy_text(accuracy: Accuracy) -> str:
    """Accuracy, and what is known beside it: that of FP32 with the interval of the difference, or what training reported."""
    where = accuracy.backend + (f", {accuracy.file}" if accuracy.file else "")
    score, images = accuracy.judged, count_of(accuracy.images, "image")
    if score.metric != "top1":
        text, parent = f"{score_text(score)} of {images}", points_text(score.parent or 0.0, score.unit)
    else:
        text, parent = (
            f"top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} % of {images}",
            f"{accuracy.parent_top1 or 0:.2f} %, {accuracy.parent_top5 or 0:.2f} %",
        )
    if score.loss is not None:
        interval = (
            f"95 % interval of the loss {range_text(score.loss_low, score.loss_high, score.unit)}; "
            if score.loss_low is not None
            else ""
        )
        return f"{text}; FP32 {parent}: {drop_text(score)} ({interval}{where}){undecided_text(accuracy)}"
    if score.metric != "top1":
        return f"{text} against FP32 ({where}){undecided_text(accuracy)}"
    reported = "" if accuracy.expected_top1 is None else f"; training reported {accuracy.expected_top1:.2f} %"
    return f"{text}{reported} (95 % interval of top-1 {accuracy.top1_low:.2f} to {accuracy.top1_high:.2f}; {where})"


def score_text(score: Score) -> str:
    """`miou 71.20 % (95 % interval 69.80 to 72.50)`."""
    interval = "" if score.low is None else f" (95 % interval {range_text(score.low, score.high, score.unit)})"
    return f"{metric_text(score.metric)} {points_text(score.value, score.unit)}{interval}"


def metric_text(metric: str) -> str:
    """A metric as it is called in texts and on axes."""
    return {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "map": "mAP", "sqnr": "SQNR"}.get(metric, metric)


def undecided_text(accuracy: Accuracy) -> str:
    """What is said where the interval of a loss reaches beyond its limit; "" where it does not."""
    if accuracy.undecided is None:
        return ""
    if accuracy.undecided < 0:
        return "; undecided, and no number of images would decide"
    return f"; undecided: about {count_of(accuracy.undecided, 'more image')} would decide"


def points_text(value: float, unit: str) -> str:
    """`71.20 %`, `23.10 dB`, or the number alone."""
    return f"{number_text(value, unit)} {unit}".rstrip()


def number_text(value: float, unit: str) -> str:
    """Two decimals of what has a unit; of other metrics, which may be of any size, four digits."""
    return f"{value:.2f}" if unit else f"{value:.4g}"


def range_text(low: float | None, high: float | None, unit: str) -> str:
    """`69.80 to 72.50`, the ends of an interval."""
    assert low is not None
    assert high is not None
    return f"{number_text(low, unit)} to {number_text(high, unit)}"


def quantized_text(manifest: Manifest) -> str:
    """What stands beside an accuracy in INT8 or FP8: `; INT8: 97.3 % of ...`, or nothing."""
    if manifest.calibration is None or manifest.calibration.share is None:
        return ""
    return f"; {manifest.precision.upper()}: {manifest.calibration.share:.1%} of the multiply-accumulates of layers with weights"


def drop_text(score: Score) -> str:
    """`0.10 points lost`, `0.10 points gained` for a negative number, `no points lost`; without points where it is not in per cent."""
    points = score.loss or 0.0
    number = number_text(abs(points), score.unit)
    unit = {"%": " points", "": ""}.get(score.unit, f" {score.unit}")
    if float(number) == 0:
        return f"{'no' + unit if unit == ' points' else 'nothing'} lost"
    return f"{number}{unit} {'lost' if points > 0 else 'gained'}"


def exclusions_text(manifest: Manifest) -> list[str]:
    """The nodes that stayed in a higher precision, one in a line, at most ten."""
    exclusions = manifest.exclusions
    label = f"not {manifest.precision.upper()}" if manifest.calibration else "in FP32"
    lines = [_row(label, f"{exclusion.node}: {exclusion.reason}") for exclusion in exclusions[:_LISTED]]
    if len(exclusions) > _LISTED:
        lines.append(_row("", f"and {count_of(len(exclusions) - _LISTED, 'more node')}: deploy inspect --json lists all"))
    return lines


def megabytes(size: int) -> str:
    """A size in bytes, in units of 10^3, 10^6 or 10^9 with three digits: `12.3 kB`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"


def _row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"
