"""Pack what a GPU machine without a network needs to run the acceptance: wheels, and the committed sources of this project.

    python benchmarks/gpu_kit.py                                  into build/gpu-kit/1, 2, ...
    python benchmarks/gpu_kit.py --python 3.12 NAME==VERSION...   other packages than the default, or wheels of yours

Each folder is small enough to be carried alone (--part-mib). There, for each of them, in any order:

    sh FOLDER/run.sh                 keeps its part; after the last one, installs all and runs the acceptance
    sh FOLDER/run.sh COMMAND...      or COMMAND, in the folder of the sources, in place of the acceptance

The machine has Python, pip and torch with CUDA. What comes with the kit is installed beside what it has (`pip --target`).
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("build/gpu-kit")
PACKAGES = (
    "msgspec==0.22.0",
    "tensorrt-rtx-cu13-libs==1.7.1.116",
    "tensorrt-rtx-cu13-bindings==1.7.1.116",
    "tensorrt-rtx-cu13==1.7.1.116",
    "onnxruntime-gpu==1.31.1",
)
"""Beside this project. The wheels of full TensorRT are placeholders that download: they cannot be packed."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", default=[*PACKAGES, str(ROOT)], metavar="NAME==VERSION|FILE.whl|FOLDER")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="replaced (default: %(default)s)")
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="Python of the GPU machine (default: %(default)s)")
    parser.add_argument("--part-mib", type=float, default=56.0, metavar="N", help="largest part (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        content = Path(temporary) / "content"
        (content / "wheels").mkdir(parents=True)
        for package in args.packages:
            add_wheel(package, content / "wheels", args.python)
        subprocess.run(["git", "-C", ROOT, "archive", "--output", content / "sources.tar", "HEAD"], check=True)
        whole = Path(temporary) / "kit.tar"
        with tarfile.open(whole, "w") as tar:
            tar.add(content, arcname=".")
        count = split(whole, args.out, int(args.part_mib * 2**20))
        print(*sorted(wheel.name for wheel in (content / "wheels").iterdir()), sep="\n")
    print(f"{count} parts in {args.out}")


def add_wheel(package: str, folder: Path, python: str) -> None:
    """Put the wheel of a package into `folder`: downloaded for Python `python`, or built here from a folder or a pure source."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if package.endswith(".whl"):
        shutil.copy(package, folder)
        return
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), package]
    if Path(package).is_dir():
        subprocess.run(build, check=True)
        return
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    fetch = [
        *pip,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
        *platforms,
    ]
    if subprocess.run([*fetch, "--dest", str(folder), package], check=False, capture_output=True).returncode:
        subprocess.run(build, check=True)  # it has no wheel that fits


def split(whole: Path, out: Path, most: int) -> int:
    """Write `whole` as OUT/1, OUT/2, ..., each with at most `most` bytes of it and the script to run; the number of parts."""
    shutil.rmtree(out, ignore_errors=True)
    size = whole.stat().st_size
    count = -(-size // most)
    digest = hashlib.sha256()
    with whole.open("rb") as file:
        for number in range(1, count + 1):
            piece = file.read(most)
            digest.update(piece)
            folder = out / str(number)
            folder.mkdir(parents=True)
            (folder / f"part.{number:03}").write_bytes(piece)
            shutil.copy(ROOT / "benchmarks" / "gpu_kit_run.sh", folder / "run.sh")
    for folder in out.iterdir():
        (folder / "whole").write_text(f"{count} {digest.hexdigest()}\n", encoding="utf-8")
    return count


if __name__ == "__main__":
    main()
