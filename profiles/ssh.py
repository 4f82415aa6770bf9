"""How a runner is started on another machine: through the system's `ssh`, with nothing installed beforehand.

Needed there are `python3` (3.9 or later) and the runtime with numpy; the runner's own code is sent over once
and kept by its digest in `~/.cache/paretoprune`. Knows the command, the first lines and what ssh's complaints
mean; knows neither requests nor models.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shlex
import zipfile
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

#: Connecting, logging in and receiving the runner.
CONNECT_TIMEOUT_S = 45
#: A runner that is asked nothing for this long ends, in case the line broke without its noticing.
IDLE_S = 1800
_RUNNER = Path(__file__).resolve().parent / "runner"
#: Options that the user adds, ahead of ours: ssh takes the first value it sees.
_OPTIONS_VARIABLE = "PARETOPRUNE_SSH_OPTIONS"
_OPTIONS = (
    "BatchMode=yes",  # Never a question: nobody may be there to answer.
    "StrictHostKeyChecking=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
)
#: Another Python than `python3` over there, such as a virtual environment's: `~/measure/bin/python`.
_PYTHON_VARIABLE = "PARETOPRUNE_SSH_PYTHON"
#: The bootstrap program comes as the first line, so that no shell's quoting touches it.
_COMMAND = "exec {python} -u -c 'import sys,base64;exec(base64.b64decode(sys.stdin.readline()))'"


def ssh_command(host: str) -> list[str]:
    """The command that starts a Python on `ssh://[user@]host[:port]` which executes its first line of input.

    Options in the environment variable PARETOPRUNE_SSH_OPTIONS, written as for a shell, come before ours;
    PARETOPRUNE_SSH_PYTHON names another Python there than `python3`.
    """
    url = urlsplit(host)
    command = ["ssh", "-T", *shlex.split(os.environ.get(_OPTIONS_VARIABLE, ""))]
    for option in _OPTIONS:
        command += ["-o", option]
    if url.port:
        command += ["-p", str(url.port)]
    user = f"{url.username}@" if url.username else ""
    # Not `url.hostname`, which is in lower case: the name may be an alias in the user's ssh configuration.
    name = url.netloc.rpartition("@")[2].partition(":")[0]
    python = os.environ.get(_PYTHON_VARIABLE, "python3")  # Unquoted: their shell may expand it.
    return [*command, "--", f"{user}{name}", _COMMAND.replace("{python}", python)]


def bootstrap_line() -> str:
    """The program that receives the runner, in base64."""
    return base64.b64encode((_RUNNER / "bootstrap.py").read_bytes()).decode()


@cache
def runner_package() -> tuple[str, str]:
    """sha256 of the runner as a zip, and the zip in base64; the same for the same sources."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("profiles/__init__.py"), "")
        for path in sorted(_RUNNER.glob("*.py")):
            archive.writestr(zipfile.ZipInfo(f"profiles/runner/{path.name}"), path.read_bytes())
    data = content.getvalue()
    return hashlib.sha256(data).hexdigest(), base64.b64encode(data).decode()


def explain(host: str, status: int | None, errors: list[str]) -> tuple[bool, str]:
    """Why ssh ended before a runner answered: whether another try can help, and what to do."""
    said = " | ".join(line for line in errors if line.strip())
    login = " ".join(part for part in ssh_command(host)[1:-1] if part not in ("-T", "--"))
    if "Host key verification failed" in said or "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
        return False, (
            f"the host key of {host} is not the one in known_hosts ({said}); "
            "make sure that it is the right machine, then log in once by hand to accept its key"
        )
    if "Permission denied" in said:
        return False, f"{host} refused the login ({said}); it must work without a question: ssh {login}"
    if status in (126, 127):
        return False, (
            f"{host} cannot start python3 ({said}); install Python 3.9 or later there, "
            f"or name one in {_PYTHON_VARIABLE}"
        )
    return True, f"no connection to {host} (ssh status {status}): {said or 'it said nothing'}"
