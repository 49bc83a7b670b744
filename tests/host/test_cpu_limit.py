"""The CPU time that control groups allow."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.host import cpu
from deploy.host.cpu_limit import cpu_limit

V1 = "4:cpu,cpuacct:{path}\n1:name=systemd:/elsewhere\n0::/elsewhere\n"
V2 = "0::{path}\n"


def machine(folder: Path, groups: str, root: str, quotas: dict[str, str], kind: str = "cgroup2", options: str = "rw") -> Path:
    """A folder like /proc/self: its group, and a mount of `root` at a folder with a space in its name, with quotas by group."""
    point = folder / "the groups"
    for group, text in quotas.items():
        (point / group).mkdir(parents=True, exist_ok=True)
        if kind == "cgroup2":
            (point / group / "cpu.max").write_text(f"{text}\n")
        else:
            quota, period = text.split()
            (point / group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (point / group / "cpu.cfs_period_us").write_text(f"{period}\n")
    point.mkdir(exist_ok=True)
    process = folder / "proc"
    process.mkdir()
    (process / "cgroup").write_text(groups)
    escaped = str(point).replace(" ", "\\040")
    (process / "mountinfo").write_text(
        "23 1 0:22 / /proc rw,relatime shared:5 - proc proc rw\n"
        f"36 31 0:33 / {folder}/memory rw,relatime - cgroup cgroup rw,memory\n"
        f"32 31 0:29 {root} {escaped} rw,relatime shared:9 master:1 - {kind} {kind} {options}\n"
    )
    return process


@pytest.mark.parametrize(
    ("path", "root", "quotas", "expected"),
    [
        ("/", "/", {"": "150000 100000"}, 1.5),
        ("/", "/", {"": "max 100000"}, None),
        ("/", "/", {}, None),
        ("/a.slice/b", "/", {"a.slice": "max 100000", "a.slice/b": "100000 100000"}, 1),
        ("/a.slice/b", "/", {"a.slice": "50000 100000", "a.slice/b": "max 100000"}, 0.5),  # a parent's
        ("/a/b/c", "/", {"a": "300000 100000", "a/b": "250000 100000", "a/b/c": "800000 100000"}, 2.5),  # the least
        ("/a/b", "/", {"c": "50000 100000", "a/b": "max 100000"}, None),  # of another group
        ("/docker/0a1b", "/docker/0a1b", {"": "200000 100000"}, 2),  # the mount is the container's own group
        ("/docker/0a1b/in", "/docker/0a1b", {"": "200000 100000", "in": "100000 100000"}, 1),
        ("/../../outside", "/", {"": "200000 100000"}, 2),  # beyond the root of the namespace
        ("/docker/0a1bc", "/docker/0a1b", {"": "200000 100000", "c": "100000 100000"}, 2),  # no child of it, only alike
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_the_least_quota_from_the_group_up_to_the_root_counts(
    tmp_path: Path, version: int, path: str, root: str, quotas: dict[str, str], expected: float | None
) -> None:
    groups = (V1 if version == 1 else V2).format(path=path)
    if version == 1:
        quotas = {group: text.replace("max", "-1") for group, text in quotas.items()}
        process = machine(tmp_path, groups, root, quotas, "cgroup", "rw,cpu,cpuacct")
    else:
        process = machine(tmp_path, groups, root, quotas)
    assert cpu_limit(process) == expected


def test_a_mount_of_other_controllers_says_nothing(tmp_path: Path) -> None:
    process = machine(tmp_path, V1.format(path="/"), "/", {"": "100000 100000"}, "cgroup", "rw,cpuset")
    assert cpu_limit(process) is None


@pytest.mark.parametrize("text", ["", "nonsense", "1 2 3", "100000 0", "x 100000"])
def test_a_file_of_another_form_is_no_limit(tmp_path: Path, text: str) -> None:
    assert cpu_limit(machine(tmp_path, V2.format(path="/"), "/", {"": text})) is None


@pytest.mark.parametrize("missing", ["cgroup", "mountinfo"])
def test_without_files_of_the_process_there_is_no_limit(tmp_path: Path, missing: str) -> None:
    process = machine(tmp_path, V2.format(path="/"), "/", {"": "100000 100000"})
    (process / missing).unlink()
    assert cpu_limit(process) is None


@pytest.mark.parametrize(("limit", "expected"), [(None, 8), (0.4, 1), (1.0, 1), (2.9, 2), (8.5, 8), (64.0, 8)])
def test_threads_are_the_limit_rounded_down_and_one_at_least(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: int
) -> None:
    monkeypatch.setattr(cpu, "physical_cores", lambda: 8)
    monkeypatch.setattr(cpu, "cpu_limit", lambda: limit)
    assert cpu.usable_cores() == expected


@pytest.fixture
def group() -> Iterator[Path]:
    """A new control group below the one that this process may make groups in."""
    for root in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):
        made = root / f"deploy-test-{os.getpid()}"
        inner = made / "inner"
        try:
            inner.mkdir(parents=True)
        except OSError:
            continue
        try:
            if (made / "cpu.max").exists() or (made / "cpu.cfs_quota_us").exists():
                yield made
                return
        finally:
            inner.rmdir()
            made.rmdir()
    pytest.skip("control groups with CPU quotas cannot be made here")


def test_a_real_group_limits_the_threads_of_what_runs_below_it(group: Path) -> None:
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text("70000 100000")
    else:
        (group / "cpu.cfs_quota_us").write_text("70000")
    program = (
        f"import os; open('{group}/inner/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from deploy.host.cpu import usable_cores; from deploy.host.cpu_limit import cpu_limit\n"
        "print(cpu_limit(), usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "0.7 1\n", done.stderr
