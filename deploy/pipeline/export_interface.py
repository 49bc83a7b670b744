"""What goes in and out of an export, by its options: inputs, outputs, preprocessing and class names, checked early."""

import dataclasses
import itertools
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deploy.artifact.decode import Decode
from deploy.artifact.image_ops import read_image
from deploy.artifact.manifest import file_digest
from deploy.artifact.preprocess import IMAGE_DTYPES, Preprocess
from deploy.artifact.tensors import DTYPES, Dim, Feed, TensorSpec, batch_dim, format_shape, parse_shapes
from deploy.artifact.usercode import UserFunction, split_spec
from deploy.data.images import ImageInput, takes_images
from deploy.errors import UsageError, UserCodeError
from deploy.intake.build import BuiltModel

logger = logging.getLogger(__name__)

BATCH = "batch"

_EXPECTED = f"NAME=1x3x224x224[:dtype], dtype one of {', '.join(DTYPES)}, and after it a range such as [0,30522] if you like"


def parse_input(text: str) -> TensorSpec:
    """`"ids=1x6:int64[0,30522]"` -> the spec; float32 when no dtype is given, no range where none is. Raises UsageError."""
    text, bounds = _bounds(text)
    shape_text, _, dtype = text.rpartition(":")
    if "=" not in shape_text:  # no dtype, or a colon in the name
        shape_text, dtype = text, "float32"
    if dtype not in DTYPES:
        raise UsageError(f"cannot read the input {text!r}; expected {_EXPECTED}")
    name, (shape,) = parse_shapes(shape_text, what="the input", expected=_EXPECTED)
    return TensorSpec(name=name, dtype=dtype, shape=shape, bounds=bounds)


def _bounds(text: str) -> tuple[str, tuple[float, float] | None]:
    """What is before the range `[LOW,HIGH]` at the end of an input, and the range."""
    found = re.fullmatch(r"(.*)\[([^\[\],]+),([^\[\],]+)\]", text)
    if found is None:
        return text, None
    try:
        return found[1], (float(found[2]), float(found[3]))
    except ValueError:
        raise UsageError(f"cannot read the range of the input {text!r}; expected {_EXPECTED}") from None


def input_specs(texts: Sequence[str], built: BuiltModel, *, static_batch: bool) -> tuple[TensorSpec, ...]:
    """Specs of the inputs: those of `texts`, else the architecture's own; the leading 1 made symbolic unless `static_batch`.

    It stays as it is where the batch is another dimension: `1xbatchx8` is the state of one recurrent layer, as is `1xNx8` beside
    `TxNx6`. Raises UsageError.
    """
    if not texts and built.inputs is None:
        raise UsageError(f"say what {built.factory} takes: `inputs` NAME=1x3x224x224[:dtype], once for each input")
    if texts and built.inputs is not None and len(texts) != len(built.inputs):
        raise UsageError(
            f"{built.factory} takes {len(built.inputs)} inputs ({', '.join(map(str, built.inputs))}), not {len(texts)}"
        )
    specs = tuple(parse_input(text) for text in texts) or built.inputs or ()
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise UsageError(f"two inputs have the same name: {', '.join(names)}")
    if static_batch:
        return specs
    elsewhere = {BATCH, batch_dim(specs)}
    return tuple(
        dataclasses.replace(spec, shape=(BATCH, *spec.shape[1:]))
        if spec.shape[:1] == (1,) and elsewhere.isdisjoint(spec.shape)
        else spec
        for spec in specs
    )


def output_names(texts: Sequence[str], built: BuiltModel, inputs: Sequence[TensorSpec], found: Sequence[str]) -> list[str]:
    """Names of the outputs: `texts`, else the architecture's own, else those that were `found`. Raises UsageError."""
    names = list(texts or built.outputs or found)
    taken = [spec.name for spec in inputs]
    if twice := [name for name in names if names.count(name) + taken.count(name) > 1]:
        own = "" if texts else f"; {built.factory} names it so: give all outputs names with `outputs`"
        raise UsageError(f"the name {twice[0]!r} is given to two inputs or outputs{own}")
    if len(names) != len(found):
        raise UsageError(f"{built.factory} has {len(found)} outputs, and {len(names)} names were given: {', '.join(names)}")
    return names


def load_preprocesses(spec: str | None, inputs: Sequence[TensorSpec], *, probe: bool = True) -> dict[str, Preprocess]:
    """`--preprocess` by image input, first that of the image files themselves; empty where there is none.

    `imagenet` is for the only image input, and `left=imagenet,right=mnist` for those named. Raises as `load_preprocess` does.
    """
    specs = {each.name: each for each in inputs}
    loaded = {
        name: load_preprocess(text, [specs[name]] if name in specs else inputs, probe=probe)
        for name, text in _by_input(spec, inputs).items()
    }
    return {name: each for name, each in loaded.items() if each is not None}


