"""A study in a notebook: load a study file, run it, look at fronts as data frames and figures, take a model.

The same functions as the commands use; what they print to the terminal comes back as objects here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .bench import Shop
from .export import check_conditions, export_best, restore, trial_folder
from .found import Found, fronts_of
from .launch import launch
from .preview import preview
from .progress import ConsoleProgress
from .review import figures, write_study_report
from .sections import ModelSection
from .studyfile import StudyFile, load_study_file
from .uri import publishable
from .workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


class Study:
    """A study file opened for work in Python.

    Args:
        path: the study file.
        settings: overrides with dotted keys, as `--set` takes them: `{"search.beta": 0.5}`; None is null.
        folder: where outputs go; default `runs/<name>` beside the file.

    Raises:
        StudyFileError: every fault of the file, all at once.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any] | None = None, folder: str | Path | None = None
    ) -> None:
        overrides = [f"{key}={_setting(value)}" for key, value in (settings or {}).items()]
        self.file: StudyFile = load_study_file(
            Path(path), overrides, None if folder is None else Path(folder)
        )

    @property
    def devices(self) -> list[str]:
        return [section.name for section in self.file.devices]

    def run(
        self,
        trials: int | None = None,
        devices: Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        console: Console | None = None,
    ) -> pd.DataFrame:
        """Run trials, or go on where an earlier run ended.

        Args:
            trials: finished trials wanted per device, earlier ones counted in; default the study file's.
            timeout_s: no further trial begins after this.
            console: where progress goes; default the error stream.

        Returns:
            The fronts, as `front`.

        Raises:
            SearchError: the search cannot go on.
        """
        names = self._names(devices)
        with ConsoleProgress(console or Console(stderr=True), devices=names) as progress:
            wanted = self.file.trials if trials is None else trials
            launch(self.file, names, trials=wanted, timeout_s=timeout_s, progress=progress)
        return self.front(devices)

    def plan(self, device: str, beta: float, ratio: float) -> dict[str, Any]:
        """What would be removed and the predicted latency, as `paretoprune plan --json`; trains nothing.

        Raises:
            StudyFileError: beta or ratio is out of range.
        """
        return preview(self.file, device, beta=beta, ratio=ratio, notice=self._shop.notice)

    def front(self, devices: Sequence[str] | str | None = None) -> pd.DataFrame:
        """The fronts' points: a row each, by device and latency, with the keys of `paretoprune front --json`
        and, in the place of `asked`, a column for each of its keys.

        Raises:
            SearchError: there is no front yet.
        """
        rows = []
        for name, found in self._found(devices).items():
            rows += [{"device": name, **point, **point["asked"]} for point in found.document["points"]]
        return _frame(rows).drop(columns="asked")

    def trials(self, devices: Sequence[str] | str | None = None) -> pd.DataFrame:
        """Every finished trial, on the front or not, stopped and failed ones too.

        Raises:
            SearchError: there is no front yet.
        """
        rows = []
        for name, found in self._found(devices).items():
            on_front = {p.trial for p in found.front.points}
            for result in found.results:
                record = result.to_json()
                flat = {k: v for k, v in record.items() if not isinstance(v, dict | list | tuple)}
                asked = record["asked"]
                # A notebook is passed on with what it shows.
                flat["reason"] = publishable(flat["reason"])
                flat = {"device": name, "trial": result.trial, **asked, **flat}
                rows.append({**flat, "speedup_ci": result.speedup_ci, "pareto": result.trial in on_front})
        return _frame(rows).drop(columns="format_version")

    def references(self, devices: Sequence[str] | str | None = None) -> pd.DataFrame:
        """What the study file asks to compare with, as far as it is known.

        Raises:
            SearchError: there is no front yet.
        """
        found = self._found(devices)
        return _frame({"device": name, **r} for name, f in found.items() for r in f.document["references"])

    def figures(self, device: str) -> dict[str, Figure]:
        """The device's figures as Plotly objects: front, hypervolume, beta_ratio_accuracy, ...

        Raises:
            SearchError: there is no front yet.
        """
        return figures(self.file, self._shop, self._found(device)[device])

    def report(self, path: str | Path, devices: Sequence[str] | str | None = None) -> Path:
        """Write the report, one page that needs nothing else.

        Raises:
            SearchError: there is no front yet.
        """
        return write_study_report(self.file, self._found(devices), Path(path), devices=self._names(devices))

    def best(
        self,
        device: str,
        *,
        max_latency_ms: float | None = None,
        min_accuracy: float | None = None,
        trial: int | None = None,
    ) -> Any:
        """One model of the device's front, by limits or number; nothing said, its knee.

        Returns:
            For a detector an Ultralytics `YOLO`, else the pruned `nn.Module` in eval mode on the CPU.

        Raises:
            NoSuchPointError: no point of the front is within the limits.
            SearchError: there is no front yet, the study file is not what the trial ran under, or the trial's
                files cannot be had.
        """
        found = self._found(device)[device]
        chosen = found.front.choose(max_latency_ms=max_latency_ms, min_accuracy=min_accuracy, trial=trial)
        shop = self._shop
        check_conditions(shop, found)
        model, _ = restore(shop, trial_folder(self.file, found, chosen, shop.notice), chosen)
        if isinstance(self.file.model, ModelSection):
            return model
        from objectives.detection import as_yolo

        return as_yolo(shop.task, model)

    def export(self, device: str, out: str | Path | None = None, **choice: Any) -> Path:
        """Export one model of the device's front.

        Args:
            choice: as for `search.export.export_best`: max_latency_ms, min_accuracy, trial, also.

        Returns:
            The folder.

        Raises:
            NoSuchPointError: no point of the front is within the limits.
            SearchError: an artifact fails a check.
        """
        target = None if out is None else Path(out)
        return export_best(self.file, device, out=target, notice=self._shop.notice, **choice)

    @property
    def _shop(self) -> Shop:
        return Shop(self.file, Workspace(self.file.folder))

    def _names(self, devices: Sequence[str] | str | None) -> list[str]:
        if devices is None:
            return self.devices
        names = [devices] if isinstance(devices, str) else devices
        return [self.file.device(name).name for name in names]

    def _found(self, devices: Sequence[str] | str | None) -> dict[str, Found]:
        return fronts_of(self.file, self._names(devices))


def _setting(value: Any) -> str:
    """A value as YAML; a text is taken for YAML already, as on the command line."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows))
