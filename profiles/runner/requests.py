"""What a runner can be asked, and how it answers.

Requests (`do`): `hello` (import a runtime), `facts`, `round` (samples of one or more models in turns, and
of single operators); on a remote device also `take` and `free` (have the machine to oneself, as the one
that asks has its own by `lock.host_lock`) and `find`, `store`, `keep` (model files).
Answers: `{"id", "ok": true, "result"}` or `{"id", "ok": false, "kind": "missing" | "failed" | "crash",
"error"}`; to `take`, any number of `{"id", "waiting": true}` ahead of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from .child import CAN_FORK, Child, ChildCrashError, describe_error
from .files import do_find, do_keep, do_store
from .host import MachineLock
from .machine import busy_shares, choose_cpus, machine_facts
from .session_torch import keep_memory
from .sessions import MissingRuntimeError, import_runtime, read_ahead

#: Writes one line to who asks.
Say = Callable[[dict[str, Any]], None]
#: Held between `take` and `free`.
machine = MachineLock()


def do_hello(request: dict[str, Any]) -> dict[str, Any]:
    """Set what runtimes read when they are imported, then import."""
    threads = str(request["threads"])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = threads
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's own pool is not what gets measured.
    if request["runtime"] == "torch":
        keep_memory()
    return {"version": import_runtime(request["runtime"]), "pid": os.getpid()}


def do_facts(request: dict[str, Any]) -> dict[str, Any]:
    return machine_facts(request)


def do_take(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Keep others of ours from working on this machine until `free`.

    Request: `announce_s`, how often to say that it waits for them.
    """
    if not machine.is_taken:
        machine.take(True, lambda: say({"id": request["id"], "waiting": True}), request["announce_s"])
    return {}


def do_free(request: dict[str, Any]) -> dict[str, Any]:
    machine.free()
    return {}


def do_round(request: dict[str, Any]) -> dict[str, Any]:
    """One fresh process per model, warmed up, then blocks in turns A B B A ...; those not running are
    stopped.

    Request: `specs` (one or more), `first` (which of them starts), `turns` (at most), `block_s`, `round_s`,
    `longest_s` (of a round whose models took long to open), `timeout_s`; where operators are wanted too,
    `profile` with `of` (indices of specs), `repeats`, `warmup`.
    Result: `blocks`, a list of `[index, [samples in ms]]` in order of time, `warmup`, runs before them, and
    `nodes`, the operators of each profiled model, taken after the last block.
    """
    # All on the same CPUs, chosen anew each round: no model may owe its time to where it was put.
    cpus = choose_cpus(request["specs"][0]["threads"], busy_shares())
    specs, timeout_s = [{**spec, "cpus": cpus} for spec in request["specs"]], request["timeout_s"]
    order = [(request["first"] + i) % len(specs) for i in range(len(specs))]
    for spec in specs if CAN_FORK else ():
        read_ahead(spec)
    children: dict[int, Child] = {}
    blocks: list[tuple[int, list[float]]] = []
    try:
        loaded: dict[int, dict[str, Any]] = {}
        start = time.perf_counter()
        for index in order:
            children[index] = Child([fd for other in children.values() for fd in other.fds])
            loaded[index] = children[index].ask({"do": "load", "spec": specs[index]}, timeout_s)
            children[index].pause()
        # Where models take long to open, sampling that long as well costs little and tells much more.
        round_s = max(request["round_s"], min(time.perf_counter() - start, request["longest_s"]))
        typical = [entry["typical_ms"] for entry in loaded.values()]
        turns, runs = _round_plan(typical, round_s, request["block_s"], request["turns"])
        for turn in range(turns):
            for index in order if turn % 2 == 0 else order[::-1]:
                children[index].resume()
                typical_ms = loaded[index]["typical_ms"]
                block = {
                    "do": "block",
                    "runs": runs[order.index(index)],
                    "settle": 1 if typical_ms > 15 else 2,
                }
                blocks.append((index, children[index].ask(block, timeout_s)))
                children[index].pause()
        wanted = request.get("profile") or {"of": []}
        nodes = []
        for index in wanted["of"]:
            children[index].resume()
            ask = {"do": "profile", "repeats": wanted["repeats"], "warmup": wanted["warmup"]}
            nodes.append(children[index].ask(ask, timeout_s))
            children[index].pause()
        warmup = min(entry["warmup"] for entry in loaded.values())
        return {"blocks": blocks, "warmup": warmup, "nodes": nodes}
    finally:
        for child in children.values():
            child.close()


def _round_plan(typical_ms: list[float], round_s: float, block_s: float, most: int) -> tuple[int, list[int]]:
    """How many turns, `most` at most, and how many inferences each model has in one."""
    runs = [max(3, min(50, round(block_s * 1e3 / max(ms, 1e-3)))) for ms in typical_ms]
    turn_s = sum(n * ms for n, ms in zip(runs, typical_ms)) / 1e3
    turns = max(2, min(most, int(round_s / max(turn_s, 1e-6))))
    return turns - turns % 2, runs  # An even count, so that each one starts as many turns as it ends.


REQUESTS = {
    "hello": do_hello,
    "facts": do_facts,
    "round": do_round,
    "free": do_free,
    "find": do_find,
    "store": do_store,
    "keep": do_keep,
}


def answer(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Carry out one request; a failure of any kind becomes an answer.

    Args:
        say: takes a line ahead of the answer.
    """
    try:
        do = request["do"]
        result = do_take(request, say) if do == "take" else REQUESTS[do](request)
        return {"id": request.get("id"), "ok": True, "result": result}
    except MissingRuntimeError as error:
        return {"id": request.get("id"), "ok": False, "kind": "missing", "error": str(error)}
    except ChildCrashError as error:
        return {"id": request.get("id"), "ok": False, "kind": "crash", "error": str(error)}
    except Exception as error:
        return {
            "id": request.get("id"),
            "ok": False,
            "kind": "failed",
            "error": describe_error(error),
        }
