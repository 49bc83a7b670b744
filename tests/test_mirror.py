"""Tests mirror the source: `deploy/room/name.py` is tested in `tests/room/test_name.py`, or `test_name_<aspect>.py`.

The `__init__.py` of a package stands for the package: `deploy/cli/__init__.py` is tested in `tests/test_cli.py`, and
`deploy/__init__.py` in `tests/test_deploy.py`.
"""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

ACROSS = {
    "benchmarks/test_bench_harness", "benchmarks/test_gpu_kit", "benchmarks/test_gpu_report", "benchmarks/test_scripts",
    "cli/test_bad_input", "cli/test_commands", "engine/test_tensorrt_names", "gpu/test_aoti", "gpu/test_baselines",
    "gpu/test_builds", "gpu/test_cuda", "gpu/test_devices", "gpu/test_engines", "gpu/test_rules", "runtime/test_threads",
    "serving/test_clients", "serving/test_malformed", "simulator/test_faults", "simulator/test_rules",
    "simulator/test_sessions", "simulator/test_signatures", "simulator/test_soak", "test_docs", "test_examples",
    "test_install", "test_layers", "test_mirror",
}  # fmt: skip
"""Tests of what no single file does."""

COVERED = {
    "__main__": "test_cli",
    "bench/probes": "bench/candidate/test_loadgen",
    "bench/run": "bench/test_bench",
    "bench/workers": "bench/test_bench",
    "evaluation/annotated": "evaluation/test_scoring",
    "evaluation/detector": "evaluation/test_coco",
    "evaluation/metric": "evaluation/test_topk",
    "evaluation/options": "evaluation/test_scoring",
    "evaluation/segmenter": "evaluation/test_predict_pictures",
    "evaluation/tasks": "evaluation/test_predict_pictures",
    "engine/bindings": "engine/test_tensorrt_names",
    "engine/context": "runtime/backends/test_tensorrt_graphs",
    "engine/cuda/capturing": "gpu/test_baselines",
    "engine/cuda/cuda_python": "gpu/test_devices",
    "engine/cuda/pycuda_device": "gpu/test_devices",
    "engine/buffers": "runtime/backends/test_tensorrt",
    "engine/loaded": "runtime/backends/test_tensorrt",
    "evaluation/many_options": "evaluation/test_many",
    "evaluation/rows": "evaluation/test_many",
    "intake/options": "intake/test_fit",
    "serving/grpc_frame": "serving/test_grpc_door",
    "serving/grpc_service": "serving/test_grpc_door",
    "serving/grpc_tensors": "serving/test_clients",
    "serving/ray_replica": "serving/test_ray_serve",
    "serving/stages": "serving/test_tracing",
    "intake/recipe": "intake/test_torchvision",
    "models/convnet": "models/test_registry",
    "models/errors": "models/test_registry",
    "models/lenet5": "models/test_registry",
    "models/mlp": "models/test_registry",
    "pipeline/typed": "pipeline/test_build_trt",
    "precision/converted": "precision/half/test_convert",
    "precision/int8/absorb": "precision/int8/test_smooth",
    "progress": "cli/test_common",
    "runtime/backends/tensorrt_rtx": "runtime/test_load",
    "runtime/device_calls": "runtime/backends/test_tensorrt",
    "runtime/cuda_graphs": "gpu/test_baselines",
    "runtime/profiling": "runtime/test_layers",
    "version": "test_cli",
    "tune/options": "cli/test_tune",
    "tune/page": "cli/test_tune",
    "tune/text": "cli/test_tune",
    "artifact/tuning": "tune/test_tune",
    "verify/floor": "verify/test_verify",
    "verify/page": "cli/test_verify",
    "verify/text": "cli/test_verify",
}
"""Source files without a test file of their own, and the one that covers them."""


def sources() -> set[str]:
    """Every source file below `deploy/`, `models/` and `calibration/` that holds code, as `room/name`."""
    found = set()
    for base, folder in ((ROOT / "deploy", "."), (ROOT, "models"), (ROOT, "calibration")):
        for path in (base / folder).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            if path.name == "__init__.py":
                if _is_docstring(path):
                    continue
                parts = parts[:-1] or (base.name,)
            found.add("/".join(parts))
    return found


def _is_docstring(path: Path) -> bool:
    """Whether the file of a package holds little more than its docstring."""
    return len(path.read_text(encoding="utf-8").splitlines()) < 10


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
