"""What all tests share: an environment of their own, and small models whose outputs notice a wrong cut."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from torch import nn

    from profiles.device import Device

#: Making the study that they look at takes minutes.
_SHARE_THE_SEARCHED = ("test_pages.py", "test_review.py", "test_shipping.py")
#: Files of a minute or more.
_LONG = (
    *_SHARE_THE_SEARCHED, "test_remote_search.py", "test_quickstart.py", "test_kills.py", "test_measure.py",
    "test_workers.py", "test_cli.py", "test_detection.py", "test_classifier_study.py",
)  # fmt: skip

# Ultralytics reads this once, when it is imported: its settings file must not be the user's.
_is_worker = "PYTEST_XDIST_WORKER" in os.environ
if _is_worker or "YOLO_CONFIG_DIR" not in os.environ:
    _settings = tempfile.TemporaryDirectory(prefix="paretoprune-tests-")  # removed when the tests end
    os.environ["YOLO_CONFIG_DIR"] = _settings.name
    if _is_worker:  # tests that run side by side share no host lock: none of them asserts a time
        os.environ["TMPDIR"] = tempfile.tempdir = _settings.name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: a file's tests stay together, and those of all files that share the searched study."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0]).name
            return "searched" if file in _SHARE_THE_SEARCHED else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker of `-n auto` takes almost 2 GB, and more of them than long files gain nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side what is long begins first, so that no core ends up alone with it."""
    if _is_worker:
        items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


