"""The simulated GPU: CUDA's calls with CUDA's rules. The fronts turn it into torch.cuda, cuda-python, pycuda and TensorRT."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

from tests.simulator.captures import Capture, Entry
from tests.simulator.errors import CudaError, RuleError
from tests.simulator.guards import guards
from tests.simulator.memory import Access, Allocation, Space, site
from tests.simulator.work import LEGACY, LEGACY_HANDLE, PER_THREAD, Action, Clock, Event, Here, Stream, Work, join

P = ParamSpec("P")
R = TypeVar("R")


def api(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A call of the program's: one at a time, counted; it may be made to fail, and fails if the GPU is broken."""

    @functools.wraps(function)
    def call(owner: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        machine: Machine = getattr(owner, "machine", owner)
        with machine.inside(function.__name__):
            return function(owner, *args, **kwargs)

    return call


def _each(runs: list[Callable[[], None]]) -> None:
    for run in runs:
        run()


class Machine:
    """GPUs that know the rules. total: bytes of memory of each.

    violations: all rules broken so far. waits: how often the host waited for the GPU. calls: how often each was called. hooks: called before a call of that name, and not under
    the lock, so that other threads can go on meanwhile.
    """

    def __init__(self, *, devices: int = 2, total: int = 1 << 26) -> None:
        self.lock = threading.RLock()
        self.devices = devices
        self.space = Space(total)
        self.host: Clock = {}
        self.here = Here()
        self.captures: list[Capture] = []
        self.violations: list[RuleError] = []
        self.calls: Counter[str] = Counter()
        self.sticky: str | None = None
        self.hooks: dict[str, Callable[[], None]] = {}
        self.failures: dict[str, list[str | None]] = {}
        self.dropped: deque[Callable[[], None]] = deque()
        self._handles = 0x5580_0000_0000
        self.legacy = [Stream(LEGACY, device, True, f"the default stream of cuda:{device}") for device in range(devices)]
        self.streams: dict[int, Stream] = {}
        self.others: list[Stream] = []  # per-thread default streams
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, object] = {}
        self.waits = 0
        self._reached = 0
        self._depth = 0

    # Of every call.

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """A call of the program's, or a part of one."""
        if (hook := self.hooks.get(name)) is not None:
            hook()
        with self.lock:
            self._depth += 1
            try:
                self._begin(name)
                yield
            except RuleError as error:
                self.blame(error)
                raise
            finally:
                self._depth -= 1

    def _begin(self, name: str) -> None:
        if self._depth == 1:
            self.settle()
            self.calls[name] += 1
        planned = self.failures.get(name)
        if planned and (error := planned.pop(0)) is not None:
            raise CudaError(error)
        self._check_sticky()

    def _check_sticky(self) -> None:
        if self.sticky is not None:
            raise CudaError(self.sticky)

    def settle(self) -> None:
        """Let what the program has dropped be freed."""
        while self.dropped:
            self.dropped.popleft()()

    def fail(self, call: str, error: str, *, after: int = 0) -> None:
        """Let a later call of a method of this name fail once, after that many that do not."""
        self.failures[call] = [None] * after + [error]

    def blame(self, error: RuleError) -> None:
        """Keep an error, whoever may catch it."""
        if error not in self.violations:
            self.violations.append(error)

    def handle(self) -> int:
        self._handles += 64
        return self._handles

    # Streams.

    @api
    def stream_create(self, *, blocking: bool, device: int | None = None) -> Stream:
        device = self.here.device if device is None else device
        handle = self.handle()
        stream = Stream(handle, device, blocking, f"stream {handle:#x}")
        self.streams[handle] = stream
        return stream

    @api
    def stream_destroy(self, stream: Stream) -> None:
        """The work on it goes on; only the handle is gone."""
        if stream.capture is not None:
            raise RuleError(f"{stream.name} is destroyed while it is captured")
        stream.destroyed = True
        self.streams.pop(stream.handle, None)
        self.others.append(stream)

    def stream(self, handle: int) -> Stream:
        """The stream that a handle means to the calling thread."""
        device = self.here.device
        if handle in (LEGACY, LEGACY_HANDLE):
            return self.legacy[device]
        if handle == PER_THREAD:
            if device not in self.here.per_thread:
                name = f"the default stream of thread {threading.current_thread().name} on cuda:{device}"
                self.here.per_thread[device] = Stream(PER_THREAD, device, True, name)
                self.others.append(self.here.per_thread[device])
            return self.here.per_thread[device]
        if handle not in self.streams:
            raise RuleError(f"there is no stream {handle:#x}: it was destroyed, or never made")
        return self.streams[handle]

    def everything(self) -> list[Stream]:
        """All streams, destroyed ones too: their work goes on."""
        return [*self.legacy, *self.streams.values(), *self.others]

    def _all(self, device: int) -> list[Stream]:
        return [stream for stream in self.everything() if stream.device == device]

    @api
    def stream_synchronize(self, stream: Stream) -> None:
        if stream.capture is None:
            self.unsafe("another stream was synchronized")
        self.synchronize(stream)

    def synchronize(self, stream: Stream) -> None:
        """Let the host wait for a stream."""
        self.refuse_implicit(stream)
        if stream.capture is not None:
            stream.capture.invalidate(f"{stream.name} was synchronized")
            raise CudaError("cudaErrorStreamCaptureUnsupported")
        self.waits += 1
        if stream.last is not None:
            stream.last.finish()
        self._check_sticky()
        join(self.host, stream.clock)

    @api
    def stream_query(self, stream: Stream) -> bool:
        self.refuse_implicit(stream)
        if stream.capture is not None:
            stream.capture.invalidate(f"{stream.name} was queried")
            raise CudaError("cudaErrorStreamCaptureUnsupported")
        self.unsafe("another stream was queried")
        return self._reach(stream.last, stream.clock)

    def _reach(self, work: Work | None, clock: Clock) -> bool:
        """Whether it is done, which the host then knows; if it is not, it is before the next question."""
        if work is not None:
            over = work.reached()
            work.finish()
            if not over:
                return False
        join(self.host, clock)
        return True

    @api
    def device_synchronize(self) -> None:
        self.synchronize_device(self.here.device)

    def synchronize_device(self, device: int) -> None:
        if captures := [capture for capture in self.captures if capture.origin.device == device]:
            for capture in captures:
                capture.invalidate("the device was synchronized")
            raise CudaError("cudaErrorStreamCaptureUnsupported")
        self.waits += 1
        for stream in self._all(device):
            if stream.last is not None:
                stream.last.finish()
            self._check_sticky()
            join(self.host, stream.clock)

    # Work.

    @api
    def launch(self, stream: Stream, action: Action) -> None:
        """Put work on a stream, or into the graph that it captures."""
        self.put(stream, action)

    def put(self, stream: Stream, action: Action) -> None:
        self.check_alive(stream)
        if action.kernel and stream.device != self.here.device:
            raise RuleError(
                f"{action.label} on {stream.name} of cuda:{stream.device} while the thread is on cuda:{self.here.device}"
            )
        self.refuse_implicit(stream)
        if stream.capture is not None:
            stream.capture.add(stream, action, self._owners(stream, action))
            return
        self.enqueue(stream, [(action, None)])

    def check_alive(self, stream: Stream) -> None:
        if stream.destroyed:
            raise RuleError(f"{stream.name} was destroyed and is used")

    def _owners(self, stream: Stream, action: Action) -> tuple[Allocation, ...]:
        label = f"{action.label} on {stream.name} ({site()})"
        owners = tuple(self.space.find(use.address, use.nbytes, label) for use in action.uses)
        for owner in owners:
            if owner.device not in (None, stream.device):
                raise RuleError(f"{label} uses memory of cuda:{owner.device}: {owner.label}")
        return owners

    def enqueue(self, stream: Stream, entries: Iterable[Entry], *, after: Work | None = None, clock: Clock | None = None) -> Work:
        """Put actions on a stream as one piece of work; with each, the owners that its memory must have, None for any."""
        before = self.order(stream)
        if after is not None:
            before.append(after)
        known = dict(stream.clock)
        join(known, clock or {})
        tick = known[stream.name] = known.get(stream.name, 0) + 1
        checked = []
        for action, expected in entries:
            if action.check is not None:
                action.check()
            owners = self._owners(stream, action)
            label = f"{action.label} on {stream.name} ({site()})"
            for index, use in enumerate(action.uses):
                owner = owners[index]
                if expected is not None and expected[index] is not owner:
                    raise RuleError(f"{label} replays {use.address:#x} of {expected[index].label}, which was freed")
                start = use.address - owner.address
                owner.segment.check(start, start + use.nbytes, use.write, known, label)
            checked.append((action, owners, label))
        stream.clock = known
        work = Work(before, None, mark=False)
        runs: list[Callable[[], None]] = []
        for action, owners, label in checked:
            runs += guards(self, action, owners, label)
            for use, owner in zip(action.uses, owners, strict=True):
                start = use.address - owner.address
                owner.segment.add(Access(stream.name, tick, start, start + use.nbytes, use.write, label, work))
            if action.run is not None:
                runs.append(action.run)
        work.run = functools.partial(_each, runs)
        stream.last = work
        return work

    def order(self, stream: Stream) -> list[Work]:
        """What a new piece of work on a stream comes after, which its clock knows then."""
        join(stream.clock, self.host)
        before = [stream.last]
        if stream.legacy:
            others = [other for other in self._all(stream.device) if other.blocking and other is not stream]
        else:
            others = [self.legacy[stream.device]] if stream.blocking else []
        for other in others:
            join(stream.clock, other.clock)
            before.append(other.last)
        return [work for work in before if work is not None]

    def refuse_implicit(self, stream: Stream) -> None:
        """No use of the legacy stream while a stream that waits for it is captured (cudaErrorStreamCaptureImplicit)."""
        if not stream.legacy:
            return
        hit = [capture for capture in self.captures if any(s.blocking and s.device == stream.device for s in capture.streams)]
        for capture in hit:
            capture.invalidate("the legacy default stream was used")
        if hit:
            raise CudaError("cudaErrorStreamCaptureImplicit")

    # Events.

    @api
    def event_create(self, *, timed: bool) -> Event:
        event = Event(self.handle(), timed, self.here.device)
        self.events[event.handle] = event
        return event

    @api
    def event_destroy(self, event: Event) -> None:
        del self.events[event.handle]

    @api
    def event_record(self, event: Event, stream: Stream) -> None:
        self.check_alive(stream)
        self.refuse_implicit(stream)
        if event.device != stream.device:
            raise CudaError("cudaErrorInvalidResourceHandle")
        event.captured = stream.capture
        if stream.capture is not None:
            event.clock, event.work = dict(stream.capture.clocks[stream.name]), None
            return

        def reached() -> None:
            self._reached += 1
            event.number = self._reached

        event.work = stream.last = Work(self.order(stream), reached)
        event.clock = dict(stream.clock)

    @api
    def stream_wait_event(self, stream: Stream, event: Event) -> None:
        self.check_alive(stream)
        self.refuse_implicit(stream)
        if event.captured is not None:
            event.captured.let_wait(stream, event)
        elif event.work is None:
            return  # never recorded
        elif stream.capture is not None:
            stream.capture.invalidate(f"{stream.name} waits for an event outside the capture")
            raise CudaError("cudaErrorStreamCaptureIsolation")
        else:
            before = self.order(stream)
            join(stream.clock, event.clock)
            stream.last = Work([*before, event.work], None)

    @api
    def event_synchronize(self, event: Event) -> None:
        self._refuse_captured(event)
        self.unsafe("an event was waited for")
        self.waits += 1
        if event.work is not None:
            event.work.finish()
        join(self.host, event.clock)

    @api
    def event_query(self, event: Event) -> bool:
        self._refuse_captured(event)
        self.unsafe("an event was queried")
        return self._reach(event.work, event.clock)

    def _refuse_captured(self, event: Event) -> None:
        if event.captured is not None:
            event.captured.invalidate("an event of the capture was waited for or queried")
            raise CudaError("cudaErrorCapturedEvent")

    @api
    def event_elapsed(self, start: Event, end: Event) -> float:
        """Milliseconds, of no meaning but their order."""
        if not (start.timed and end.timed) or start.work is None or end.work is None:
            raise CudaError("cudaErrorInvalidResourceHandle")
        if not (start.work.done and end.work.done):
            raise CudaError("cudaErrorNotReady")
        assert start.number is not None
        assert end.number is not None
        return (end.number - start.number) * 0.25

    # What captures forbid.

    def unsafe(self, what: str) -> None:
        """Refuse a call that is unsafe during captures, by the mode of the thread and of the captures.

        cudaThreadExchangeStreamCaptureMode: own captures that are not relaxed and, in the mode global, other threads' global ones.
        """
        if self.here.capture_mode == "relaxed":
            return
        mine = threading.get_ident()
        hit = [capture for capture in self.captures if capture.thread == mine and capture.mode != "relaxed"]
        if self.here.capture_mode == "global":
            hit += [capture for capture in self.captures if capture.thread != mine and capture.mode == "global"]
        for capture in hit:
            capture.invalidate(what)
        if hit:
            raise CudaError("cudaErrorStreamCaptureUnsupported")
