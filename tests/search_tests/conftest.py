"""What the review's tests share: a small study that was searched once, MLflow's server, and a browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECRET = "hunter2-s3cret"


# -- a browser


@dataclass
class Page:
    """A tab with the frames in it. `said` holds what it wrote to the console as warnings and errors."""

    browser: Browser
    session: str
    said: list[str] = field(default_factory=list)

    def evaluate(self, expression: str, context: tuple[str, int] | None = None) -> Any:
        """The JSON value of an expression, in the page or in one of `frames`."""
        options: dict[str, Any] = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        session = self.session
        if context is not None:
            session, options["contextId"] = context
        answer = self.browser.call("Runtime.evaluate", options, session)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, expression: str, context: tuple[str, int] | None = None, within_s: float = 60) -> Any:
        """The expression's value once it is true; pages draw when they come to it."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            value = self.evaluate(expression, context)
            if value:
                return value
            self.browser.listen(0.2)
        raise AssertionError(f"never true within {within_s:.0f} s: {expression}; the console: {self.said}")

    def frames(self) -> list[tuple[str, int]]:
        """Where `evaluate` can look besides the page itself."""
        self.browser.listen(0.1)
        return [place for place in self.browser.contexts if place[0] in self.browser.children]

    def screenshot(self, path: Path) -> Path:
        size = self.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], 6000), "scale": 1}
        options = {"format": "png", "clip": clip, "captureBeyondViewport": True}
        shot = self.browser.call("Page.captureScreenshot", options, self.session)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


class Browser:
    """Headless Chromium, spoken to over the pipe of its debugging protocol."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --remote-debugging-pipe"
        )
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}"]
        # The protocol's file numbers are fixed at 3 and 4, which may be taken by the pipes themselves.
        script = (
            "import os, sys; read, write = map(os.dup, map(int, sys.argv[1:3])); "
            "os.dup2(read, 13); os.dup2(write, 14); os.dup2(13, 3); os.dup2(14, 4); "
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(read), str(write), *command],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read)
        os.close(write)
        self._buffer = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}
        self.children: set[str] = set()
        self.contexts: list[tuple[str, int]] = []

    def open(self, url: str, width: int = 1280, height: int = 900, *, is_phone: bool = False) -> Page:
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        self.children.add(session)
        self._watch(session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", size, session)
        self.call("Page.navigate", {"url": url}, session)
        return page

    def call(self, method: str, options: dict[str, Any] | None = None, session: str | None = None) -> Any:
        self._number += 1
        number = self._number
        request: dict[str, Any] = {"id": number, "method": method, "params": options or {}}
        if session:
            request["sessionId"] = session
        os.write(self._write, json.dumps(request).encode() + b"\0")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if number in self._answers:
                answer = self._answers.pop(number)
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._receive(1.0)
        raise AssertionError(f"the browser does not answer {method}")

    def listen(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._receive(left)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._read)
        os.close(self._write)

    def _watch(self, session: str) -> None:
        attach = {"autoAttach": True, "waitForDebuggerOnStart": False, "flatten": True}
        for method, options in (
            ("Page.enable", {}), ("Runtime.enable", {}), ("Log.enable", {}), ("Target.setAutoAttach", attach),
        ):  # fmt: skip
            self.call(method, options, session)

    def _receive(self, wait_s: float) -> None:
        """Take one message. Handling an event may call, so calls may be under way inside each other."""
        if b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, wait_s))
            if ready:
                self._buffer += os.read(self._read, 1 << 20)
        if b"\0" in self._buffer:
            text, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._event(message)

    def _event(self, message: dict[str, Any]) -> None:
        session, method = message.get("sessionId", ""), message.get("method")
        params = message.get("params", {})
        if method == "Target.attachedToTarget" and params["targetInfo"]["type"] == "iframe":
            child = params["sessionId"]
            self.children.add(child)
            self._pages[child] = self._pages.get(session, Page(self, child))
            self._watch(child)
        elif method == "Runtime.executionContextCreated" and params["context"]["auxData"].get("isDefault"):
            self.contexts.append((session, params["context"]["id"]))
        elif method == "Runtime.executionContextDestroyed":
            self.contexts = [c for c in self.contexts if c != (session, params["executionContextId"])]
        elif method == "Runtime.executionContextsCleared":
            self.contexts = [c for c in self.contexts if c[0] != session]
        page = self._pages.get(session)
        if page is None:
            return
        if method == "Runtime.exceptionThrown":
            page.said.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            page.said.append(str([a.get("value", a.get("description")) for a in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            page.said.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")


@pytest.fixture(scope="module")  # no tabs of other tests beside one's own
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    running = Browser(tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()


# -- a study


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def secret() -> str:
    """The password in the server's address, so that whatever leaves the tool can be searched for it."""
    return SECRET


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of MLflow's own server, with a password in it that it does not ask for."""
    from search.ui import ui_command, ui_environment

    folder, port = tmp_path_factory.mktemp("server"), free_port()
    uri = f"sqlite:///{folder}/mlflow.db"
    command = [*ui_command(uri, None, port=port), "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        # A session of its own: MLflow starts children, and all of them must go.
        process = subprocess.Popen(
            command, env={**os.environ, **ui_environment(uri)}, cwd=folder, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    else:
        pytest.fail(f"the server did not start: {(folder / 'server.log').read_text()[-2000:]}")
    yield f"http://somebody:{SECRET}@127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


@dataclass(frozen=True)
class Searched:
    """A study that has run: its file, its output folder, and the tracking server that recorded it."""

    study: Path
    home: Path
    tracking_uri: str


@pytest.fixture(scope="session")
def searched(shapes: Any, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Two devices, two trials each, one reference that is measured and one that is given."""
    import torch

    from profiles.connection import close_connections
    from search.launch import launch
    from search.progress import ConsoleProgress
    from search.studyfile import load_study_file

    folder = tmp_path_factory.mktemp("searched")
    document = {
        "name": "tiny",
        "model": str(shapes.weights),
        "data": str(shapes.data),
        "imgsz": shapes.imgsz,
        "devices": [
            {"name": "desk", "runtime": "onnxruntime", "limits": {"latency_ms": 1000.0}},
            {"name": "desk-torch", "runtime": "torch"},
        ],
        "search": {"ratio": {"low": 0.2, "high": 0.5}, "round_to": 4, "min_channels": 4},
        "calibration": {"images": 6, "batch": 4},
        "finetune": {"epochs": 1, "batch": 4, "device": "cpu", "reestimate_images": 12},
        "profile": {"model": "bilinear"},
        # Long enough to tell a sixth faster on a busy machine: a front of one point leaves no choice.
        "measure": {"limit_s": 2, "target": 0.03},
        "trials": 2,
        "references": [
            {"name": "at 32 px", "imgsz": 32, "device": "desk"},
            {"name": "a vendor's", "device": "desk", "accuracy": 0.125, "latency_ms": 0.5},
        ],
        "tracking_uri": mlflow_server,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    study = load_study_file(path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        from rich.console import Console

        with (folder / "log.txt").open("w") as log, ConsoleProgress(Console(file=log)) as progress:
            launch(study, ["desk", "desk-torch"], trials=2, timeout_s=None, progress=progress)
    finally:
        torch.set_num_threads(before)
        close_connections()
    return Searched(path, study.folder, mlflow_server)
