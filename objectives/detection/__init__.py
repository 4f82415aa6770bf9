"""Object detection with Ultralytics YOLO: model, data, loss, recovery and mAP.

The only folder that knows Ultralytics. It knows nothing of devices, scores, plans or trials.
"""

# First, and for its effect: Ultralytics reads its environment when it is imported.
from . import quiet  # noqa: F401
from .files import as_yolo
from .task import DetectionTask
from .training import PrunedTrainer

__all__ = ["DetectionTask", "PrunedTrainer", "as_yolo"]
