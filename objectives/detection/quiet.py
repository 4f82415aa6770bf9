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

from ultralytics.utils import LOGGER

LOGGER.setLevel(logging.ERROR)
