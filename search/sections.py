"""The sections of a study file: their keys, what is allowed and what is taken by default.

Checks values one by one and together; reads no file and knows no path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from objectives.compute import check_device_name, check_scoring_device
from profiles.device import Device

from .allocation import ALLOCATIONS
from .costs import COSTS
from .criteria import CRITERIA
from .result import RECOVERIES

T = TypeVar("T")
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, arbitrary_types_allowed=True)


class Range(Section):
    """A searched number, `low` to `high`, both included."""

    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low:g} and high {self.high:g}")
        return self


class Choices(Section, Generic[T]):
    """A searched choice."""

    choices: tuple[T, ...] = Field(min_length=1)

    @field_validator("choices")
    @classmethod
    def _distinct(cls, values: tuple[T, ...]) -> tuple[T, ...]:
        if len(set(values)) != len(values):
            raise ValueError(f"choices must differ, got {list(values)}")
        return values


Beta = Annotated[float, Field(ge=0.0, le=1.0)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Multiple = Annotated[int, Field(ge=1)]
Word = Annotated[str, Field(min_length=1)]
#: Where this process computes, unlike the devices of a study, on which the model shall run.
TorchDevice = Annotated[str, AfterValidator(check_device_name)]
ScoringDevice = Annotated[str, AfterValidator(check_scoring_device)]


def _bounded(value: float | Range | Choices[float], low: float, high: float, *, closed: bool) -> None:
    ends: tuple[float, ...]
    if isinstance(value, Range):
        ends = (value.low, value.high)
    elif isinstance(value, Choices):
        ends = value.choices
    else:
        ends = (value,)
    for end in ends:
        if not (low <= end <= high if closed else low <= end < high):
            raise ValueError(f"must lie in [{low:g}, {high:g}{']' if closed else ')'}, got {end:g}")


class SearchSection(Section):
    """What is searched; a plain value is fixed."""

    beta: Range | Choices[float] | float = Range(low=0.0, high=1.0)
    ratio: Range | Choices[float] | float = Range(low=0.1, high=0.7)
    ratio_of: Literal["channels", "latency", "macs", "params", "memory"] = "channels"
    criterion: Choices[str] | Word = "taylor"
    cost: Choices[str] | Word = "layer"
    allocation: Choices[str] | Word = "rank"
    round_to: Literal["auto"] | Multiple | Choices[int] = "auto"
    steps: Choices[int] | Multiple = 1
    depth: Range | Choices[float] | float = 0.0
    recovery: Choices[str] | Word = "finetune"
    min_channels: Multiple = 8
    include: tuple[Word, ...] = ("*",)
    exclude: tuple[Word, ...] = ()
    sampler: Literal["gp", "tpe", "nsga2", "random", "grid"] = "gp"

    @field_validator("beta")
    @classmethod
    def _beta(cls, value: Any) -> Any:
        _bounded(value, 0.0, 1.0, closed=True)
        return value

    @field_validator("ratio", "depth")
    @classmethod
    def _ratio(cls, value: Any) -> Any:
        _bounded(value, 0.0, 1.0, closed=False)
        return value

    @field_validator("steps")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        if isinstance(value, Choices) and min(value.choices) < 1:
            raise ValueError(f"must be at least 1, got {min(value.choices)}")
        return value

    @field_validator("criterion", "cost", "allocation", "recovery")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        words = {
            "criterion": CRITERIA,
            "cost": COSTS,
            "allocation": ALLOCATIONS,
            "recovery": RECOVERIES,
        }
        allowed = words[info.field_name]
        for word in value.choices if isinstance(value, Choices) else (value,):
            if word not in allowed:
                raise ValueError(f"must be one of {', '.join(allowed)}, got {word!r}")
        return value


class CalibrationSection(Section):
    """How and where scores are computed. Loss curves take `curve_images` of the images, all where none are
    given.
    """

    images: Annotated[int, Field(ge=1)] = 64
    curve_images: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] = 8
    loss: Literal["task", "outputs"] = "task"
    device: ScoringDevice = "auto"


class FinetuneSection(Section):
    """How a pruned model is trained back. `threads` of the CPU: every core where none are given."""

    epochs: Annotated[int, Field(ge=0)] = 3
    lr: Annotated[float, Field(gt=0)] | None = None
    batch: Annotated[int, Field(ge=1)] | None = None
    device: TorchDevice = "auto"
    reestimate_images: Annotated[int, Field(ge=0)] = 64
    threads: Annotated[int, Field(ge=1)] | None = None
    options: Mapping[str, Any] = Field(default_factory=dict)


class ProfileSection(Section):
    """How a device is profiled. `fitted` also measures pruned variants of the model, a minute or more."""

    model: Literal["fitted", "bilinear", "linear"] = "fitted"
    repeats: Annotated[int, Field(ge=1)] = 50


class MeasureSection(Section):
    """When a latency measurement ends: the ratio's interval is narrow enough, or the time is up."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.01
    limit_s: Annotated[float, Field(gt=0)] = 30.0


