"""What is replaced in the host's modules, for `rl: sera` alone; any other `rl` finds the host's.

Nothing else patches the host. Each has the condition under which it goes. They are made before the
host sets up its trainer (`SeraPlugin.load_datasets`) and may be made again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import axolotl.train as host
import torch
from axolotl.loaders import model as host_model
from axolotl.utils.dict import DictDefault

NO_FSDP = (
    "fsdp_config is set, but the host cannot shard the model here: it does so over several "
    "processes, each with a GPU of its own. Start as many as there are GPUs (`axolotl train "
    "config.yaml --launcher torchrun`), or remove fsdp_version and fsdp_config."
)


def prepare_host(cfg: DictDefault) -> None:
    """Everything below, before a training run.

    Raises:
        ValueError: where the host would fail to make a mesh for FSDP.
    """
    require_mesh(cfg)
    keep_one_model_loaded()
    hand_over_trained_model()


def require_mesh(cfg: DictDefault) -> None:
    """Refuse FSDP where the host would fail to make a mesh.

    axolotl 0.19 makes one of CUDA devices whatever there is, and without any fails in torch. Goes
    when `build_parallelism_config` reads the accelerator's type.

    Raises:
        ValueError: if it cannot.
    """
    if cfg.fsdp_config and not torch.cuda.is_available():
        try:
            host_model.build_parallelism_config(cfg)
        except (AttributeError, AssertionError, RuntimeError) as error:
            raise ValueError(NO_FSDP) from error


def keep_one_model_loaded() -> None:
    """Load no reference model beside the policy: our reference is data.

    axolotl 0.19 loads the model a second time for full fine-tuning before any trainer exists. Goes
    when it asks the trainer, or honours `precompute_ref_log_probs`.
    """

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def setup_reference_model(cfg: DictDefault, *args: Any, **kwargs: Any) -> Any:
            return None if cfg.get("sera") else original(cfg, *args, **kwargs)

        return setup_reference_model

    _replace("setup_reference_model", replacement)


def hand_over_trained_model() -> None:
    """Let the host go on, save at the end and on Ctrl-C with the model that was trained.

    axolotl 0.19 keeps the base model that it loaded, although TRL has put an adapter around it:
    what it saves is the base model under the adapter's names, beside the adapter. With tied weights
    in `lora_modules_to_save` that fails, and under FSDP nothing else is saved. Goes when
    `setup_model_and_trainer` returns `trainer.model`.
    """

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def setup_model_and_trainer(cfg: DictDefault, *args: Any, **kwargs: Any) -> Any:
            trainer, model, *others = original(cfg, *args, **kwargs)
            return (trainer, trainer.model if cfg.get("sera") else model, *others)

        return setup_model_and_trainer

    _replace("setup_model_and_trainer", replacement)


def _replace(name: str, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(host, name)
    if not hasattr(original, "_sera"):
        ours = wraps(original)(replacement(original))
        ours._sera = True  # type: ignore[attr-defined]
        setattr(host, name, ours)
