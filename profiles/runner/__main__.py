"""The runner's loop over stdin and stdout."""

from __future__ import annotations

import json
import os
import sys

from .child import serve_child
from .requests import answer


def main() -> None:
    # Libraries print to file descriptor 1 as they please; the protocol keeps a copy of it for itself.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if "--child" in sys.argv:
        serve_child(sys.stdin, out)
        return
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