class Limits(Section):
    """What a model must satisfy to be worth shipping."""

    latency_ms: Annotated[float, Field(gt=0)] | None = None
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    params: Annotated[int, Field(gt=0)] | None = None
    size_mb: Annotated[float, Field(gt=0)] | None = None


class StoppingSection(Section):
    """When a trial ends early, see `search.stopping`.

    Attributes:
        enabled: False runs every trial to its end.
        margin: what an expected accuracy must fall short by before it decides, and what an epoch must bring
            for more to be worth it, as a share of the unpruned model's accuracy.
        after: complete trials needed before anything is expected of others.
        halving: after epochs 1, 2, 4, ... the best `1 / halving` of the trials so far go on, by
            non-dominated sorting of accuracy and latency; the first rank always does. 1: all go on.
        extra_epochs: for a trial that its last epoch made better by more than `margin` and that can grow the
            front by them, see `FrontGate.extra_epochs`; the first gets none.
        extensions: how often a trial is given these, after each time by what all of them together brought.
    """

    enabled: bool = True
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    after: Annotated[int, Field(ge=2)] = 4
    halving: Annotated[int, Field(ge=1)] = 2
    extra_epochs: Annotated[int, Field(ge=0)] = 0
    extensions: Annotated[int, Field(ge=1)] = 1


class ScreeningSection(Section):
    """Which candidates are tried between the first known point and the others, before the sampler draws.

    Attributes:
        candidates: points that are planned and judged by what their plans promise, see `search.screening`.
        keep: trials that take the most promising one, see `search.promising`; 0 leaves all to the sampler.
    """

    candidates: Annotated[int, Field(ge=0)] = 1000
    keep: Annotated[int, Field(ge=0)] = 8


class DeviceSection(Section):
    """One device; the fields of `profiles.device.Device`, and limits of its own."""

    name: Word
    runtime: Word
    threads: Annotated[int, Field(ge=1)] = 1
    precision: Word = "fp32"
    providers: tuple[Word, ...] = ()
    host: Word | None = None
    limits: Limits | None = None

    @model_validator(mode="after")
    def _is_device(self) -> DeviceSection:
        self.device()  # raises ValueError with the device's own rule
        if not NAME.match(self.name):
            raise ValueError(
                f"name must be letters, digits, '.', '_' and '-' (it names a folder), got {self.name!r}"
            )
        return self

    def device(self) -> Device:
        return Device(
            name=self.name,
            runtime=self.runtime,
            threads=self.threads,
            precision=self.precision,
            providers=tuple(self.providers),
            host=self.host,
        )


class ModelSection(Section):
    """Any nn.Module: a function that builds it (called with `arguments`), its weights, and how it wants its
    pixels.
    """

    builder: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    weights: Word | None = None
    arguments: Mapping[str, Any] = Field(default_factory=dict)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class ReferenceSection(Section):
    """What to compare the fronts with: another model or image size, which is measured, or given numbers."""

    name: Word
    model: ModelSection | Word | None = None
    imgsz: Annotated[int, Field(ge=1)] | None = None
    device: Word | None = None
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> ReferenceSection:
        numbers = (self.accuracy is not None, self.latency_ms is not None, self.device is not None)
        if any(numbers[:2]) and not (all(numbers) and self.model is None and self.imgsz is None):
            raise ValueError(
                "given numbers must be accuracy, latency_ms and their device, without model or imgsz"
            )
        if not any(numbers[:2]) and self.model is None and self.imgsz is None:
            raise ValueError(
                "needs a model or imgsz to measure, or accuracy, latency_ms and device; got none"
            )
        return self

    @property
    def is_given(self) -> bool:
        """Whether the numbers stand in the study file instead of being measured."""
        return self.latency_ms is not None
