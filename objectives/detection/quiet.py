"""Ultralytics kept to itself: imported before anything else of it, the only place that sets its environment.

Its settings live in a folder of ours; telemetry, update checks and automatic installs are off. Variables that
the user has set are left alone.
"""

import logging
import os

import platformdirs

# Before the first import: these are read once, at import time.
os.environ.setdefault("YOLO_CONFIG_DIR", str(platformdirs.user_cache_path("paretoprune") / "ultralytics"))
os.environ.setdefault("YOLO_AUTOINSTALL", "0")
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_VERBOSE", "0")

# Imported first, Ultralytics would give torch a single thread, and say so to every process started from here.
_threads = os.environ.get("OMP_NUM_THREADS")
import torch  # noqa: E402, F401
from ultralytics.utils import LOGGER  # noqa: E402

if _threads is None:
    os.environ.pop("OMP_NUM_THREADS", None)
LOGGER.setLevel(logging.ERROR)
