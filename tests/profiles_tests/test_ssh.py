"""Remote devices, against a real SSH server on this machine that is started for the test."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from profiles import connection, ssh
from profiles.artifact import Artifact
from profiles.connection import DeviceError, DeviceLostError, close_connections, connect
from profiles.device import Device, describe
from profiles.latency_profile import OTHER
from profiles.measure import compare, measure, profile_layers

Export = Callable[[Device, int], Artifact]
SSHD = "/usr/sbin/sshd"


@dataclass(frozen=True)
class Server:
    """A running sshd; `sessions` are the processes that serve logins."""

    port: int
    process: subprocess.Popen[bytes]
    folder: Path

    def device(self, **keys: Any) -> Device:
        settings = {"name": "far", "runtime": "onnxruntime", "threads": 1}
        return Device(**{**settings, "host": f"ssh://127.0.0.1:{self.port}", **keys})

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "paretoprune"

    def cut(self) -> None:
        """End every login at once, as a dead line does."""
        for session in psutil.Process(self.process.pid).children(recursive=False):
            session.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (Path(SSHD).is_file() and shutil.which("ssh") and shutil.which("ssh-keygen")):
        pytest.skip("no SSH server or client here; install openssh-server")
    if os.getuid() == 0:  # Only root's sshd asks for it.
        Path("/run/sshd").mkdir(exist_ok=True)
    folder = tmp_path_factory.mktemp("sshd")
    host_key, user_key, port = make_key(folder / "host_key"), make_key(folder / "user_key"), free_port()
    (folder / "authorized_keys").write_bytes(user_key.with_suffix(".pub").read_bytes())
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key.with_suffix('.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f"""
        Port {port}
        ListenAddress 127.0.0.1
        HostKey {host_key}
        AuthorizedKeysFile {folder}/authorized_keys
        PidFile none
        StrictModes no
        UsePAM no
        PermitRootLogin yes
        PasswordAuthentication no
        SetEnv XDG_CACHE_HOME={folder}/cache
        """
    )
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    if process.poll() is not None:
        pytest.skip(f"sshd does not start here: {(folder / 'sshd.log').read_text().strip()[-300:]}")
    yield Server(port, process, folder)
    close_connections()
    process.terminate()
    process.wait()


@pytest.fixture(autouse=True)
def _options(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use_options(server, monkeypatch, server.folder / "known_hosts", server.folder / "user_key")


def use_options(server: Server, monkeypatch: pytest.MonkeyPatch, hosts: Path, key: Path) -> None:
    options = ["-F", "none", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", f"UserKnownHostsFile={hosts}"]
    monkeypatch.setenv("PARETOPRUNE_SSH_OPTIONS", shlex.join(options))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("PARETOPRUNE_SSH_PYTHON", shlex.quote(sys.executable))


def test_a_remote_device_is_described_measured_and_profiled(server: Server, export: Export) -> None:
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
    runtime: str, server: Server, export: Export, monkeypatch: pytest.MonkeyPatch
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


def test_a_model_that_arrives_changed_is_refused(server: Server, export: Export) -> None:
    device = server.device()
    wrong = replace(export(Device("near", "onnxruntime"), 16), digest="0" * 64)
    with pytest.raises(DeviceError, match="the model arrived with sha256"):
        measure(device, wrong)
    assert not list((server.cache / "models").glob("0" * 64 + "*"))
    assert describe(device).stable["runtime"] == "onnxruntime"


def test_a_line_cut_in_the_middle_of_a_comparison_is_said_and_the_next_one_works(
    server: Server, export: Export
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


def test_a_runner_that_is_asked_nothing_ends_by_itself(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 1)
    link = connection.Connection(server.device())
    link._process.wait(timeout=60)
    with pytest.raises(DeviceLostError, match="lost ssh"):
        link.ask({"do": "facts", **server.device().to_json()}, timeout_s=10)


def test_an_unknown_host_key_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = server.folder / "no_hosts"
    use_options(server, monkeypatch, nobody, server.folder / "user_key")
    with pytest.raises(DeviceError, match=r"host key .* is not the one in known_hosts") as caught:
        describe(server.device(threads=2))
    assert not isinstance(caught.value, DeviceLostError)  # Another try would not help.
    other = make_key(server.folder / "other_host_key").with_suffix(".pub").read_text()
    nobody.write_text(f"[127.0.0.1]:{server.port} {other}")
    with pytest.raises(DeviceError, match=r"host key .* is not the one in known_hosts"):
        describe(server.device(threads=2))
    assert nobody.read_text().count("\n") == 1


def test_a_refused_login_says_how_to_try_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = make_key(server.folder / "stranger")
    use_options(server, monkeypatch, server.folder / "known_hosts", stranger)
    with pytest.raises(DeviceError, match=r"refused the login .* without a question: ssh .*127\.0\.0\.1"):
        describe(server.device(threads=2))


def test_a_machine_without_python_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOPRUNE_SSH_PYTHON", "no-such-python3")
    with pytest.raises(DeviceError, match=r"cannot start python3 .*install Python 3.9 or later"):
        describe(server.device(threads=2))


def test_a_machine_that_is_away_is_lost(server: Server) -> None:
    with pytest.raises(DeviceLostError, match=r"no connection to ssh://127.0.0.1:\d+ .*refused"):
        describe(server.device(host=f"ssh://127.0.0.1:{free_port()}"))


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
