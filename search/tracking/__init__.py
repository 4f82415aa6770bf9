"""Tracking: what a study found, in MLflow. The only folder that knows MLflow.

`tracker` keeps the study's record, `records` turns what waits in the outbox into runs, `store` reaches
MLflow, `registry` holds the models that ship.
"""

from .registry import fetch_model, register_model
from .store import TrackingError
from .tracker import Tracker

__all__ = ["Tracker", "TrackingError", "fetch_model", "register_model"]