@pytest.fixture(autouse=True)
def _own_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's stores are no place for test runs."""
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def no_pngs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search ends without starting a browser for its pictures, which have tests of their own."""
    import search.review

    monkeypatch.setattr(search.review, "write_pngs", lambda drawn, folder: {})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is computed here is too small to share out, and threads that wait cost more than they bring."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Shapes:
    """A tiny detector that has learned its few images: `weights` is its checkpoint, `model` its yaml."""

    folder: Path
    data: Path
    model: Path
    weights: Path
    imgsz: int = 64


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """Trained on what it is judged by: a quarter of a minute gives an accuracy well above 0 no other way."""
    import torch
    import yaml

    from objectives.detection import DetectionTask
    from objectives.synthetic import CLASSES, make_detection_set
    from objectives.task import Recovery

    folder = tmp_path_factory.mktemp("shapes")
    data = make_detection_set(folder / "shapes", images_train=12, images_val=12, imgsz=64, seed=0)
    data.write_text(data.read_text().replace("images/val", "images/train"))
    backbone = [
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "C2f", [128, True]],
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 3, "C2f", [256, True]],
        [-1, 1, "Conv", [512, 3, 2]],
        [-1, 1, "SPPF", [512, 5]],
    ]
    head = [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 3, "C2f", [256]],
        [[9, 6], 1, "Detect", ["nc"]],
    ]
    model = folder / "tiny.yaml"
    scales = {"n": [0.33, 0.125, 512]}
    text = {"nc": len(CLASSES), "scales": scales, "scale": "n", "backbone": backbone, "head": head}
    model.write_text(yaml.safe_dump(text, sort_keys=False))
    plain = dict.fromkeys(
        ("mosaic", "hsv_h", "hsv_s", "hsv_v", "scale", "translate", "fliplr", "erasing"), 0.0
    )
    task = DetectionTask(str(model), str(data), 64)
    recovery = Recovery(epochs=80, lr=7e-3, batch=4, reestimate_images=0, device="cpu", options=plain)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained = task.recover(task.load_model(), recovery, folder / "training", lambda *_: True)
    finally:
        torch.set_num_threads(before)
    return Shapes(folder, data, model, task.save(trained, folder / "tiny.pt"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real weights and images."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PARETOPRUNE_DATA", default))
    if not (folder / "yolov8n-bccd.pt").is_file():
        pytest.skip(f"no yolov8n-bccd.pt in {folder}; set PARETOPRUNE_DATA to the data folder")
    return folder


@pytest.fixture(scope="session")
def alive() -> Callable[[nn.Module, int, int], nn.Module]:
    """Make a fresh model's every channel matter: (model, seed, image side) to that model, eval mode, float64.

    A fresh batch norm does nothing (mean 0, variance 1, shift 0), so a cut that took the wrong entries of it
    would go unnoticed; and without fitting statistics a deep fresh network's signal dies out, which hides
    everything else.
    """
    import torch
    from torch import nn

    from objectives.batchnorm import reestimate_batchnorm

    def enliven(model: nn.Module, seed: int, side: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                with torch.no_grad():
                    module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                    module.bias.copy_(0.5 * torch.randn(module.bias.shape, generator=generator))
        reestimate_batchnorm(model, [torch.rand(4, 3, side, side, generator=generator)])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                spread = module.running_var.sqrt()
                module.running_mean += 0.3 * spread * torch.randn(spread.shape, generator=generator)
                module.running_var *= 0.7 + 0.6 * torch.rand(spread.shape, generator=generator)
                module.running_var.clamp_(min=1e-6)
        return model.double().eval()

    return enliven


@dataclass(frozen=True)
class SshServer:
    """A running sshd on this machine's loopback."""

    port: int
    process: subprocess.Popen[bytes]
    folder: Path

    def device(self, **keys: Any) -> Device:
        from profiles.device import Device

        settings = {"name": "far", "runtime": "onnxruntime", "threads": 1}
        return Device(**{**settings, "host": self.host, **keys})

    @property
    def host(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    @property
    def cache(self) -> Path:
        """What the runner keeps on the device."""
        return self.folder / "cache" / "paretoprune"

    @property
    def sessions(self) -> list[psutil.Process]:
        """The processes that serve logins."""
        return psutil.Process(self.process.pid).children(recursive=False)

    def cut(self) -> None:
        """End every login at once, as a dead line does."""
        for session in self.sessions:
            session.kill()

    def make_key(self, name: str) -> Path:
        path = self.folder / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        return path

    @staticmethod
    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def use(
        self, monkeypatch: pytest.MonkeyPatch, *, hosts: Path | None = None, key: Path | None = None
    ) -> None:
        """Log in with the server's own key, known host and Python, or with others."""
        hosts, key = hosts or self.folder / "known_hosts", key or self.folder / "user_key"
        options = ["-F", "none", "-i", str(key), "-o", "IdentitiesOnly=yes"]
        options += ["-o", f"UserKnownHostsFile={hosts}"]
        monkeypatch.setenv("PARETOPRUNE_SSH_OPTIONS", shlex.join(options))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        monkeypatch.setenv("PARETOPRUNE_SSH_PYTHON", shlex.quote(sys.executable))


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """A real SSH server; skipped, with the reason, where there is none."""
    sshd = "/usr/sbin/sshd"
    if not (Path(sshd).is_file() and shutil.which("ssh") and shutil.which("ssh-keygen")):
        pytest.skip("no SSH server or client here; install openssh-server")
    if os.getuid() == 0:  # Only root's sshd asks for it.
        Path("/run/sshd").mkdir(exist_ok=True)
    folder, port = tmp_path_factory.mktemp("sshd"), SshServer.free_port()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized_keys").write_bytes((folder / "user_key.pub").read_bytes())
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f"""
        Port {port}
        ListenAddress 127.0.0.1
        HostKey {folder}/host_key
        AuthorizedKeysFile {folder}/authorized_keys
        PidFile none
        StrictModes no
        UsePAM no
        PermitRootLogin yes
        PasswordAuthentication no
        SetEnv XDG_CACHE_HOME={folder}/cache TMPDIR={tempfile.gettempdir()}
        """
    )
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            [sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    if process.poll() is not None:
        pytest.skip(f"sshd does not start here: {(folder / 'sshd.log').read_text().strip()[-300:]}")
    yield SshServer(port, process, folder)
    process.terminate()
    process.wait()
