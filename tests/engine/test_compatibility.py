from typing import Any

import pytest

from deploy.artifact.manifest import Target
from deploy.engine.compatibility import mismatches, rtx_refusal
from deploy.engine.cuda import Gpu

L4 = Gpu(name="NVIDIA L4", compute_capability="8.9", driver="580.95.05")
T4 = Gpu(name="Tesla T4", compute_capability="7.5", driver=None)
B200 = Gpu(name="NVIDIA B200", compute_capability="12.1", driver="590.1")
BUILT: dict[str, Any] = {
    "flavour": "tensorrt",
    "version": "10.16.1",
    "gpu": "NVIDIA L4",
    "compute_capability": "8.9",
    "targets": ["8.9"],
    "driver": "580.10",
}
RTX: dict[str, Any] = {
    "flavour": "tensorrt-rtx",
    "version": "1.7.1",
    "gpu": None,
    "compute_capability": None,
    "targets": ["8.0", "8.6", "8.9", "12.0"],
}


@pytest.mark.parametrize(
    ("target", "version", "gpu"),
    [
        (BUILT, "10.16.1", L4),
        ({**BUILT, "driver": None}, "10.16.1", L4),
        ({**BUILT, "version_compatible": True}, "10.16.2", L4),
        ({**BUILT, "version_compatible": True}, "11.4.0", L4),
        ({**BUILT, "hardware_compatible": True}, "10.16.1", B200),
        (RTX, "1.7.1", L4),
        (RTX, "1.7.1", B200),
    ],
)
def test_what_fits_has_no_mismatch(target: dict[str, Any], version: str, gpu: Gpu) -> None:
    assert mismatches(Target(**target), version, gpu) == []


@pytest.mark.parametrize(
    ("target", "version", "gpu", "expected"),
    [
        (BUILT, "10.16.2", L4, ["built with tensorrt 10.16.1, and 10.16.2 is installed"]),
        ({**BUILT, "version_compatible": True}, "10.9.0", L4, ["built with tensorrt 10.16.1, and 10.9.0 is installed"]),
        (BUILT, "10.16.1", B200, ["built on NVIDIA L4 (compute capability 8.9), and this is NVIDIA B200 (12.1)"]),
        (
            {**BUILT, "hardware_compatible": True},
            "10.16.1",
            T4,
            ["built for compute capability 8.0 and later, and Tesla T4 has 7.5"],
        ),
        (
            {**BUILT, "driver": "590.1"},
            "10.16.1",
            L4,
            ["built with driver 590.1, and the older 580.95.05 is installed"],
        ),
        (RTX, "1.7.1", T4, ["built for compute capability 8.0, 8.6, 8.9, 12.0, and Tesla T4 has 7.5"]),
        ({**RTX, "targets": ["8.6"]}, "1.7.1", L4, ["built for compute capability 8.6, and NVIDIA L4 has 8.9"]),
        (
            BUILT,
            "11.4.0",
            T4,
            [
                "built with tensorrt 10.16.1, and 11.4.0 is installed",
                "built on NVIDIA L4 (compute capability 8.9), and this is Tesla T4 (7.5)",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_said_with_both_sides(target: dict[str, Any], version: str, gpu: Gpu, expected: list[str]) -> None:
    assert mismatches(Target(**target), version, gpu) == expected


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1", "13.0"])
def test_tensorrt_rtx_runs_on_what_its_own_error_lists(capability: str) -> None:
    assert rtx_refusal("a GPU", capability) is None


@pytest.mark.parametrize("capability", ["8.7", "9.0", "10.0", "10.3"])
def test_where_tensorrt_rtx_does_not_run_it_is_said_what_does(capability: str) -> None:
    assert rtx_refusal("NVIDIA H200", capability) == (
        f"TensorRT-RTX does not run on NVIDIA H200 (compute capability {capability}), but on 7.5, 8.0, 8.6, 8.9 and from 12.0 on;"
        " engines of the flavour tensorrt run there"
    )
    assert str(rtx_refusal("TITAN V", "7.0")).endswith("and from 12.0 on")  # no TensorRT of today does
