"""The choice among the optimization profiles of an engine for the shapes of a feed."""

from collections.abc import Mapping, Sequence

from deploy.artifact.tensors import Profile, format_shape
from deploy.errors import InputError

Shape = tuple[int, ...]

_KNOWN_SHAPES = 4096


class ProfileChoice:
    """Chooses the profile for the shapes of the inputs, and remembers the choice.

    name: what errors call the model. command: what builds it for other shapes.
    """

    def __init__(self, name: str, input_names: Sequence[str], profiles: Sequence[Profile], command: str = "build-trt") -> None:
        self._name = name
        self._input_names = tuple(input_names)
        self._profiles = tuple(profiles)
        self._command = command
        self._known: dict[tuple[Shape, ...], int] = {}

    def index(self, shapes: tuple[Shape, ...]) -> int:
        """The index of the profile that holds these shapes; of several, the one with the nearest optimum.

        shapes: one for each input, in order. Raises InputError if no profile holds them.
        """
        index = self._known.get(shapes)
        if index is None:
            index = self._find(dict(zip(self._input_names, shapes, strict=True)))
            if len(self._known) >= _KNOWN_SHAPES:
                self._known.clear()
            self._known[shapes] = index
        return index

    def _find(self, shapes: Mapping[str, Shape]) -> int:
        fitting = [index for index, profile in enumerate(self._profiles) if holds(profile, shapes)]
        if not fitting:
            if not self._profiles:
                return 0
            given = ", ".join(f"{name} {format_shape(shape)}" for name, shape in shapes.items())
            ranges = " or ".join(", ".join(f"{n}={r}" for n, r in profile.items()) for profile in self._profiles)
            raise InputError(
                f"{given} is outside every profile of {self._name!r}: expected {ranges};"
                f" build with `deploy {self._command} --shapes` for more"
            )
        return min(fitting, key=lambda index: _distance(self._profiles[index], shapes))


def holds(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    """Whether shapes by input name are within a profile."""
    return all(
        len(shapes[name]) == len(sides.min)
        and all(low <= size <= high for low, size, high in zip(sides.min, shapes[name], sides.max, strict=True))
        for name, sides in profile.items()
    )


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> int:
    return sum(abs(a - b) for name, sides in profile.items() for a, b in zip(sides.opt, shapes[name], strict=True))
