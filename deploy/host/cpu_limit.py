"""The CPU time that control groups allow this process: what a container or a service may use of the processors."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def cpu_limit(process: Path = Path("/proc/self")) -> float | None:
    """The CPUs whose time this process may use, 1.5 for example; None without a limit.

    The least quota of all groups from the process's own up to the topmost that is mounted here, in version 1 (`cpu.cfs_quota_us`
    over `cpu.cfs_period_us`) and version 2 (`cpu.max`) of cgroups(7). process: its folder in proc(5).
    """
    try:
        groups = [_Group.read(line) for line in (process / "cgroup").read_text(encoding="utf-8").splitlines()]
        mounts = [_Mount.read(line) for line in (process / "mountinfo").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # no proc(5), or not as cgroups(7) has it: nothing is known of a limit
        return None
    limits = [
        limit
        for group in groups
        for mount in mounts
        if mount.holds(group)
        for level in mount.levels(group.path)
        if (limit := _quota(level)) is not None
    ]
    return min(limits, default=None)


@dataclass(frozen=True)
class _Group:
    """A line of /proc/PID/cgroup. controllers: none in version 2."""

    controllers: tuple[str, ...]
    path: str

    @classmethod
    def read(cls, line: str) -> "_Group":
        _, controllers, path = line.split(":", 2)
        return cls(tuple(filter(None, controllers.split(","))), path)


@dataclass(frozen=True)
class _Mount:
    """A line of /proc/PID/mountinfo: the file system's type and options, its folder `root` that is seen at `point`."""

    kind: str
    options: tuple[str, ...]
    root: str
    point: Path

    @classmethod
    def read(cls, line: str) -> "_Mount":
        before, _, after = line.partition(" - ")
        root, point = (_plain(word) for word in before.split()[3:5])
        words = after.split()
        return cls(words[0], tuple(words[-1].split(",")), root, Path(point))

    def holds(self, group: _Group) -> bool:
        """Whether the CPU quota of this group is in files of this mount."""
        if self.kind == "cgroup2":
            return not group.controllers
        return self.kind == "cgroup" and "cpu" in self.options and "cpu" in group.controllers

    def levels(self, path: str) -> Iterator[Path]:
        """The folders from the group at `path` up to the mount point; the mount point alone where the group is not below it."""
        root = self.root.rstrip("/")
        inner = path.removeprefix(root).strip("/") if f"{path}/".startswith(f"{root}/") else ""
        level = self.point / inner if ".." not in inner.split("/") else self.point
        while True:
            yield level
            if level == self.point:
                return
            level = level.parent


def _plain(word: str) -> str:
    """A path of mountinfo, whose spaces and the like are written in octal."""
    return re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), word)


def _quota(group: Path) -> float | None:
    """The quota of one group over its period; None without one."""
    try:
        if (both := group / "cpu.max").exists():
            limit, period = both.read_text(encoding="ascii").split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period"))
        return int(limit) / int(period) if limit not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):  # the topmost group has no such file
        return None
