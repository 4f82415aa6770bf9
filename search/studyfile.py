"""The study file: what the user asks for, checked whole before anything starts.

Reads YAML, expands `${VAR}`, applies `--set` overrides, resolves paths against the file's folder, and reports
all faults at once. Opens neither model nor data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator

from .sections import (
    NAME,
    CalibrationSection,
    DeviceSection,
    FinetuneSection,
    Limits,
    MeasureSection,
    ModelSection,
    ProfileSection,
    ReferenceSection,
    ScreeningSection,
    SearchSection,
    Section,
    StoppingSection,
    Word,
)
from .uri import redact, without_paths

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class StudyFileError(ValueError):
    """One or more faults of a study file; `faults` holds a line each."""

    def __init__(self, source: str, faults: Sequence[str]):
        self.faults = tuple(faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {fault}" for fault in faults)]))


class StudyFile(Section):
    """A checked study file. Paths are absolute."""

    name: Word
    model: ModelSection | Word
    data: Word
    imgsz: Annotated[int, Field(ge=1)] | None = None
    devices: tuple[DeviceSection, ...] = Field(min_length=1)
    search: SearchSection = SearchSection()
    calibration: CalibrationSection = CalibrationSection()
    finetune: FinetuneSection = FinetuneSection()
    profile: ProfileSection = ProfileSection()
    measure: MeasureSection = MeasureSection()
    stopping: StoppingSection = StoppingSection()
    screening: ScreeningSection = ScreeningSection()
    trials: Annotated[int, Field(ge=1)] = 40
    limits: Limits = Limits()
    references: tuple[ReferenceSection, ...] = ()
    seed: int = 0
    storage: Word | None = None
    tracking_uri: Word | None = None
    source: Path = Field(default=Path(), exclude=True)
    folder: Path = Field(default=Path(), exclude=True)
    overrides: tuple[str, ...] = Field(default=(), exclude=True)

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not NAME.match(value):
            raise ValueError(f"must be letters, digits, '.', '_' and '-' (it names a folder), got {value!r}")
        return value

    @field_validator("devices")
    @classmethod
    def _unique(cls, devices: tuple[DeviceSection, ...]) -> tuple[DeviceSection, ...]:
        names = [d.name for d in devices]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"names must be unique, got {', '.join(twice)} more than once")
        return devices

    @field_validator("references")
    @classmethod
    def _known_devices(cls, references: tuple[ReferenceSection, ...], info: Any) -> Any:
        names, devices = [r.name for r in references], [d.name for d in info.data.get("devices", ())]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"names must be unique, got {', '.join(twice)} more than once")
        for reference in references:
            if devices and reference.device not in (None, *devices):
                raise ValueError(
                    f"the device of {reference.name} must be one of {', '.join(devices)}, "
                    f"got {reference.device!r}"
                )
        return references

    def device(self, name: str) -> DeviceSection:
        """The device of that name.

        Raises:
            StudyFileError: there is none.
        """
        for section in self.devices:
            if section.name == name:
                return section
        have = ", ".join(d.name for d in self.devices)
        raise StudyFileError(self.source.name, [f"--device must be one of {have}, got {name!r}"])

    @property
    def set_words(self) -> list[str]:
        """The overrides that this study was loaded with, as a command's words, without secrets and paths."""
        addresses = [a for a in (self.storage, self.tracking_uri) if a]
        return [w for text in self.overrides for w in ("--set", without_paths(redact(text, *addresses)))]

    def limits_of(self, device: str) -> Limits:
        """The study's limits, each replaced where the device has its own."""
        own = self.device(device).limits
        return (
            self.limits if own is None else self.limits.model_copy(update=own.model_dump(exclude_none=True))
        )


