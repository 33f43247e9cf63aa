"""Calls a Python function for another process: `python worker.py SPEC`, requests on descriptor 1.

That is a socket: a line of JSON comes in for each answer, and one goes out. What the function
prints goes to standard error. Imports nothing but the standard library.
"""

import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def load(spec: str) -> Callable[..., Any]:
    """The function that `file.py:function` or `module:function` names."""
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        # What stands beside a file can be imported, as from a script.
        sys.path.insert(0, str(Path(place).absolute().parent))
        made = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert made is not None
        assert made.loader is not None
        module = importlib.util.module_from_spec(made)
        sys.modules[made.name] = module
        made.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise LookupError("it is no function of that file or module")
    return function


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """What it takes behind question and answer: names that it `needs`, `takes`, or `any`."""
    found: dict[str, Any] = {"first": [], "needs": [], "takes": [], "any": False}
    try:
        every = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a built-in function nothing is known
        return found
    first = [one for one in every if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(first) < 2 and not any(one.kind is one.VAR_POSITIONAL for one in every):
        what = "a question (of a check: the prompt's row) and an answer to it"
        raise LookupError(f"it has to take two arguments: {what}")
    found["first"] = [one.name for one in first[:2]]
    for one in every:
        if one.kind is one.VAR_KEYWORD:
            found["any"] = True
        elif one not in first[:2] and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            found["needs" if one.default is one.empty else "takes"].append(one.name)
    return found


def call(function: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """Its score of an answer, or what was wrong."""
    try:
        value = function(request["question"], request["answer"], **request["columns"])
        if value is None:
            return {"score": None}
        if isinstance(value, (str, bytes)):
            return {"problem": f"returned {value!r:.80}"}
        score = float(value)
    except BaseException as error:  # also of `sys.exit`, and whatever a library raises
        return {"problem": f"raised {type(error).__name__}: {error!s:.300}"}
    return {"score": score} if math.isfinite(score) else {"problem": f"returned {score}"}


def serve(spec: str) -> None:
    """Answer requests until there are no more."""
    with os.fdopen(os.dup(1), "rb") as requests, os.fdopen(os.dup(1), "wb", 0) as replies:
        os.dup2(2, 1)

        def reply(found: dict[str, Any]) -> None:
            replies.write(json.dumps(found).encode() + b"\n")

        try:
            function = load(spec)
            reply(parameters(function))
        except BaseException as error:  # whatever the code does while it is imported
            return reply({"problem": f"{type(error).__name__}: {error!s:.500}"})
        ours = os.getpid()
        for line in requests:
            found = call(function, json.loads(line))
            if os.getpid() != ours:  # a fork that has left the call: two would answer
                os._exit(0)
            reply(found)


if __name__ == "__main__":
    with suppress(ConnectionError):
        serve(sys.argv[1])
