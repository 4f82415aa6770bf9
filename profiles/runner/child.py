"""A measured process: a fork of the runner that opens one model, and the runner's handle on it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import IO, Any

from .sessions import Session, open_session

CAN_FORK = (
    hasattr(os, "fork") and sys.platform != "darwin"
)  # Accelerate and Objective-C do not survive a fork.
CAN_STOP = hasattr(signal, "SIGSTOP") and CAN_FORK


class ChildCrashError(RuntimeError):
    """A measured process ended, hung or could not be reached."""


def serve_child(requests: IO[str], answers: IO[str]) -> None:
    """Loop of a measured process: `load`, `block`, `profile`, until its input ends."""
    session: Session | None = None
    for line in requests:
        request = json.loads(line)
        try:
            result: Any
            if request["do"] == "load":
                session, result = _load(request["spec"])
            elif session is None:
                raise RuntimeError("no model is loaded yet")
            elif request["do"] == "block":
                result = _block(session, request["runs"], request["settle"])
            else:
                result = session.profile(request["repeats"], request["warmup"])
            answer = {"result": result}
        except (
            Exception
        ) as error:  # Whatever the runtime raises becomes the answer; the process stays usable.
            answer = {"error": describe_error(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(spec: dict[str, Any]) -> tuple[Session, dict[str, Any]]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec["cpus"])
    session = open_session(spec)
    session.prepare()
    # At least `warmup` runs, then on until a quarter of a second has passed: clocks and caches need time,
    # not counts.
    start, runs = time.perf_counter(), 0
    while runs < spec["warmup"] or (time.perf_counter() - start < 0.25 and runs < 500):
        session.once()
        runs += 1
    return session, {"warmup": runs, "typical_ms": sorted(_block(session, 3, 0))[1]}


def _block(session: Session, runs: int, settle: int) -> list[float]:
    for _ in range(settle):
        session.once()
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        session.once()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def describe_error(error: Exception) -> str:
    """One line; the kind of error only where it says more than that something failed."""
    return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"


class Child:
    """Handle of a measured process, in the runner.

    Raises (every method that waits):
        ChildCrashError: it ended or did not answer in time.
        RuntimeError: it answered with an error.
    """

    def __init__(self, close_fds: list[int]) -> None:
        self._paused = False
        self._process: subprocess.Popen[str] | None = None
        if not CAN_FORK:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", __package__, "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._process.stdin
            assert self._process.stdout
            self.pid, self._tx, self._rx = self._process.pid, self._process.stdin, self._process.stdout
            return
        in_read, in_write = os.pipe()
        out_read, out_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _die_with_parent()
                for fd in (in_write, out_read, *close_fds):
                    os.close(fd)
                serve_child(os.fdopen(in_read, "r"), os.fdopen(out_write, "w"))
                status = 0
            finally:
                os._exit(status)
        os.close(in_read)
        os.close(out_write)
        self._tx, self._rx = os.fdopen(in_write, "w"), os.fdopen(out_read, "r")

    @property
    def fds(self) -> list[int]:
        return [self._tx.fileno(), self._rx.fileno()]

    def ask(self, request: dict[str, Any], timeout_s: float) -> Any:
        try:
            self._tx.write(json.dumps(request) + "\n")
            self._tx.flush()
        except BrokenPipeError:
            raise ChildCrashError(self._how_it_ended()) from None
        if CAN_FORK and not select.select([self._rx], [], [], timeout_s)[0]:
            raise ChildCrashError(
                f"the measured process gave no answer to {request['do']!r} within {timeout_s:g} s"
            )
        line = self._rx.readline()
        if not line:
            raise ChildCrashError(self._how_it_ended())
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _how_it_ended(self) -> str:
        if self._process:
            return f"the measured process ended with exit status {self._process.wait()}"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return _ending(status)

    def pause(self) -> None:
        """Stop it, so that nothing of it spins while the other one is measured."""
        if CAN_STOP and not self._paused:
            os.kill(self.pid, signal.SIGSTOP)
            _, status = os.waitpid(self.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):  # it died between its answer and this
                self.pid = 0
                raise ChildCrashError(_ending(status))
            self._paused = True

    def resume(self) -> None:
        if self._paused:
            os.kill(self.pid, signal.SIGCONT)
            self._paused = False

    def close(self) -> None:
        for stream in (self._tx, self._rx):
            with contextlib.suppress(OSError):
                stream.close()
        if self._process:
            self._process.kill()
            self._process.wait()
        elif self.pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            self.pid = 0


def _ending(status: int) -> str:
    """How a measured process ended, in words."""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the measured process was killed by {name}{hint}"
    return f"the measured process ended with exit status {os.WEXITSTATUS(status)}"


def _die_with_parent() -> None:
    # A stopped process would not notice that its pipe closed, so the kernel has to end it with the runner.
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
