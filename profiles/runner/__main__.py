"""The runner's loop over stdin and stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator

from .child import serve_child
from .requests import answer


def main() -> None:
    # Libraries print to file descriptor 1 as they please; the protocol keeps a copy of it for itself.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if "--child" in sys.argv:
        serve_child(sys.stdin, out)
        return
    for line in _requests():
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()


def _requests() -> Iterator[str]:
    """Lines of stdin; a remote runner that waits for one too long is ended, for its line may be dead."""
    idle_s = int(os.environ.get("PARETOPRUNE_RUNNER_IDLE_S", "0")) if hasattr(signal, "alarm") else 0
    while True:
        if idle_s:
            signal.alarm(idle_s)
        line = sys.stdin.readline()
        if idle_s:
            signal.alarm(0)
        if not line:
            return
        yield line


if __name__ == "__main__":
    main()
