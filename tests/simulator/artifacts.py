"""Engine artifacts for the simulator: `y = 2 x`, and where asked for `positive`, the elements above 0, of a shape that depends on data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, FORMAT, ONNX, FlavourName, Manifest, Source, Stage, Target
from deploy.artifact.tensors import Profile, ShapeRange, TensorSpec
from deploy.artifact.writer import ArtifactWriter
from tests.simulator.plans import make_plan

VERSIONS: dict[FlavourName, str] = {"tensorrt": "11.4.0", "tensorrt-rtx": "1.7.1"}

MANIFEST = Manifest(
    format=FORMAT, kind="engine", name="engine", precision="fp32", parent=None, files={}, inputs=[], outputs=[], profiles=[],
    source=Source(factory=None, args={}, files=[], weights=None, state_dict="0" * 64, random=True), preprocess=None, classes=None,
    parity=None, accuracy=None, calibration=None, exclusions=[], tools={}, stage=Stage(name="simulated", request="0" * 64), created="",
)  # fmt: skip

_MODEL = """
    <ir_version: 10, opset_import: ["" : 20]>
    doubled ({kind}[batch, {width}] x) => ({results}) {{
        [two] two = Constant<value = {kind} {{2.0}}>()
        [double] y = Mul(x, two)
        {rest}
    }}
"""
_POSITIVE = """
        [flat] shape = Constant<value_ints = [-1]>()
        [flatten] all = Reshape(x, shape)
        [zero] zero = Constant<value = {kind} {{0.0}}>()
        [above] above = Greater(all, zero)
        [choose] positive = Compress<axis = 0>(all, above)
"""


def model(outputs: Sequence[str] = ("y",), width: int = 4, dtype: str = "float32") -> bytes:
    """The typed ONNX file."""
    kind = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}[dtype]
    results = {"y": f"{kind}[batch, {width}] y", "positive": f"{kind}[found] positive"}
    rest = _POSITIVE.format(kind=kind) if "positive" in outputs else ""
    text = _MODEL.format(kind=kind, width=width, results=", ".join(results[name] for name in outputs), rest=rest)
    made: bytes = onnx.parser.parse_model(text).SerializeToString()
    return made


def make_engine(
    folder: Path,
    *,
    profiles: Sequence[tuple[int, int]] = ((1, 8),),
    outputs: Sequence[str] = ("y",),
    target: Target | None = None,
    plan: bytes | None = None,
    width: int = 4,
    dtype: str = "float32",
    flavour: FlavourName = "tensorrt",
    **plan_options: Any,
) -> Artifact:
    """An engine artifact. profiles: least and largest batch of each. plan_options: of `make_plan`."""
    ranges = [{"x": ((low, width), ((low + high) // 2, width), (high, width))} for low, high in profiles]
    shapes: list[Profile] = [
        {"x": ShapeRange(min=low, opt=best, max=high)} for ((low, best, high),) in (r.values() for r in ranges)
    ]
    version = VERSIONS[flavour]
    target = target or Target(flavour=flavour, version=version, gpu="Simulated GPU", compute_capability="8.9", targets=["8.9"])
    typed = model(outputs, width, dtype)
    with ArtifactWriter(folder) as writer:
        (writer.path / ENGINE).write_bytes(make_plan(typed, ranges, flavour=flavour, **plan_options) if plan is None else plan)
        (writer.path / ONNX).write_bytes(typed)
        dims: dict[str, tuple[str | int, ...]] = {"y": ("batch", width), "positive": ("found",)}
        changed = msgspec.structs.replace(
            MANIFEST,
            inputs=[TensorSpec(name="x", dtype=dtype, shape=("batch", width))],
            outputs=[TensorSpec(name=name, dtype=dtype, shape=dims[name]) for name in outputs],
            profiles=shapes,
            target=target,
        )
        return writer.commit(changed)
