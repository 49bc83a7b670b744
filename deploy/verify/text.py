"""What `deploy verify` prints: one screen."""

from deploy.verify.error import BEYOND, Error
from deploy.verify.measure import Layer
from deploy.verify.verify import Verification
from deploy.words import count_of

_SHOWN = 5


def text(found: Verification) -> str:
    """The outputs, the culprits and what would help, in lines."""
    rows = count_of(found.rows, "row")
    source = "random input" if found.data == "random" else f"the {found.data} given"
    lines = [f"{found.b} against {found.shown_a}, on {rows} of {source}: {count_of(len(found.layers), 'layer')} compared"]
    if found.unpaired:
        lines[0] += f", {found.unpaired} without a counterpart"
    lines += [_line("output", f"{name}: {_error(error)}") for name, error in found.outputs.items()]
    if isinstance(found.engine, str):
        lines.append(_line("engine", f"not run, only its typed file: {found.engine}"))
    elif found.engine is not None:
        lines += [_line("engine", f"{name}: {_error(error)}") for name, error in found.engine.items()]
    for index, layer in enumerate(found.culprits[:_SHOWN]):
        lines.append(_line("culprit" if index == 0 else "also", f"{_place(layer)}: {_error(layer.local)} by itself"))
        if layer.range is not None:
            lines.append(_line("", f"A's values are from {layer.range.low:.3g} to {layer.range.high:.3g}"))
        if hint := found.hints.get(layer.tensor):
            lines.append(_line("", hint))
    if len(found.culprits) > _SHOWN:
        lines.append(_line("also", f"{len(found.culprits) - _SHOWN} more (--json lists all)"))
    if found.culprits and (victims := len(found.victims)):
        lines.append(_line("victims", f"{count_of(victims, 'layer')} beyond the floor as B runs, and right by themselves"))
    if found.rewritten:
        lines.append(
            _line("rewritten", f"{count_of(len(found.rewritten), 'tensor')} in other units, which the layers behind undo")
        )
    if not found.culprits:
        own = [layer for layer in found.layers if layer.tensor not in found.rewritten] or found.layers
        worst = max(own, key=lambda layer: layer.local.times)
        lines.append(_line("culprit", f"none: {_place(worst)} is the worst by itself, {_error(worst.local)}"))
    if found.reproduction is not None:
        made = found.reproduction
        lines.append(
            _line("wrote", f"{made.path}: a.onnx and b.onnx of {count_of(made.nodes, 'node')} at most, input.npz, expected.npz")
        )
    return "\n".join(lines)


def _line(head: str, body: str) -> str:
    return f"  {head:<10} {body}"


def _place(layer: Layer) -> str:
    module = f", module {layer.module}" if layer.module else ""
    return f"{layer.node} ({layer.operator}{module}{f', {layer.source}' if layer.source else ''})"


def _error(error: Error) -> str:
    if error.beyond:
        judged = f"{error.times:,.{1 if error.times < 100 else 0}f} times beyond"
    else:
        judged = "within" if error.error <= BEYOND * error.floor else "not surely beyond, of so few numbers,"
    return f"error {error.error:.2g}, {judged} the floor of {error.floor:.2g}"
