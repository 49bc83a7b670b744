"""Which candidate of a part of `gpu_report.py` ended its process, so that the part is measured again without it.

A library that crashes ends the process, and nothing in it can say so: the label of the candidate that is at work lies in a file.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Crashes:
    """The candidates of one part that ended a process, by label, in files that the processes share.

    work: the folder of `Setting.work`. part: a name of PARTS.
    """

    def __init__(self, work: Path, part: str) -> None:
        self._at_work = work / "crashes" / f"{part}.txt"
        self._known = work / "crashes" / f"{part}.json"

    def clear(self) -> None:
        """Forget all: each candidate has another try."""
        self._at_work.unlink(missing_ok=True)
        self._known.unlink(missing_ok=True)

    @contextmanager
    def watched(self, label: str) -> Iterator[None]:
        """While a candidate is opened or runs. An exception is no crash."""
        self._at_work.parent.mkdir(parents=True, exist_ok=True)
        self._at_work.write_text(label, encoding="utf-8")
        try:
            yield
        finally:
            self._at_work.unlink()

    def known(self) -> dict[str, str]:
        """Why each candidate that ended a process is left out, by label."""
        return json.loads(self._known.read_text(encoding="utf-8")) if self._known.is_file() else {}

    def blame(self, reason: str) -> str | None:
        """After a process has crashed: keep `reason` for the candidate that was at work, and return its label; None if none was."""
        if not self._at_work.is_file():
            return None
        label = self._at_work.read_text(encoding="utf-8")
        self._known.write_text(json.dumps({**self.known(), label: reason}), encoding="utf-8")
        self._at_work.unlink()
        return label
