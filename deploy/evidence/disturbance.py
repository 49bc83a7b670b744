"""Whether other programs disturbed a measurement, and how far off it may be for that.

What another program does to a run, it does while it is on our processors: whatever it is that slows the run down (threads that wait
for a core, partners that spin at a barrier until those come, a shared cache), no more time is added than that program ran. So if
others ran in a share f of the time T of N runs, at most f T was added. To lengthen the median from m to M, half of the runs must
have got M - m each; for runs that take equally long otherwise, T = N m + f T, and N / 2 (M - m) <= f T gives

    M / m <= (1 + f) / (1 - f)

It is this, as a factor on a time, that decides: a time is called uncertain if it may be more than `MOST` times too long, and the
interval of a ratio is widened by it on both sides. Runs get no shorter by a disturbance.

f is the greater of two shares of the time. Waiting: the time that our threads were ready and waited for a processor (run-queue
wait, /proc/PID/task/*/schedstat), all threads together, since one of them holds up the others. Use: the CPU time on our processors
that is not our own (/proc/stat less the time of this process and its descendants), beyond the cores that our threads leave free: the
scheduler puts another program there. The former is exact and is of one candidate's turn; the latter also sees caches, siblings and
virtual machines, comes in steps of 10 ms, and is of whole rounds.

A hypervisor also disturbs without taking time: it moves the processors of a virtual machine apart and together, so that threads that wait
for each other run at two speeds (lenet5 on two cores of one: 0.028 and 0.056 ms), and it lets another guest use the other half of a
core. `host.core_probe` measures both before and after each round, and a round before or after which the cores were slower or farther
apart than they are known to be at their best counts as disturbed. Where such rounds are needed after all, as where rounds are so long that
most of them have a bad moment at one end, the median of what was measured around them decides: where it is within the limits, the cores
were so most of the time, and a median of times is of that time.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from deploy.evidence.timing import Ratio, paired_ratio
from deploy.host.core_probe import CoreProbe, CoreState, best_known, best_of, remember
from deploy.host.cpu import physical_cores
from deploy.host.cpu_use import Reading, take_reading, tick_s
from deploy.words import count_of

MOST = 1.1
"""How many times too long a time may be, by what others did, and be called certain."""
LIMIT = (MOST - 1) / (MOST + 1)
"""The share of the time in which others may run, which follows from `MOST`."""
LEAST = 5
"""Undisturbed rounds without which a measurement is uncertain."""
MOST_SHARE = 0.99
"""Beyond, nothing is known of a time; figures stay finite."""
PATIENCE_S = 10.0
"""Rounds may be taken again for as long as the planned ones took, and short ones for up to so many seconds: a hypervisor's moods last 5 to 30."""
PATIENCE = 5
"""But for no more than so many times as long."""

SAID = 1.1
"""How many times worse than at their best cores are said to be."""

SHOWN = 0.05
"""Cores of other programs from which they are named as a reason: less is shown as 0.0."""

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Use:
    """What others did in a time of `seconds`, or in several.

    cores: those that we may use. threads: those that the measured program needs at a time. others_s, stolen_s: CPU seconds of other
    programs, and of other virtual machines; None if not known. step_s: how far off both may be together. waited_s: seconds that our
    threads waited, together; None if not known.
    """

    seconds: float
    cores: int
    threads: int
    others_s: float | None
    stolen_s: float | None
    step_s: float
    waited_s: float | None

    @property
    def others_cores(self) -> float | None:
        """The number of cores that other programs and virtual machines used, on average."""
        if self.others_s is None or self.stolen_s is None:
            return None
        return min(self.cores, max(0.0, self.others_s + self.stolen_s) / self.seconds)

    @property
    def waited_share(self) -> float | None:
        """The share of the time in which a thread waited; None if not known, and of more threads than cores, which wait for each other."""
        if self.waited_s is None or self.threads > self.cores:
            return None
        return min(1.0, self.waited_s / self.seconds)

    @property
    def used_share(self) -> float | None:
        """The share of the time in which others ran beyond the cores that the measured program leaves free."""
        if self.others_cores is None:
            return None
        return min(1.0, max(0.0, self.others_cores - max(0, self.cores - self.threads)))

    @property
    def share(self) -> float | None:
        """f of this module; None if nothing is known."""
        return max((share for share in (self.waited_share, self.used_share) if share is not None), default=None)

    @property
    def quiet(self) -> bool:
        """Whether a time that was measured in it may be at most `MOST` times too long, the steps of the counters left out."""
        waited, used = self.waited_share, self.used_share
        if waited is None and used is None:
            return False
        return (waited or 0.0) <= LIMIT and (used or 0.0) - self.step_s / self.seconds <= LIMIT


