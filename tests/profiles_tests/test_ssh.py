"""Remote devices, against a real SSH server on this machine that is started for the test."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from profiles import connection, ssh
from profiles.artifact import Artifact
from profiles.connection import DeviceError, DeviceLostError, close_connections, connect
from profiles.device import Device, describe
from profiles.latency_profile import OTHER
from profiles.lock import host_lock
from profiles.measure import compare, measure, profile_layers

Export = Callable[[Device, int], Artifact]


@pytest.fixture(scope="module")
def server(ssh_server: Any) -> Iterator[Any]:
    yield ssh_server
    close_connections()


@pytest.fixture(autouse=True)
def _options(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.use(monkeypatch)


def test_a_remote_device_is_described_measured_and_profiled(server: Any, export: Export) -> None:
    far, near = server.device(), Device("near", "onnxruntime", threads=1)
    assert describe(far).fingerprint == describe(near).fingerprint
    assert (server.cache / f"runner-{ssh.runner_package()[0][:16]}.zip").is_file()
    artifact = export(near, 16)
    result = compare(far, export(near, 64), artifact, target=0.2, limit_s=4)
    assert result.verdict == "slower"
    entries = profile_layers(far, artifact, repeats=5, warmup=1)
    assert [e.layer for e in entries if e.op != OTHER] == [spec.layer for spec in artifact.layers]


@pytest.mark.parametrize("runtime", ["openvino", "ncnn"])
def test_a_model_of_two_files_is_sent_whole_and_only_once(
    runtime: str, server: Any, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PIECE_BYTES", 1000)
    device = server.device(runtime=runtime)
    artifact = export(Device("near", runtime), 16)
    assert measure(device, artifact, rounds=1).p50_ms > 0
    kept = server.cache / "models" / artifact.digest
    assert {f.name: f.read_bytes() for f in kept.iterdir()} == {
        f.name: f.read_bytes() for f in artifact.files
    }
    monkeypatch.setattr(connection, "PIECE_BYTES", None)  # Nothing more may be sent.
    monkeypatch.setattr(connection.Connection, "_send_pieces", None)
    assert measure(device, artifact, rounds=1).p50_ms > 0


def test_a_model_that_arrives_changed_is_refused(server: Any, export: Export) -> None:
    device = server.device()
    wrong = replace(export(Device("near", "onnxruntime"), 16), digest="0" * 64)
    with pytest.raises(DeviceError, match="the model arrived with sha256"):
        measure(device, wrong)
    assert not list((server.cache / "models").glob("0" * 64 + "*"))
    assert describe(device).stable["runtime"] == "onnxruntime"


def test_a_line_cut_in_the_middle_of_a_comparison_is_said_and_the_next_one_works(
    server: Any, export: Export
) -> None:
    device, artifact = server.device(), export(Device("near", "onnxruntime"), 16)
    pid = connect(device).ask({"do": "hello", "runtime": "onnxruntime", "threads": 1}, timeout_s=60)["pid"]
    runner, measured = psutil.Process(pid), list[psutil.Process]()
    rounds: list[str] = []

    def cut_while_measuring() -> None:
        while not (rounds and measured):
            measured[:] = runner.children()
            time.sleep(0.01)
        server.cut()

    cutter = threading.Thread(target=cut_while_measuring, daemon=True)
    cutter.start()
    with pytest.raises(
        DeviceLostError, match=r"device far: lost ssh://127.0.0.1:\d+ at 'round' \(ssh status"
    ):
        compare(device, artifact, artifact, target=1e-6, limit_s=60, progress=rounds.append)
    cutter.join(timeout=30)
    assert rounds
    # Nothing stays behind on the device.
    _, alive = psutil.wait_procs([runner, *measured], timeout=60)
    assert not alive
    assert measure(device, artifact, rounds=1).p50_ms > 0


def test_work_over_there_and_a_measurement_wait_for_each_other(
    server: Any, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is this machine, so the work is this process's own; the wait outlasts the time-out."""
    monkeypatch.setattr(connection, "TAKE_TIMEOUT_S", 6.0)
    device, artifact = server.device(), export(Device("near", "onnxruntime"), 16)
    connect(device)
    happened: list[str] = []

    def measured() -> None:
        measure(device, artifact, rounds=1)
        happened.append("measured")

    measuring = threading.Thread(target=measured)
    with host_lock("training"):
        measuring.start()
        time.sleep(8)
        happened.append("worked")
    measuring.join(timeout=60)
    with connect(device).alone():
        worker = threading.Thread(target=lambda: _work(happened))
        worker.start()
        time.sleep(0.5)
        happened.append("alone")
    worker.join(timeout=60)
    assert happened == ["worked", "measured", "alone", "worked on"]


def _work(happened: list[str]) -> None:
    with host_lock("training"):
        happened.append("worked on")


def test_a_runner_that_is_asked_nothing_ends_by_itself(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 1)
    link = connection.Connection(server.device())
    link._process.wait(timeout=60)
    with pytest.raises(DeviceLostError, match="lost ssh"):
        link.ask({"do": "facts", **server.device().to_json()}, timeout_s=10)


def test_an_unknown_host_key_is_refused(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = server.folder / "no_hosts"
    server.use(monkeypatch, hosts=nobody)
    with pytest.raises(DeviceError, match=r"host key .* is not the one in known_hosts") as caught:
        describe(server.device(threads=2))
    assert not isinstance(caught.value, DeviceLostError)  # Another try would not help.
    other = server.make_key("other_host_key").with_suffix(".pub").read_text()
    nobody.write_text(f"[127.0.0.1]:{server.port} {other}")
    with pytest.raises(DeviceError, match=r"host key .* is not the one in known_hosts"):
        describe(server.device(threads=2))
    assert nobody.read_text().count("\n") == 1


def test_a_refused_login_says_how_to_try_it(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.use(monkeypatch, key=server.make_key("stranger"))
    with pytest.raises(DeviceError, match=r"refused the login .* without a question: ssh .*127\.0\.0\.1"):
        describe(server.device(threads=2))


def test_a_machine_without_python_is_said(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOPRUNE_SSH_PYTHON", "no-such-python3")
    with pytest.raises(DeviceError, match=r"cannot start python3 .*install Python 3.9 or later"):
        describe(server.device(threads=2))


def test_a_machine_that_is_away_is_lost(server: Any) -> None:
    with pytest.raises(DeviceLostError, match=r"no connection to ssh://127.0.0.1:\d+ .*refused"):
        describe(server.device(host=f"ssh://127.0.0.1:{server.free_port()}"))


def test_a_machine_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        device = Device("far", "onnxruntime", host=f"ssh://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DeviceLostError, match="no answer to 'connect' within"):
            describe(device)


def test_options_of_the_user_come_first_and_the_name_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARETOPRUNE_SSH_PYTHON", raising=False)
    monkeypatch.setenv("PARETOPRUNE_SSH_OPTIONS", "-i 'a key' -o ConnectTimeout=3")
    command = ssh.ssh_command("ssh://pi@Pi5:2222")
    assert command[:6] == ["ssh", "-T", "-i", "a key", "-o", "ConnectTimeout=3"]
    assert command.index("ConnectTimeout=3") < command.index("ConnectTimeout=10")
    assert "StrictHostKeyChecking=yes" in command
    assert command[-1].startswith("exec python3 -u -c ")
    assert command[-5:-1] == ["-p", "2222", "--", "pi@Pi5"]
