"""The worker: vLLM in a process of its own, for as long as one phase of sampling takes.

This file runs under the interpreter in `sera.vllm_python`, in an environment that need not have
this package: it imports vllm and the standard library only. It reads its job as one line of JSON
and answers with one JSON object per line: `ready` (what was started), `chunk` (prompts finished
since the last one, perhaps none: a sign of life), `done`, or `error`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

#: Prompts given to the engine at a time, beyond what it runs at once.
WINDOW = 1024
#: A chunk is sent when it has this many prompts, or is this many seconds old.
CHUNK_PROMPTS, CHUNK_SECONDS = 64, 5.0
#: Seconds between asking a process group to end and killing it.
GRACE = 10.0


def guard(output: int) -> None:
    """End this process group when standard input closes, however that happens.

    A process of its own, because a thread would wait for a hung engine to let go of the
    interpreter's lock. The trainer holds the other end; when it is killed, the system closes it.
    """
    group = os.getpgid(0)
    if os.fork():
        return
    os.close(output)
    os.setpgid(0, 0)
    while os.read(0, 1):
        pass
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(group, number)
            until = time.monotonic() + GRACE
            while time.monotonic() < until:
                os.killpg(group, 0)  # raises once nobody is left
                time.sleep(0.1)
    except ProcessLookupError:
        pass
    os._exit(0)


def serves_four_bit() -> bool:
    """Whether this vLLM quantises a model with bitsandbytes while it loads."""
    import importlib.util

    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # from 0.28 on it comes in a package of its own
    return (
        "bitsandbytes" in QUANTIZATION_METHODS
        and current_platform.is_cuda_alike()
        and importlib.util.find_spec("bitsandbytes") is not None
    )


def start_engine(job: dict[str, Any]) -> tuple[Any, str, str]:
    """The engine, the format its weights are in, and vLLM's version.

    Raises:
        RuntimeError: if this vLLM cannot load the model as it was trained, or lacks an option.
    """
    import dataclasses

    from vllm import EngineArgs, LLMEngine, __version__

    options = dict(job["engine"])
    weights = options["dtype"]
    if job["quantized"]:
        if job["quantized"] == "nf4" and serves_four_bit():
            options["quantization"] = "bitsandbytes"
            weights = "bitsandbytes nf4"
        elif not job["whole_fits"]:
            raise RuntimeError(
                f"this vLLM ({__version__}) cannot load the base model in {job['quantized']}, and "
                f"in {weights} it does not fit into the memory that is free. Install vLLM's "
                "bitsandbytes plugin package into its environment, or set sera.sampler to "
                "transformers or vllm-server"
            )
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    missing = sorted(options.keys() - known)
    if missing:
        raise RuntimeError(
            f"this vLLM ({__version__}) does not know the option {', '.join(missing)}; use a newer "
            "one (docs/sampling.md lists versions)"
        )
    return LLMEngine.from_engine_args(EngineArgs(**options)), weights, __version__


def run(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Start, sample every prompt, and send what is finished."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    engine, weights, version = start_engine(job)
    adapter = LoRARequest("policy", 1, job["adapter"]) if job["adapter"] else None
    send({"ready": {"version": version, "weights": weights}})
    waiting = list(reversed(job["prompts"]))
    running = 0
    chunk: list[Any] = []
    last_sent = time.monotonic()
    while waiting or running:
        while waiting and running < WINDOW:
            row, token_ids, limit, seed = waiting.pop()
            params = SamplingParams(
                **job["sampling"],
                max_tokens=limit,
                seed=seed,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(
                str(row), {"prompt_token_ids": token_ids}, params, lora_request=adapter
            )
            running += 1
        for output in engine.step():
            running -= 1
            candidates = [
                {
                    "index": one.index,
                    "token_ids": list(one.token_ids),
                    "finish_reason": one.finish_reason,
                }
                for one in output.outputs
            ]
            chunk.append([int(output.request_id), candidates])
        now = time.monotonic()
        if len(chunk) >= CHUNK_PROMPTS or now - last_sent > CHUNK_SECONDS:
            send({"chunk": chunk})
            chunk, last_sent = [], now
    if chunk:
        send({"chunk": chunk})
    send({"done": True})


def main() -> None:
    # The directory of this file has modules named like packages that vLLM imports.
    sys.path.pop(0)
    job = json.loads(sys.stdin.buffer.readline())
    output = os.dup(1)
    os.dup2(2, 1)  # what vLLM prints goes to the log
    guard(output)

    def send(message: dict[str, Any]) -> None:
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        while data:
            data = data[os.write(output, data) :]

    try:
        run(job, send)
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
