"""The sizes at which a model with dynamic dimensions is measured."""

from collections.abc import Mapping, Sequence

from deploy.artifact.manifest import Manifest
from deploy.artifact.tensors import batch_dim, default_dims, format_shape, parse_fixed_shapes
from deploy.errors import InputError, UsageError

Shapes = Mapping[str, tuple[int, ...]]


def read_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`["input=1x3x224x224"]` -> shapes by input name. Raises UsageError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, (shape,) = parse_fixed_shapes(text, what="`shapes`", expected="NAME=SHAPE, such as input=1x3x224x224")
        if name in shapes:
            raise UsageError(f"`shapes` names {name!r} twice")
        shapes[name] = shape
    return shapes


def bench_dims(manifest: Manifest, shapes: Shapes) -> dict[str, int]:
    """A size for every symbolic dimension of the inputs except the batch: that in `shapes`, else the default.

    Raises UsageError for shapes that the inputs cannot have, and for a dimension without a size.
    """
    specs = manifest.inputs
    unknown = [name for name in shapes if name not in [spec.name for spec in specs]]
    if unknown:
        raise UsageError(f"`shapes`: unknown input {unknown[0]!r}; expected one of {', '.join(spec.name for spec in specs)}")
    batch = batch_dim(specs)
    asked: dict[str, int] = {}
    for spec in specs:
        if shape := shapes.get(spec.name):
            if len(shape) == len(spec.shape):  # `batches` decides the batch: any number will do
                shape = tuple(1 if dim == batch else size for dim, size in zip(spec.shape, shape, strict=True))
            try:
                spec.check(spec.dtype, shape, asked)
            except InputError as error:
                raise UsageError(f"`shapes`: {error}") from error
    remedy = "give it with `shapes` NAME=SHAPE, such as input=1x3x224x224"
    image = manifest.preprocess.shape if manifest.preprocess else None
    sizes = default_dims(specs, manifest.profiles, image, known=asked, remedy=remedy)
    return {dim: size for dim, size in sizes.items() if dim != batch}


def shown_shapes(manifest: Manifest, dims: Mapping[str, int]) -> dict[str, str]:
    """The shape of each input that `dims` give a size to: `{"input": "batchx3x224x224"}`."""
    return {
        spec.name: format_shape([dims.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape])
        for spec in manifest.inputs
        if set(spec.dynamic) & set(dims)
    }
