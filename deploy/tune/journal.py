"""What a search has measured so far, kept in the cache: a search that was interrupted goes on where it was."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from deploy.artifact.manifest import Accuracy, request_digest
from deploy.host.cache import cache_folder, keep


class MeasuredMix(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The time of a mix as a share of that in floating point, in the same rounds, and its standard error. int8: the names of its units in INT8."""

    int8: list[str]
    share: float
    error: float


class MeasuredTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cost model is fitted to.

    mixes: the first has everything in INT8. floating, int8: by the name of a unit, its share of the time of the network in floating point, and of that
    in INT8, by profiles; None where the backend has none.
    """

    mixes: list[MeasuredMix]
    floating: dict[str, float] | None
    int8: dict[str, float] | None


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    times: MeasuredTimes | None = None
    damages: dict[str, float] = {}
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
    def times(self) -> MeasuredTimes | None:
        """Those of mixes and of the layers of the network, if they were measured."""
        return self._file.times

    def set_times(self, times: MeasuredTimes) -> None:
        self._file.times = times
        self._keep()

    @property
    def damages(self) -> Mapping[str, float]:
        """By the names of the units."""
        return self._file.damages

    def add_damage(self, unit: str, damage: float) -> None:
        self._file.damages[unit] = damage
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