def load_study_file(
    path: Path, overrides: Sequence[str] = (), folder: Path | None = None, *, needs_files: bool = True
) -> StudyFile:
    """Read and check a study file.

    Args:
        path: the YAML file.
        overrides: `key=value` with dotted keys, list items by position or by their name; values in YAML.
        folder: where outputs go; default `runs/<name>` beside the file.
        needs_files: whether the model and the data must be here.

    Raises:
        StudyFileError: every fault found, each with its key, the value received and what is allowed.
    """
    source = path.name
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyFileError(
            str(path), ["the file does not exist; give the path of a study file (.yaml)"]
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyFileError(source, [f"the file cannot be read: {error}"]) from error
    except yaml.YAMLError as error:
        raise StudyFileError(
            source, [f"the file is not valid YAML: {' '.join(str(error).split())}"]
        ) from error
    if not isinstance(raw, dict):
        raise StudyFileError(source, [f"the file must hold keys and values, got {type(raw).__name__}"])
    # A key with nothing under it, as a commented-out section leaves it, asks for the defaults.
    raw = {key: value for key, value in raw.items() if value is not None}
    faults: list[str] = []
    for override in overrides:
        _override(raw, override, faults)
    raw = _expand(raw, "", faults)
    study: StudyFile | None = None
    try:
        study = StudyFile.model_validate(raw)
    except ValidationError as error:
        faults += _faults(error, raw)
    root = path.resolve().parent
    if needs_files:
        faults += _missing_files(raw, root)
    if faults or study is None:
        raise StudyFileError(source, faults)
    references = tuple(
        r if r.model is None else r.model_copy(update={"model": _resolve_model(r.model, root)})
        for r in study.references
    )
    return study.model_copy(
        update={
            "model": _resolve_model(study.model, root),
            "references": references,
            "data": str(_resolve(study.data, root)),
            "source": path.resolve(),
            "overrides": tuple(overrides),
            "folder": (folder or root / "runs" / study.name).resolve(),
            "storage": study.storage or os.environ.get("OPTUNA_STORAGE") or None,
            "tracking_uri": study.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None,
        }
    )


def _resolve(text: str, root: Path) -> Path:
    """A path beside the study file; a bare name that is not there is left for the framework to find or
    download.
    """
    path = Path(text).expanduser()
    if path.is_absolute():
        return path
    return (root / path) if (root / path).exists() or path.parent != Path() else path


def _resolve_model(model: ModelSection | str, root: Path) -> ModelSection | str:
    if isinstance(model, ModelSection):
        weights = None if model.weights is None else str(_resolve(model.weights, root))
        return model.model_copy(update={"weights": weights})
    return str(_resolve(model, root))


def _missing_files(raw: Mapping[str, Any], root: Path) -> list[str]:
    faults = []
    named = {"data": raw.get("data")}
    references = raw.get("references")
    entries = references if isinstance(references, list) else []
    models = [(f"references[{i}].", r.get("model")) for i, r in enumerate(entries) if isinstance(r, dict)]
    for prefix, model in [("", raw.get("model")), *models]:
        if isinstance(model, dict):
            named[f"{prefix}model.weights"] = model.get("weights")
        else:
            named[f"{prefix}model"] = model
    for key, value in named.items():
        if isinstance(value, str) and value and "${" not in value:
            path = _resolve(value, root)
            bare = Path(value).parent == Path() and Path(value).suffix in (".pt", ".yaml", ".yml")
            if not path.exists() and not bare:
                faults.append(
                    f"{key}: must be an existing file (relative paths start at the study file), got {value!r}"
                )
    return faults


def _expand(value: Any, key: str, faults: list[str]) -> Any:
    """Replace `${VAR}` in every string."""
    if isinstance(value, dict):
        return {k: _expand(v, f"{key}.{k}" if key else str(k), faults) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, f"{key}[{i}]", faults) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            faults.append(f"{key}: the environment variable {name} must be set, got none in {value!r}")
            return match.group(0)
        return os.environ[name]

    return _VARIABLE.sub(replace, value)


def _override(raw: dict[str, Any], override: str, faults: list[str]) -> None:
    """Apply one `key=value` to the raw document."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        faults.append(f"--set must be key=value, got {override!r}")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        faults.append(f"--set {key}: the value must be valid YAML, got {text!r}")
        return
    at: Any = raw
    parts = key.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(at, list):
            position = next(
                (n for n, item in enumerate(at) if isinstance(item, dict) and item.get("name") == part), None
            )
            if position is None and part.isdigit() and int(part) < len(at):
                position = int(part)
            if position is None:
                faults.append(f"--set {key}: {part!r} must be a position or a name in a list of {len(at)}")
                return
            if last:
                at[position] = value
            else:
                at = at[position]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                at = at.setdefault(part, {})
        else:
            faults.append(
                f"--set {key}: {'.'.join(parts[:i])} holds a plain value, so it has no key {part!r}"
            )
            return


def _faults(error: ValidationError, raw: Any) -> list[str]:
    """One line per key; of a union's several complaints, the one that fits what the user wrote."""
    lines: dict[str, list[tuple[int, str]]] = {}
    items = [(item, *_branch(item["loc"], raw)) for item in error.errors(include_url=False)]
    meant = {union for _, union, fits in items if fits}
    for item, union, fits in items:
        if not fits and union in meant:
            continue
        loc = [p for p in item["loc"] if not (isinstance(p, str) and _is_branch(p))]
        key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
        kind, value = item["type"], item["input"]
        if kind == "extra_forbidden":
            text, weight = f"{key}: unknown key; remove it or correct its spelling", 3
        elif kind == "missing":
            text, weight = f"{key}: is required and missing", 3
        elif kind == "value_error":
            message = str(item["msg"]).removeprefix("Value error, ")
            text, weight = f"{key}: {message}", 4
        elif kind == "too_short":
            text, weight = f"{key}: needs at least one entry, got none", 3
        else:
            message = str(item["msg"])
            text, weight = f"{key}: {message[:1].lower()}{message[1:]}, got {_short(value)}", 1
            if kind in ("model_type", "model_attributes_type", "dict_type"):
                weight = 0
        lines.setdefault(key, []).append((weight, text))
    result = []
    for key, found in lines.items():
        nested = [k for k in lines if k.startswith((f"{key}.", f"{key}["))]
        best = max(weight for weight, _ in found)
        if nested and (best <= 1 or "needs at least one entry" in found[0][1]):
            continue  # the complaint about a part says more than "not this form" about the whole
        result += list(dict.fromkeys(text for weight, text in found if weight == best))[
            : 1 if best <= 1 else None
        ]
    return result


def _branch(loc: tuple[int | str, ...], raw: Any) -> tuple[tuple[int | str, ...], bool]:
    """Where a union stands in an error's location, and whether its branch is of the form the user chose."""
    value = raw
    for i, part in enumerate(loc):
        if isinstance(part, str) and _is_branch(part):
            if not isinstance(value, dict):
                return loc[:i], True
            form = (
                "Choices["
                if "choices" in value
                else "Range"
                if {"low", "high"} & set(value)
                else "ModelSection"
            )
            return loc[:i], form in part
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            break
    return loc, True


def _is_branch(part: str) -> bool:
    """Pydantic puts the name of a union's branch into the location; the user never wrote it."""
    forms = (
        "Range",
        "ModelSection",
        "float",
        "int",
        "str",
        "literal['auto']",
        "constrained-str",
        "constrained-int",
    )
    return part in forms or part.startswith(("Choices[", "function-", "literal["))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
