"""The line to a device's runner: starts it, sends requests, waits for answers, notices when it is gone.

Knows how to reach a machine, not what is asked of it. One connection per device setting is kept open for
the life of this process, because importing a runtime takes seconds.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .device import Device
from .runner.files import model_files
from .ssh import CONNECT_TIMEOUT_S, IDLE_S, bootstrap_line, explain, runner_package, ssh_command

#: The folder that holds the package `profiles`, of which the runner is a part.
_ROOT = Path(__file__).resolve().parent.parent
#: Importing PyTorch from a cold disk on a slow board takes a minute.
HELLO_TIMEOUT_S = 180.0
#: A model is sent in pieces, each of which has to arrive within this time.
FILE_TIMEOUT_S = 60.0
#: While others have the machine, the runner says six times in this span that it waits.
TAKE_TIMEOUT_S = 60.0
PIECE_BYTES = 1 << 20


class DeviceError(RuntimeError):
    """A device could not do what was asked; the message says what and on which device."""


class DeviceLostError(DeviceError):
    """The device, or the runner on it, is gone or silent: worth another try later."""


class Connection:
    """One runner process, here or at the other end of `ssh`, spoken to in turn."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._errors: deque[str] = deque(maxlen=20)
        self._turn = threading.Lock()
        self._next_id = 0
        self._holding = threading.RLock()
        self._held = 0
        command = [sys.executable, "-u", "-m", "profiles.runner"]
        if device.host:
            command = ssh_command(device.host)
        # A session of its own: Ctrl-C belongs to the program that measures, which then closes the runner in
        # order.
        try:
            self._process = subprocess.Popen(
                command,
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError:
            raise DeviceError(
                f"device {device.name}: {command[0]} is not installed here; install an SSH client"
            ) from None
        assert self._process.stdout
        assert self._process.stderr
        self._readers = [
            threading.Thread(target=target, args=(stream,), daemon=True)
            for target, stream in (
                (self._read_answers, self._process.stdout),
                (self._read_errors, self._process.stderr),
            )
        ]
        for reader in self._readers:
            reader.start()
        try:
            if device.host:
                self._bootstrap(device.host)
            self.ask(
                {"do": "hello", "runtime": device.runtime, "threads": device.threads},
                timeout_s=HELLO_TIMEOUT_S,
            )
        except BaseException:
            self.close()
            raise

    def _read_answers(self, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError):  # Closed while reading.
            for line in stream:
                self._answers.put(line)
        self._answers.put(None)

    def _read_errors(self, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError):
            for line in stream:
                self._errors.append(line.rstrip())

    def _send(self, line: str) -> None:
        assert self._process.stdin
        # A process that is gone shows in what it does not answer.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _receive(self, what: str, timeout_s: float) -> str | None:
        """One line, or None when the process has ended."""
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise DeviceLostError(
                f"device {self._device.name}: no answer to {what!r} within {timeout_s:g} s"
            ) from None

    def _ended(self) -> int | None:
        """Close after the process ended by itself; its exit status, with everything that it said read."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        status = self._process.poll()
        self._readers[1].join(timeout=2)
        self.close()
        return status

    def _bootstrap(self, host: str) -> None:
        """Log in, send the runner where it is not there yet, and start it."""
        name = self._device.name
        digest, package = runner_package()
        self._send(bootstrap_line())
        self._send(json.dumps({"digest": digest, "idle_s": IDLE_S}))
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            line = self._receive("connect", max(0.0, deadline - time.monotonic()))
            if line is None:
                again, why = explain(host, self._ended(), list(self._errors))
                raise (DeviceLostError if again else DeviceError)(f"device {name}: {why}")
            try:
                answer = json.loads(line)
                said = answer["runner"]
            except (ValueError, TypeError, KeyError):
                continue  # Login scripts may greet.
            if said == "wanted":
                self._send(package)
            elif said == "here":
                return
            else:
                raise DeviceError(f"device {name}: {host} cannot start the runner: {answer.get('why')}")

    def ask(self, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            DeviceLostError: no answer within `timeout_s`, or the runner ended; the connection is closed then.
            DeviceError: the runner answered that it could not do it.
        """
        what = request["do"]
        with self._turn:
            self._next_id += 1
            self._send(json.dumps({**request, "id": self._next_id}))
            while (answer := self._answer(what, timeout_s)).get("waiting"):
                pass  # It lives, however long others have the machine.
        if not answer["ok"]:
            raise DeviceError(f"device {self._device.name}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _answer(self, what: str, timeout_s: float) -> dict[str, Any]:
        name, line = self._device.name, self._receive(what, timeout_s)
        if line is None:
            status = self._ended()
            said = "; it said: " + " | ".join(list(self._errors)[-3:]) if self._errors else ""
            if self._device.host:
                raise DeviceLostError(
                    f"device {name}: lost {self._device.host} at {what!r} (ssh status {status}){said}"
                )
            raise DeviceLostError(f"device {name}: the runner ended (status {status}) at {what!r}{said}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            self.close()
            raise DeviceLostError(
                f"device {name}: the runner's answer to {what!r} is not JSON: {line[:100]!r}"
            ) from None
        return answer

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have a remote device to oneself: nobody of ours works or measures there meanwhile.

        Reentrant; threads take turns.

        Raises: as `ask`.
        """
        with self._holding:
            if self._held == 0:
                self.ask({"do": "take", "announce_s": TAKE_TIMEOUT_S / 6}, timeout_s=TAKE_TIMEOUT_S)
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1
                if self._held == 0 and self.is_open:
                    with contextlib.suppress(DeviceError):  # A runner that is gone holds nothing.
                        self.ask({"do": "free"}, timeout_s=TAKE_TIMEOUT_S)

    @property
    def is_open(self) -> bool:
        return self._process.poll() is None

    def send_file(self, path: Path, digest: str) -> str:
        """Make a model's files available to the runner; returns the path of the first one there.

        A local runner reads them in place. A remote one keeps them by digest, so that each is sent once.

        Raises: as `ask`.
        """
        if self._device.is_local:
            return str(path.resolve())
        model = {"digest": digest, "name": path.name}
        there = self.ask({"do": "find", **model}, timeout_s=FILE_TIMEOUT_S)["path"]
        if there is None:
            for file in model_files(path):
                self._send_pieces(file, digest)
            there = self.ask({"do": "keep", **model}, timeout_s=FILE_TIMEOUT_S)["path"]
        return str(there)

    def _send_pieces(self, path: Path, digest: str) -> None:
        with path.open("rb") as file:
            while True:
                offset = file.tell()
                piece = file.read(PIECE_BYTES)
                if not piece and offset:
                    return
                data = base64.b64encode(piece).decode()
                request = {"do": "store", "digest": digest, "name": path.name, "offset": offset, "data": data}
                self.ask(request, timeout_s=FILE_TIMEOUT_S)
                if not piece:
                    return

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
        DeviceLostError: the machine cannot be reached.
        DeviceError: it refuses, or lacks the runtime.
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
