"""What a search has measured so far, kept in the cache: a search that was interrupted goes on where it was."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from deploy.artifact.manifest import Accuracy, request_digest
from deploy.host.cache import cache_folder, keep


class MeasuredUnit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured of a unit: `alone`, `without` and `damage` of `artifact.tuning.TunedUnit`; whole: all in INT8, in the same rounds.

    error: the standard error of the unit's gain, half the difference of what `alone` and `without` change.
    """

    alone: float
    without: float
    whole: float
    error: float
    damage: float


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    whole: float | None = None
    units: dict[str, MeasuredUnit] = {}
    accuracies: dict[str, Accuracy] = {}


class Journal:
    """The measurements of one search, by everything that they depend on; a damaged file is as good as none.

    request: None where the data can be read only once: nothing is kept then.
    """

    def __init__(self, request: Mapping[str, Any] | None) -> None:
        self.path: Path | None = cache_folder() / "tune" / f"{request_digest(request)}.json" if request is not None else None
        self._file = _File()
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError):  # msgspec's errors, JSON's and Unicode's are ValueErrors
                self._file = msgspec.convert(json.loads(self.path.read_bytes()), _File)

    @property
    def units(self) -> Mapping[str, MeasuredUnit]:
        """By the names of the units."""
        return self._file.units

    @property
    def whole(self) -> float | None:
        """The time of everything in INT8, as a share of that in floating point."""
        return self._file.whole

    def set_whole(self, share: float) -> None:
        self._file.whole = share
        self._keep()

    def add_unit(self, name: str, measured: MeasuredUnit) -> None:
        self._file.units[name] = measured
        self._keep()

    def accuracy(self, tested: Mapping[str, Any]) -> Accuracy | None:
        """What was found of the files and the data that `tested` says, if they were tested."""
        return self._file.accuracies.get(request_digest(tested))

    def add_accuracy(self, tested: Mapping[str, Any], found: Accuracy) -> None:
        self._file.accuracies[request_digest(tested)] = found
        self._keep()

    def _keep(self) -> None:
        if self.path is not None:
            keep(self.path, json.dumps(msgspec.to_builtins(self._file)).encode(), "the measurements")
