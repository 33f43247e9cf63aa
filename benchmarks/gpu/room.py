"""Room for an engine on the device of a training run: made, taken by a stand-in, and given back."""

import gc
import subprocess
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.harness import Setup
from benchmarks.workload import make_model
from sera_plugin.model.policies import never_repack
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.sampling.offload import make_room, resident_tensors
from sera_plugin.sampling.vllm import Memory

#: A process that takes bytes of the device and holds them for a while, then ends.
_ENGINE = """
import sys, time, torch
taken = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
print(*torch.cuda.mem_get_info(), flush=True)
time.sleep(1.0)
"""
#: Of CUDA's context and libraries in the process of the stand-in, bytes.
_CONTEXT = 2**30
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
_BASES = {"full": None, "nf4": NF4, "int8": {"load_in_8bit": True}}


def room(setup: Setup) -> dict[str, Any]:
    """Free memory before, inside and after, for a whole model and adapters on quantised ones.

    ValueError if weights, optimizer state or what the model computes are not the same bits
    afterwards, or if memory of the device is not free that a stand-in for an engine was promised.
    """
    found, problems = {}, []
    for name, kind in _BASES.items():
        try:
            found[name] = given_back(setup, kind)
        except (RuntimeError, ValueError) as error:
            problems.append(f"{name}: {error}")
        else:
            print(f"round 1/1: {name}: {found[name]}", flush=True)
    if problems:
        raise ValueError("; ".join(problems))
    return found


def given_back(setup: Setup, kind: dict[str, Any] | None) -> dict[str, Any]:
    model, optimizer, inputs = stepped(setup, kind)
    said, kept = outputs(model, inputs), copies(model, optimizer)
    free = [free_bytes(setup)]
    figures: dict[str, Any] = {
        "resident_gib": gib(sum(each.nbytes for each in resident_tensors(model, optimizer))),
        "held_by_others": held_by_others(model, optimizer),
    }
    with room_made(setup, model, optimizer) as memory:
        free.append(free_bytes(setup))
        if setup.device == "cuda":
            figures["still_there_gib"] = gib(torch.cuda.memory_allocated())
        figures["memory"] = [memory.utilization, memory.whole_fits, *memory.devices]
        figures["engine"] = engine(memory)
        begun = time.perf_counter()
    figures["back_after_s"] = round(time.perf_counter() - begun, 2)
    free.append(free_bytes(setup))
    figures["free_gib"] = [gib(each) for each in free]
    again = copies(model, optimizer)
    changed = sum(not torch.equal(*each) for each in zip(kept, again, strict=True))
    figures |= {"tensors": len(kept), "changed": changed}
    figures["same_output"] = torch.equal(said, outputs(model, inputs))
    if changed or not figures["same_output"]:
        raise ValueError(f"it did not come back as it was: {figures}")
    return figures


def stepped(setup: Setup, kind: dict[str, Any] | None) -> tuple[Any, Any, Tensor]:
    """A model after one step of its optimizer, whose state is then there; and token ids."""
    how: dict[str, Any] = {}
    if kind:
        how["quantization_config"] = BitsAndBytesConfig(
            **kind, bnb_4bit_compute_dtype=torch.bfloat16
        )
    place = {"": 0 if setup.device == "cuda" else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        make_model(setup), dtype=torch.bfloat16, device_map=place, **how
    )
    never_repack(model)  # on a CPU, where this is tried out
    if kind:
        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    inputs = torch.arange(4, 68, device=setup.device).view(2, 32)
    model.train()(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval(), optimizer, inputs


@torch.no_grad()
def outputs(model: Any, inputs: Tensor) -> Tensor:
    return model(input_ids=inputs).logits.cpu()


def held_by_others(model: Any, optimizer: Any) -> int:
    """Bytes of what is resident that other tensors hold too: they stay on the device."""
    resident = resident_tensors(model, optimizer)
    names = {id(each) for each in resident}
    places = {each.untyped_storage().data_ptr(): each.nbytes for each in resident}
    tensors = (each for each in gc.get_objects() if isinstance(each, Tensor))
    others = {each.untyped_storage().data_ptr() for each in tensors if id(each) not in names}
    return sum(places[place] for place in places.keys() & others)


def copies(model: Any, optimizer: Any) -> list[Tensor]:
    """The bytes of all that a run keeps on its device."""
    return [
        each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()
        for each in resident_tensors(model, optimizer)
    ]


def room_made(setup: Setup, model: Any, optimizer: Any) -> Any:
    """`make_room` for an engine that does not fit beside the run: of all but half of its size."""
    options: dict[str, Any] = {}
    if setup.device == "cuda":
        free, total = _info()
        resident = sum(each.nbytes for each in resident_tensors(model, optimizer) if each.is_cuda)
        options = {"gpu_memory_utilization": (free + resident // 2) / total}
    return made(model, optimizer, options, 1024)


def made(model: Any, optimizer: Any, options: dict[str, Any], length: int) -> Any:
    """`make_room` of a run with one process; `options` is the host's `vllm:` block."""
    return make_room(model, model.device, optimizer, 2, options, Ranks(), length)


def engine(memory: Memory) -> dict[str, Any] | str:
    """What a process found that took the memory it was promised; RuntimeError if it could not."""
    if memory.utilization is None:
        return "left out: a CPU's engine is promised no share of a device"
    _, total = _info()
    size = int(memory.utilization * total) - _CONTEXT
    done = subprocess.run(
        [sys.executable, "-c", _ENGINE, str(size)], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise RuntimeError(f"the stand-in for an engine failed: {done.stderr[-500:]}")
    free, _ = map(int, done.stdout.split())
    return {"took_gib": gib(size), "then_free_gib": gib(free)}


def _info() -> tuple[int, int]:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()


def free_bytes(setup: Setup) -> int | None:
    return _info()[0] if setup.device == "cuda" else None


def gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)
