"""`benchmarks/gpu_kit.py`: what it packs is installed and runs, part by part, without a network."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PAYLOAD = os.urandom(20_000)


@pytest.fixture
def kit(script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit of one small wheel, in parts that are smaller than the whole."""
    wheel = tmp_path / "small_thing-1.5-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("small_thing.py", f"PAYLOAD = bytes.fromhex({PAYLOAD.hex()!r})\n")
        file.writestr("small_thing-1.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.5\n")
        file.writestr("small_thing-1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("small_thing-1.5.dist-info/RECORD", "")
    out = tmp_path / "kit"
    monkeypatch.setattr(sys, "argv", ["gpu_kit.py", str(wheel), "--out", str(out), "--part-mib", "1.5"])
    script("gpu_kit").main()
    return out


def run(part: Path, there: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KIT": str(there), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["sh", part / "run.sh", *command], env=env, capture_output=True, text=True, timeout=120, check=False)


def test_parts_are_kept_in_any_order_and_the_last_one_installs_and_runs(kit: Path, tmp_path: Path) -> None:
    parts = sorted(kit.iterdir(), key=lambda path: -int(path.name))
    assert len(parts) > 2
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 1.6 * 2**20 for part in parts)
    code = "import os, small_thing, deploy, pathlib; print(len(small_thing.PAYLOAD), deploy.__file__, os.getcwd())"
    there = tmp_path / "there"
    for count, part in enumerate(parts[:-1], 1):
        assert run(part, there, "python3", "-c", code).stdout == f"{count} of {len(parts)} parts are there\n"
    done = run(parts[-1], there, "python3", "-c", code)
    assert done.stdout == f"20000 {there}/sources/deploy/__init__.py {there}/sources\n", done.stderr
    assert (there / "sources" / "deploy" / "models" / "lenet5.py").is_file()  # links stay links
    assert run(parts[0], there, "python3", "-c", code).stdout == done.stdout  # and again, without installing


def test_a_damaged_part_is_refused(kit: Path, tmp_path: Path) -> None:
    (damaged,) = (kit / "1").glob("part.*")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    *_, done = [run(part, tmp_path / "there", "true") for part in kit.iterdir()]
    assert done.returncode != 0
    assert "FAILED" in done.stdout + done.stderr
    assert not (tmp_path / "there" / "site").exists()
