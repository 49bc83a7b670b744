"""Tests mirror the source: `deploy/room/name.py` is tested in `tests/room/test_name.py`, or `test_name_<aspect>.py`."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

ACROSS = {
    "test_docs", "test_examples", "test_install", "test_layers", "test_mirror", "benchmarks/test_bench_harness", "benchmarks/test_gpu_report",
    "benchmarks/test_scripts", "cli/test_bad_input", "cli/test_commands", "engine/test_tensorrt_names", "gpu/test_baselines", "gpu/test_cuda",
    "gpu/test_engines", "engine/cuda/test_cuda", "runtime/test_threads", "serving/test_clients", "serving/test_malformed",
}  # fmt: skip
"""Tests of what no single file does."""

COVERED: dict[str, str] = {}
"""Source files without a test file of their own, and the one that covers them."""


def sources() -> set[str]:
    """Every source file below `deploy/`, `models/` and `calibration/`, as `room/name`."""
    files = [
        path for path in (ROOT / "deploy").rglob("*.py") if not {"models", "calibration"} & set(path.relative_to(ROOT).parts)
    ]
    found = {str(path.relative_to(ROOT / "deploy").with_suffix("")) for path in files}
    for folder in ("models", "calibration"):
        found |= {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / folder).glob("*.py")}
    return {name for name in found if not _is_docstring(name)}


def _is_docstring(name: str) -> bool:
    """Whether the file is a package's `__init__` that holds little more than its docstring."""
    path = next(base / f"{name}.py" for base in (ROOT / "deploy", ROOT) if (base / f"{name}.py").is_file())
    return path.name == "__init__.py" and len(path.read_text(encoding="utf-8").splitlines()) < 10


def written() -> set[str]:
    return {str(path.relative_to(TESTS).with_suffix("")) for path in TESTS.rglob("test_*.py")}


def mirrored(test: str) -> str | None:
    """The source file that a test file is named after; None where there is none."""
    folder, _, name = test.rpartition("/")
    words = name.removeprefix("test_").split("_")
    for count in range(len(words), 0, -1):
        source = "/".join(filter(None, (folder, "_".join(words[:count]))))
        if source in SOURCES:
            return source
    return None


SOURCES = sources()


@pytest.mark.parametrize("test", sorted(written() - ACROSS))
def test_a_test_file_is_named_after_a_source_file(test: str) -> None:
    assert mirrored(test) is not None


def test_every_source_file_has_a_test_file_or_is_covered_by_a_named_one() -> None:
    missing = SOURCES - {mirrored(test) for test in written()}
    assert missing == set(COVERED)
    assert set(COVERED.values()) <= written()


def test_what_tests_go_across_is_there() -> None:
    assert written() >= ACROSS
