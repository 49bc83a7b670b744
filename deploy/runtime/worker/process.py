"""The parent's side of a worker process: it starts the process, sends requests, and reports how it ended."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from deploy import errors
from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError, DeployError, WorkerDiedError
from deploy.host.cpu import usable_cores
from deploy.runtime.session import SessionOptions

_CHILD = "import sys; sys.path[:] = sys.argv[3:]; from {module} import main; main(int(sys.argv[1]), sys.argv[2])"
_TAIL_LINES = 5
_POLL_MS = 1000


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A worker that is ready to measure: seconds of one run and of the first run, number of inputs, bytes of all inputs."""

    run_s: float
    first_s: float
    inputs: int
    input_bytes: int


class WorkerProcess:
    """One artifact on one backend in a separate process, which blocks on its pipe between requests.

    Requests raise the errors of the session in the worker, and WorkerDiedError if the process has died.
    """

    program: ClassVar[str] = "deploy.runtime.worker.child"
    """The module whose `main` runs in the process."""

    def __init__(self, artifact: Artifact, backend: str, options: SessionOptions) -> None:
        self.label = f"{artifact.shown} on {backend}"
        self.threads = 1 if options.device.startswith("cuda") else options.threads or usable_cores()
        """The threads that its runs need at a time."""
        self._backend, self._options = backend, options
        opened = self._request(artifact)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close; a pipe could fill up and block)
        # The child gets our sys.path, so that it imports the same modules from any folder.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(module=self.program), str(os.getpid()), json.dumps(opened), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # so that close also ends processes that its libraries have forked
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def _request(self, artifact: Artifact) -> dict[str, Any]:
        return {"artifact": artifact.shown, "backend": self._backend, "options": asdict(self._options)}

    def reopen(self, artifact: Artifact) -> None:
        """Close the session and open another artifact, with the same backend and options: `wait_open`, then `prepare`, come next."""
        self.label = f"{artifact.shown} on {self._backend}"
        self._send({"do": "open", **self._request(artifact)})

    def wait_open(self) -> float:
        """Wait until the session is open; the seconds that it took. Several workers can start side by side."""
        return float(self._receive()["load_s"])

    def prepare(self, dims: Mapping[str, int], outputs: Path | None = None) -> Prepared:
        """Make random feeds, `dims` being the sizes of the symbolic dimensions, and warm up until the time of a run settles.

        The outputs on the first feed are saved to the .npz file `outputs`.
        """
        return self._prepare({"dims": dict(dims), "outputs": outputs and str(outputs)})

    def ask_prepare(self, dims: Mapping[str, int], settle_s: float) -> None:
        """As `prepare`, but warm up for no longer than `settle_s`, and do not wait: `wait_prepared` comes next. Several workers can so prepare side by side."""
        self._send({"do": "prepare", "dims": dict(dims), "outputs": None, "settle_s": settle_s})

    def wait_prepared(self) -> Prepared:
        return Prepared(**self._receive())

    def _prepare(self, asked: Mapping[str, Any]) -> Prepared:
        self._send({"do": "prepare", **asked})
        return self.wait_prepared()

    def memory(self) -> tuple[int, int | None]:
        """The peak bytes of host memory, and the bytes of GPU memory, None if there is none."""
        self._send({"do": "memory"})
        reply = self._receive()
        return reply["peak_bytes"], reply["gpu_peak_bytes"]

    def round(self, seconds: float, most: int, warm_up: bool | None = None) -> list[float]:
        """Run for `seconds`; the seconds of each run. At least one run is made, and `most` at most.

        warm_up: whether a tenth as long is run before; None: where more than one run fits into the time.
        """
        self._send({"do": "round", "seconds": seconds, "most": most, "warm_up": warm_up})
        return [float(value) for value in self._receive()["samples_s"]]

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None

    def _receive(self) -> dict[str, Any]:
        line = self._read_line()
        if not line.endswith(b"\n"):
            raise self._died()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = getattr(errors, reply["error"], BackendError)
            assert issubclass(kind, DeployError)
            raise kind(reply["message"])
        return reply

    def _read_line(self) -> bytes:
        """A whole line, or its beginning if the process has ended."""
        assert self._process.stdout is not None
        reader = self._process.stdout.fileno()
        poller = select.poll()
        poller.register(reader, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if poller.poll(_POLL_MS):
                part = os.read(reader, 1 << 16)
                if not part:
                    break
                line += part
            elif self._process.poll() is not None:
                break  # a process that it forked holds the pipe open as long as it lives
        return line

    def _died(self) -> WorkerDiedError:
        status = self._process.wait()
        self._stderr.seek(0)
        lines = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        cause = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        if status == -9:
            cause += " (out of memory?)"
        last = "; ".join(lines[-_TAIL_LINES:]) or "nothing on standard error"
        return WorkerDiedError(f"the process of {self.label} died ({cause}); its last lines: {last}")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # a request that the dead process never read
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