def lengthened(share: float) -> float:
    """How many times too long a median may be if others ran in this share of the time: see the module."""
    share = min(share, MOST_SHARE)
    return (1 + share) / (1 - share)


def allowed(ratio: Ratio, baseline: Use, candidate: Use) -> Ratio:
    """The ratio of the baseline's time to the candidate's, its interval as wide as what may have lengthened either allows."""
    longer, than = (lengthened(MOST_SHARE if use.share is None else use.share) for use in (baseline, candidate))
    return Ratio(value=ratio.value, low=ratio.low / longer, high=ratio.high * than)


def use_between(before: Reading, after: Reading, threads: int) -> Use:
    """What others did between two readings."""
    seconds = max(after.at_s - before.at_s, 1e-9)
    others = stolen = None
    if before.idle_s is not None and after.idle_s is not None and before.stolen_s is not None and after.stolen_s is not None:
        stolen = after.stolen_s - before.stolen_s
        ours = sum(used - before.used_s.get(pid, 0.0) for pid, used in after.used_s.items())
        others = seconds * after.cpus - (after.idle_s - before.idle_s) - stolen - ours
    waited = None
    if before.waited_s is not None and after.waited_s is not None:
        waited = sum(total - before.waited_s.get(thread, 0.0) for thread, total in after.waited_s.items())
    return Use(
        seconds=seconds,
        cores=physical_cores(),
        threads=threads,
        others_s=others,
        stolen_s=stolen,
        step_s=tick_s() * after.cpus**0.5,  # of each CPU one step at random, added up
        waited_s=waited,
    )


