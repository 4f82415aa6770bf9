"""MLflow's web interface on a study's store: the command that opens it.

Builds a command line and its environment. Starts nothing and imports no MLflow.
"""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlsplit


def ui_command(tracking_uri: str, artifacts: Path | None, *, port: int = 5000) -> list[str]:
    """The command that serves MLflow's UI on a database store, to this machine only, with `ui_environment`.

    Returns:
        The command; empty for a server (http), whose address is its UI.
    """
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        return []
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    if artifacts is not None:
        command += ["--default-artifact-root", str(artifacts)]
    return command


def ui_environment(tracking_uri: str) -> dict[str, str]:
    """Variables for `ui_command`: the store's address too, since a command line shows its password to all."""
    return {
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