def _by_input(spec: str | None, inputs: Sequence[TensorSpec]) -> dict[str, str]:
    """What `--preprocess` says for each image input, by its name."""
    if spec is None:
        return {}
    names = {each.name for each in inputs}
    parts = [part.partition("=") for part in spec.split(",")]
    if all(equals and name in names for name, equals, _ in parts):
        if len({name for name, _, _ in parts}) < len(parts):
            raise UsageError(f"`preprocess` {spec} names an input twice")
        return {name: text for name, _, text in parts}
    images = [each for each in inputs if takes_images(each)] if len(inputs) > 1 else list(inputs)
    if len(images) > 1:
        example = ",".join(f"{each.name}=imagenet" for each in images)
        raise UsageError(f"`preprocess` must say which input it is for, such as {example}: the first is that of the image files")
    return {each.name: spec for each in images} or {"": spec}


def image_fields(preprocesses: Mapping[str, Preprocess], inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """The fields of a manifest about the image inputs: `preprocess`, `image` and `other_images`."""
    first = next(iter(preprocesses), None)
    return {
        "preprocess": preprocesses[first] if first is not None else None,
        "image": first if len(inputs) > 1 else None,
        "other_images": {name: each for name, each in preprocesses.items() if name != first},
    }


def load_preprocess(spec: str | None, inputs: Sequence[TensorSpec], *, probe: bool = True) -> Preprocess | None:
    """`--preprocess`, a preset, a JSON file or a function, for the image input it is given to.

    probe: run a function on a made-up image. Raises UsageError when it does not fit, UserCodeError for a function that fails.
    """
    if spec is None:
        return None
    if len(inputs) != 1:
        raise UsageError(f"`preprocess` is for models with one image input; this one takes {', '.join(map(str, inputs))}")
    loaded = _for_size(spec, inputs[0])
    if loaded.function is not None:
        _try_function(loaded, loaded.function, spec, inputs[0], probe=probe)
        return loaded
    if not _is_image(inputs):
        raise UsageError(f"`preprocess` {spec} is for models with one image input; this one takes {inputs[0]}")
    if misfit := _misfit(loaded, inputs[0]):
        raise UsageError(f"`preprocess` {spec} does not fit the input: {misfit}")
    return loaded


def upright(preprocesses: Mapping[str, Preprocess]) -> dict[str, Preprocess]:
    """The same, of images that are first turned as their EXIF orientation says. Raises UsageError where there is none."""
    if not preprocesses:
        raise UsageError("`exif_orientation` is a part of the preprocessing: say how images become the input with `preprocess`")
    return {name: dataclasses.replace(each, exif_orientation=True) for name, each in preprocesses.items()}


def copy_functions(preprocesses: Mapping[str, Preprocess], spec: str | None, inputs: Sequence[TensorSpec], target: Path) -> None:
    """Copy the files of the user's functions, which `spec` names, to the folder `target`.

    Raises UsageError for two files of one name.
    """
    copied: dict[str | None, str | None] = {}
    for name, text in _by_input(spec, inputs).items():
        function = preprocesses[name].function if name in preprocesses else None
        if function is None:
            continue
        if function.file is not None and copied.setdefault(function.file, function.sha256) != function.sha256:
            raise UsageError(f"`preprocess` names two files {function.file}: in the artifact, they need names of their own")
        function.copy(_folder_of(text), target)


def check_decode(decode: Decode | None, classes: Sequence[str] | None, outputs: Sequence[TensorSpec]) -> None:
    """Raise UsageError where `--decode` cannot read the outputs of a model."""
    if decode is not None:
        decode.check(outputs, None if classes is None else len(classes))


def try_decode(decode: Decode | None, classes: Sequence[str] | None, outputs: Feed, folder: Path) -> None:
    """Read boxes from outputs of the model: what does not fit is known before the work. folder: where a function's file is.

    Raises UsageError where `--decode` cannot read them, and UserCodeError where the user's function fails, or returns no boxes.
    """
    if decode is None:
        return
    specs = [TensorSpec(name=name, dtype=str(array.dtype), shape=array.shape) for name, array in outputs.items()]
    check_decode(decode, classes, specs)
    decode(outputs, specs, None if classes is None else len(classes), folder)


def copy_decode(decode: Decode | None, spec: str | None, target: Path) -> None:
    """Copy the file of the user's function, which `--decode` names as `spec`, to the folder `target`, and import it there.

    Raises UsageError where another file of its name is there, and what `UserFunction.load` raises.
    """
    function = decode.function if decode is not None else None
    if function is None or spec is None:
        return
    if function.file is not None and (target / function.file).exists() and file_digest(target / function.file) != function.sha256:
        raise UsageError(
            f"`preprocess` and `decode` name two files {function.file}: in the artifact, they need names of their own"
        )
    function.copy(_folder_of(spec), target)
    function.load(target)


def _try_function(preprocess: Preprocess, function: UserFunction, spec: str, image: TensorSpec, *, probe: bool) -> None:
    """Load the function from a copy of its file, as it will be from the artifact, and run it on made-up images until one fits.

    Raises UserCodeError, with the lines of the user's own file.
    """
    with tempfile.TemporaryDirectory(prefix="deploy-") as folder:
        function.copy(_folder_of(spec), Path(folder))
        function.load(Path(folder))
        if probe:
            _run_on_made_up(ImageInput(spec=image, preprocess=preprocess.within(Path(folder))), Path(folder) / "made-up.jpg")


def _run_on_made_up(source: ImageInput, path: Path) -> None:
    """Raise UserCodeError where the function takes none of the images that a model like this may be for.

    They are written to `path` and read as all images are, for a function may look at their format or the name of the file.
    """
    own = _size_of(source.spec) if _is_image([source.spec]) else None
    failed: list[UserCodeError] = []
    for mode, (height, width) in itertools.product(("RGB", "L"), ([own] if own else []) + [(480, 640)]):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        try:
            Image.fromarray(noise).convert(mode).save(path)
            source.fit(source.preprocess(read_image(path)))
            return
        except UserCodeError as error:
            failed.append(UserCodeError(f"{error}\nit was tried on a made-up image of {width}x{height} pixels, {mode}"))
            failed[-1].__cause__ = error.__cause__
    raise failed[0]


def _folder_of(spec: str) -> Path:
    source, _ = split_spec(spec, "the function", "FUNCTION")
    return source.parent if isinstance(source, Path) else Path()


def default_preprocess(built: BuiltModel, inputs: Sequence[TensorSpec]) -> Preprocess | None:
    """The architecture's own preprocessing; none, with a warning, where another input than its own was given."""
    if built.preprocess is None or not _is_image(inputs):
        return None
    own = built.preprocess if isinstance(built.preprocess, Preprocess) else _for_size(built.preprocess, inputs[0])
    if misfit := _misfit(own, inputs[0]):
        logger.warning("the preprocessing of %s is left out: %s; give one with `preprocess`", built.factory, misfit)
        return None
    return own


def read_classes(path: Path) -> list[str]:
    """Class names, one a line. Raises UsageError when the file is missing, empty or names a class twice."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the class names of {path}: {error}") from error
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        raise UsageError(f"{path} must hold one class name a line, and no empty line between them")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{path} names {twice[0]!r} twice")
    return names


def check_classes(classes: Sequence[str] | None, shapes: Sequence[Sequence[Dim]]) -> None:
    """Raise UsageError when the only output, of one of `shapes`, is a row of scores and there are not as many `classes`."""
    scores = shapes[0][1] if len(shapes) == 1 and len(shapes[0]) == 2 else None
    if classes is not None and isinstance(scores, int) and scores != len(classes):
        raise UsageError(f"`classes` has {len(classes)} names, and the model gives {scores} scores")


def _is_image(inputs: Sequence[TensorSpec]) -> bool:
    return len(inputs) == 1 and len(inputs[0].shape) == 4


def _for_size(spec: str, image: TensorSpec) -> Preprocess:
    return Preprocess.load(spec, _size_of(image) if _is_image([image]) else None)


def _size_of(image: TensorSpec) -> tuple[int, int] | None:
    """Height and width of an image input; None where they are dynamic."""
    height, width = image.shape[2:] if image.shape[1] in (1, 3) else image.shape[1:3]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _misfit(preprocess: Preprocess, image: TensorSpec) -> str:
    """How the array that `preprocess` makes differs from the input, as far as both are fixed; "" where it does not."""
    if image.dtype not in IMAGE_DTYPES:
        return f"it makes float32 of an image, and the model takes {image}"
    size: tuple[Dim, Dim] = preprocess.size or ("height", "width")
    made = (preprocess.channels, *size) if preprocess.layout == "chw" else (*size, preprocess.channels)
    wanted = image.shape[1:]
    if all(have == want or isinstance(have, str) or isinstance(want, str) for have, want in zip(made, wanted, strict=True)):
        sides = [side for side, have in zip(wanted, made, strict=True) if isinstance(have, str)]
        short = preprocess.resize
        if isinstance(short, int) and sides and all(isinstance(side, int) and side < short for side in sides):
            return f"it makes images of {short} pixels or more a side ({preprocess.layout}), and the model takes {image}"
        return ""
    return f"it makes {format_shape(made)} ({preprocess.layout}) of an image, and the model takes {image}"
