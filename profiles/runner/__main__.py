"""The runner's loop over stdin and stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from .child import serve_child
from .requests import answer, machine

#: A measurement's requests follow each other within a second.
HOLDING_IDLE_S = 60


def main() -> None:
    # Libraries print to file descriptor 1 as they please; the protocol keeps a copy of it for itself.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if "--child" in sys.argv:
        serve_child(sys.stdin, out)
        return

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    for line in _requests():
        say(answer(json.loads(line), say))


def _requests() -> Iterator[str]:
    """Lines of stdin; a remote runner that waits for one too long is ended, for its line may be dead. Sooner
    where it holds the machine, which others wait for.
    """
    idle_s = int(os.environ.get("PARETOPRUNE_RUNNER_IDLE_S", "0")) if hasattr(signal, "alarm") else 0
    while True:
        if idle_s:
            signal.alarm(min(idle_s, HOLDING_IDLE_S) if machine.is_taken else idle_s)
        line = sys.stdin.readline()
        if idle_s:
            signal.alarm(0)
        if not line:
            return
        yield line


if __name__ == "__main__":
    main()
