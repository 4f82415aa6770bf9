"""A task whose model is on a GPU: what runs on it there needs no word of it. Knows no search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .task import Task

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class _Placed:
    task: Task
    device: str

    def load_model(self) -> nn.Module:
        return self.task.load_model().to(self.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


def placed_on(task: Task, device: str) -> Task:
    """The task, with fresh copies of its model on a torch device; its batches follow the model."""
    return cast("Task", _Placed(task, device))
