"""The line to a device's runner: starts it, sends requests, waits for answers, notices when it is gone.

Knows how to reach a machine, not what is asked of it. One connection per device setting is kept open for
the life of this process, because importing a runtime takes seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import IO, Any

from .device import Device

#: The folder that holds the package `profiles`, of which the runner is a part.
_ROOT = Path(__file__).resolve().parent.parent
#: Importing PyTorch from a cold disk on a slow board takes a minute.
HELLO_TIMEOUT_S = 180.0


class DeviceError(RuntimeError):
    """A device could not do what was asked; the message says what and on which device."""


class DeviceLostError(DeviceError):
    """The device, or the runner on it, is gone or silent: worth another try later."""


class Connection:
    """One runner process, spoken to in turn."""

    def __init__(self, device: Device) -> None:
        if not device.is_local:
            raise DeviceError(
                f"device {device.name}: host {device.host} is remote, which is not supported yet"
            )
        self._device = device
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._errors: deque[str] = deque(maxlen=20)
        self._turn = threading.Lock()
        self._next_id = 0
        # A session of its own: Ctrl-C belongs to the program that measures, which then closes the runner in
        # order.
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "profiles.runner"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout
        assert self._process.stderr
        for target, stream in (
            (self._read_answers, self._process.stdout),
            (self._read_errors, self._process.stderr),
        ):
            threading.Thread(target=target, args=(stream,), daemon=True).start()
        self.ask(
            {"do": "hello", "runtime": device.runtime, "threads": device.threads}, timeout_s=HELLO_TIMEOUT_S
        )

    def _read_answers(self, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError):  # Closed while reading.
            for line in stream:
                self._answers.put(line)
        self._answers.put(None)

    def _read_errors(self, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError):
            for line in stream:
                self._errors.append(line.rstrip())

    def ask(self, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            DeviceLostError: no answer within `timeout_s`, or the runner ended; the connection is closed then.
            DeviceError: the runner answered that it could not do it.
        """
        name, what = self._device.name, request["do"]
        with self._turn:
            self._next_id += 1
            assert self._process.stdin
            try:
                self._process.stdin.write(json.dumps({**request, "id": self._next_id}) + "\n")
                self._process.stdin.flush()
                line = self._answers.get(timeout=timeout_s)
            except queue.Empty:
                self.close()
                raise DeviceLostError(
                    f"device {name}: no answer to {what!r} within {timeout_s:g} s"
                ) from None
            except (OSError, ValueError):
                line = None
            if line is None:
                self.close()
                said = "; it said: " + " | ".join(list(self._errors)[-3:]) if self._errors else ""
                raise DeviceLostError(
                    f"device {name}: the runner ended (status {self._process.poll()}) at {what!r}{said}"
                )
        try:
            answer: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            self.close()
            raise DeviceLostError(
                f"device {name}: the runner's answer to {what!r} is not JSON: {line[:100]!r}"
            ) from None
        if not answer["ok"]:
            raise DeviceError(f"device {name}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    @property
    def is_open(self) -> bool:
        return self._process.poll() is None

    def send_file(self, path: Path, digest: str) -> str:
        """Make a file available to the runner; returns its path there. A local runner reads it in place."""
        return str(path.resolve())

    def close(self) -> None:
        """End the runner and with it every measured process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()


_open: dict[tuple[int, str], Connection] = {}
_opening = threading.Lock()


def connect(device: Device) -> Connection:
    """The connection to a device, opened when there is none that works.

    Raises:
        DeviceError: the machine cannot be reached or lacks the runtime.
    """
    # A forked process must not share its parent's pipes, hence the process id.
    key = (os.getpid(), json.dumps([device.host, device.runtime, device.threads]))
    with _opening:
        connection = _open.get(key)
        if connection is None or not connection.is_open:
            connection = _open[key] = Connection(device)
        # Two devices of one runtime share a runner; errors carry the name of the one that asks.
        connection._device = device
        return connection


@atexit.register
def close_connections() -> None:
    """End every runner that this process started."""
    for (pid, _), connection in list(_open.items()):
        if pid == os.getpid():
            connection.close()
    _open.clear()
