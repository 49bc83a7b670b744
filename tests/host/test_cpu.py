import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.host import cpu
from deploy.host.cpu import cpu_model, instruction_sets, usable_cores


def test_cores_are_those_that_the_process_may_use() -> None:
    program = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        " from deploy.host.cpu import usable_cores; print(usable_cores())"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "1\n"
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_the_processor_has_a_name() -> None:
    assert cpu_model()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_vnni avx512_bitalg\n", True),
        ("flags : fpu avx_vnni\n", True),
        ("flags : fpu avx2 avx512f\nvmx flags : avx512_vnni\n", False),
        ("Features : fp asimd asimddp\n", False),  # ARM
        ("", False),
    ],
)
def test_vnni_is_read_from_the_flags_of_the_processor(text: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **kw: text)
    assert cpu.has_vnni.__wrapped__() is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "flags\t\t: fpu sse2 smep avx2 hypervisor avx512_bf16 bmi1 tsc\n\nflags\t: other\n",
            ["avx2", "avx512_bf16", "bmi1", "sse2"],
        ),
        ("Features\t: fp asimd evtstrm sve2 sha3 i8mm bf16\n", ["asimd", "bf16", "fp", "i8mm", "sve2"]),
        ("processor\t: 0\n", []),
    ],
)
def test_instruction_sets_are_those_that_compiled_code_holds(
    text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **options: text if str(self) == "/proc/cpuinfo" else read(self, **options)
    )
    assert instruction_sets() == expected
