"""How a command ends: what went wrong becomes an exit status and a few lines.

0 done, 1 the run failed, 2 the input is wrong, 130 interrupted. No traceback unless somebody is debugging.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console


def guarded(run: Callable[[], Any], err: Console, *, is_debugging: Callable[[], bool]) -> int:
    """Run a command; its exit status.

    Args:
        err: where it is said what went wrong.
        is_debugging: asked only then, since the command line sets it.
    """
    try:
        code = run()
    except (KeyboardInterrupt, typer.Abort):
        err.print("stopped; the same command goes on from here")
        return 130
    except typer.Exit as stop:
        return int(stop.exit_code)
    except Exception as error:
        # A wrong command line; Typer's own class is private.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return 2
        if is_debugging():
            err.print_exception()
        if isinstance(error, _input_errors()):
            say(err, str(error) or type(error).__name__)
            return 2
        say(err, f"failed: {error or type(error).__name__}")
        if not is_debugging() and not isinstance(error, _run_errors()):
            err.print("run again with paretoprune --debug for the traceback", style="dim")
        return 1
    return code if isinstance(code, int) else 0


def say(err: Console, text: str) -> None:
    """Print a line on what went wrong, as it is."""
    err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _run_errors() -> tuple[type[Exception], ...]:
    """What says all there is to say; a traceback would add nothing."""
    from profiles.connection import DeviceError

    from .storage import SearchError

    return (SearchError, DeviceError)


def _input_errors() -> tuple[type[Exception], ...]:
    """What says that the input is wrong, not the run."""
    from .front import NoSuchPointError
    from .studyfile import StudyFileError
    from .tracking import TrackingError

    return (StudyFileError, NoSuchPointError, TrackingError)