def together(uses: Iterable[Use]) -> Use:
    """Several times as one."""
    uses = list(uses)
    return Use(
        seconds=sum(use.seconds for use in uses),
        cores=uses[0].cores,
        threads=max(use.threads for use in uses),
        others_s=_sum(use.others_s for use in uses),
        stolen_s=_sum(use.stolen_s for use in uses),
        step_s=sum(use.step_s**2 for use in uses) ** 0.5,
        waited_s=_sum(use.waited_s for use in uses),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The seconds of each run of one candidate in one round, and what others did meanwhile."""

    samples_s: list[float]
    use: Use


def watch(process: int, threads: int, run: Callable[[], T]) -> tuple[T, Use]:
    """What `run` returns, and what others did meanwhile to the process of this number, which needs so many `threads` at a time."""
    before = take_reading(process)
    result = run()
    return result, use_between(before, take_reading(process), threads)


def take_turn(process: int, threads: int, run: Callable[[], list[float]]) -> Turn:
    """One turn of the candidate in that process, as of `watch`; `run` times it, in seconds."""
    samples_s, use = watch(process, threads, run)
    return Turn(samples_s=samples_s, use=use)


class Round(dict[K, Turn]):
    """The turns of one round, by candidate. cores: what they were like before and after it, empty if not known; best: what they can be."""

    cores: tuple[CoreState, ...] = ()
    best: CoreState | None = None

    def only(self, candidates: Iterable[K]) -> "Round[K]":
        """The round without the turns of others."""
        part = Round({candidate: self[candidate] for candidate in candidates})
        part.cores, part.best = self.cores, self.best
        return part

    @property
    def threads(self) -> int:
        """The most threads of a candidate."""
        return max((turn.use.threads for turn in self.values()), default=1)

    def use(self, candidate: K) -> Use:
        """What others did to a candidate: the waits of its own turn, and what they used in the whole round, as if spread over all turns."""
        whole, own = together(turn.use for turn in self.values()), self[candidate].use
        part = own.seconds / whole.seconds
        others, stolen = (None if spent is None else spent * part for spent in (whole.others_s, whole.stolen_s))
        return replace(
            own, others_s=others, stolen_s=stolen, step_s=own.step_s * part
        )  # the steps of the turns between cancel out

    @property
    def quiet(self) -> bool:
        """Whether no candidate was disturbed."""
        return all(self.use(candidate).quiet for candidate in self)


def take_rounds(take: Callable[[int], Round[K]], count: int, into: list[Round[K]], until: float | None = None) -> None:
    """Put `count` undisturbed rounds into a list: further rounds are taken for disturbed ones, in as much time as the first `count` took, or
    more if that is short (`PATIENCE_S`), but none after `until`.

    take: a round of this number. until: on the clock of `time.monotonic`; None for no such end.
    """
    start = time.monotonic()
    limit_s = math.inf
    with CoreProbe() as probe:
        best, before = best_known(), probe.measure()
        while len(undisturbed(into)) < count and time.monotonic() - start < limit_s:
            each = take(len(into))
            after = probe.measure()
            each.cores, each.best = (before, after) if before is not None and after is not None else (), best
            before = after
            into.append(each)
            if math.isinf(limit_s) and len(into) >= count:
                planned_s = time.monotonic() - start
                limit_s = planned_s + max(planned_s, min(PATIENCE * planned_s, PATIENCE_S))
                if until is not None:
                    limit_s = min(limit_s, until - start)
    if (found := _best(into)) is not None:
        remember(found)


def undisturbed(rounds: Sequence[Round[K]]) -> list[Round[K]]:
    """The rounds that nobody disturbed, and in which the cores were at their best."""
    best = _best(rounds)
    return [each for each in rounds if each.quiet and not _bad_moments(each, best)]


def _best(rounds: Iterable[Round[K]]) -> CoreState | None:
    return best_of(state for each in rounds for state in (*each.cores, each.best) if state is not None)


def _bad_moments(each: Round[K], best: CoreState | None) -> int:
    """How many times the cores were found below their best around a round."""
    return sum(state.is_below(best, each.threads) for state in each.cores) if best is not None else 0


def _least(values: Sequence[float], count: int) -> list[int]:
    """The indices of the `count` least, in order."""
    return sorted(sorted(range(len(values)), key=values.__getitem__)[:count])


@dataclass(frozen=True)
class Measured(Generic[K]):
    """The rounds that figures are made of: undisturbed ones if there are `LEAST`, else the least disturbed.

    quiet: which of the two. below: if it is only that the cores were not at their best, that.
    """

    rounds: Sequence[Round[K]]
    quiet: bool
    below: CoreState | None = None

    @classmethod
    def of(cls, rounds: Sequence[Round[K]], count: int) -> "Measured[K]":
        """At most `count` of `rounds`."""
        least = min(LEAST, count)
        if len(good := undisturbed(rounds)) >= least:
            return cls(good[:count], quiet=True)
        if len(quiet := [each for each in rounds if each.quiet]) >= least:
            best = _best(rounds)
            bad = [_bad_moments(each, best) for each in quiet]
            measured = cls([quiet[index] for index in _least(bad, count)], quiet=True)
            threads = max(each.threads for each in measured.rounds)
            held_back = measured.cores is not None and best is not None and measured.cores.is_below(best, threads)
            return replace(measured, quiet=False, below=best) if held_back else measured
        shares = [max(each.use(candidate).share or 0.0 for candidate in each) for each in rounds]
        return cls([rounds[index] for index in _least(shares, count)], quiet=False)

    @property
    def cores(self) -> CoreState | None:
        """What the cores were like, in the median; None if not known."""
        states = [state for each in self.rounds for state in each.cores]
        handoffs = [state.handoff_us for state in states if state.handoff_us is not None]
        if not states:
            return None
        step_ns = statistics.median(state.step_ns for state in states)
        return CoreState(step_ns=step_ns, handoff_us=statistics.median(handoffs) if handoffs else None)

    def samples_s(self, candidate: K) -> list[list[float]]:
        """The seconds of each run of a candidate, round by round."""
        return [each[candidate].samples_s for each in self.rounds]

    def use(self, candidate: K) -> Use:
        """What others did to a candidate in these rounds."""
        return together(each.use(candidate) for each in self.rounds)

    def certain(self, candidate: K) -> bool:
        """Whether the times of a candidate are at most `MOST` times too long."""
        return self.quiet and self.use(candidate).quiet

    def reason(self, *candidates: K) -> str:
        """Why the times of these candidates are uncertain, the one that was disturbed most."""
        if self.below is not None and self.cores is not None:
            return _worse(self.cores, self.below)
        return reason(self.most_disturbed(*candidates))

    def most_disturbed(self, *candidates: K) -> Use:
        """What others did to the one of these candidates that they disturbed most."""
        return max(map(self.use, candidates), key=lambda use: use.share or 0.0)

    def ratio(self, baseline: K, candidate: K) -> Ratio:
        """`timing.paired_ratio`, its interval no narrower than what others did allows."""
        ratio = paired_ratio(self.samples_s(baseline), self.samples_s(candidate))
        if self.below is not None and self.cores is not None:
            longer = max(1.0, *_times_worse(self.cores, self.below))
            ratio = Ratio(value=ratio.value, low=ratio.low / longer, high=ratio.high * longer)
        return allowed(ratio, self.use(baseline), self.use(candidate)) if candidate != baseline else ratio


def _times_worse(cores: CoreState, best: CoreState) -> tuple[float, float]:
    """How many times as slow, and as far apart."""
    known = cores.handoff_us is not None and best.handoff_us is not None
    apart = (cores.handoff_us or 1.0) / (best.handoff_us or 1.0) if known else 1.0
    return cores.step_ns / best.step_ns, apart


def _worse(cores: CoreState, best: CoreState) -> str:
    """That the cores were not at their best."""
    times = zip(_times_worse(cores, best), ("as slow", "as far apart"), strict=True)
    said = " and ".join(f"{many:.1f} times {what}" for many, what in times if many >= SAID)
    return (
        f"a hypervisor kept the cores from their best, most of the time {said}"
        if said
        else "a hypervisor kept the cores from their best"
    )


def reason(use: Use) -> str:
    """Why a time that was measured in it is uncertain."""
    waited, others = use.waited_share, use.others_cores
    if use.share is None:
        return "what other programs did cannot be measured here"
    said = []
    if others is not None and others >= SHOWN:
        whose = "a hypervisor's other guests" if 2 * (use.stolen_s or 0.0) > others * use.seconds else "other programs"
        said.append(f"{whose} used {others:.1f} of {count_of(use.cores, 'core')}")
    if waited is not None and waited > LIMIT:
        said.append(f"threads waited for a core in {waited:.0%} of the time")
    return ", ".join(said) or "other programs ran now and then"  # in too many rounds, and little in all


def fewer_threads(use: Use) -> int | None:
    """The number of threads that leaves others the cores that they used; None if there is none."""
    left = use.threads - math.ceil(round(use.others_cores or 0.0, 1))
    return left if 0 < left < use.threads else None


def unmeasured(use: Use) -> list[str]:
    """What this machine does not tell of what others do, in words."""
    missing = []
    if use.others_s is None:
        missing.append("the CPU time of other programs: /proc/stat does not count our processors")
    if use.waited_s is None:
        missing.append("the waits of threads for a processor: /proc/PID/task/*/schedstat does not count them")
    elif use.threads > use.cores:
        missing.append(f"the waits of threads for a processor: {use.threads} threads on {use.cores} also wait for each other")
    return missing
