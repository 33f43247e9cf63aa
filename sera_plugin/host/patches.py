"""What is replaced in the host's modules, for `rl: sera` alone; any other `rl` finds the host's.

Nothing else patches the host. Facts are of axolotl 0.19; each patch has the condition under which
it goes, and the closest request upstream.
"""

from functools import wraps
from typing import Any

import axolotl.train as host
import torch
from axolotl.loaders import model as host_model
from axolotl.utils.dict import DictDefault
from transformers.integrations import integration_utils

NO_FSDP = (
    "fsdp_config is set, but the host cannot shard the model here: it does so over several "
    "processes, each with a GPU of its own. Start as many as there are GPUs (`axolotl train "
    "config.yaml` does, its launcher being accelerate), or remove fsdp_version and fsdp_config."
)


def prepare_host(cfg: DictDefault) -> None:
    """Before the host sets up its trainer; may be called again.

    Raises:
        ValueError: where the host would fail to make a mesh for FSDP. It makes one of CUDA devices
            whatever there is. Goes when `build_parallelism_config` reads the accelerator's type;
            no request for that was found upstream.
    """
    if cfg.fsdp_config and not torch.cuda.is_available():
        try:
            host_model.build_parallelism_config(cfg)
        except (AttributeError, AssertionError, RuntimeError) as error:
            raise ValueError(NO_FSDP) from error
    reference, setup = host.setup_reference_model, host.setup_model_and_trainer
    if hasattr(setup, "_sera"):
        return

    @wraps(reference)
    def no_reference(cfg: DictDefault, *args: Any, **kwargs: Any) -> Any:
        """Load no reference model beside the policy: our reference is data.

        The host loads the model a second time for full fine-tuning before any trainer exists. Goes
        when it honours `precompute_ref_log_probs` there, as TRL does since huggingface/trl#5542.
        """
        return None if cfg.get("sera") else reference(cfg, *args, **kwargs)

    @wraps(setup)
    def trained_model(cfg: DictDefault, *args: Any, **kwargs: Any) -> Any:
        """Let the host go on, save at the end and on Ctrl-C with the model that was trained.

        The host keeps the base model that it loaded, although TRL has put an adapter around it:
        what it saves is the base model under the adapter's names, beside the adapter. With tied
        weights in `lora_modules_to_save` that fails, and under FSDP nothing else is saved. Goes
        when `setup_model_and_trainer` returns `trainer.model`; axolotl-ai-cloud/axolotl#1304 and
        #1592 were of the same save.
        """
        trainer, model, *others = setup(cfg, *args, **kwargs)
        return (trainer, trainer.model if cfg.get("sera") else model, *others)

    rewrite = integration_utils.rewrite_logs

    @wraps(rewrite)
    def own_group(logs: dict[str, Any]) -> dict[str, Any]:
        """Leave SeRA's figures their names: boards group by what stands before the first slash.

        W&B, TensorBoard and Trackio get them as `train/sera/...`, some sixty among loss and
        learning rate. Goes when the host leaves names with a group of their own as they are.
        """
        ours = {name: value for name, value in logs.items() if name.startswith("sera/")}
        others = {name: value for name, value in logs.items() if name not in ours}
        return rewrite(others) | ours

    integration_utils.rewrite_logs = own_group
    trained_model._sera = True  # type: ignore[attr-defined]
    host.setup_reference_model, host.setup_model_and_trainer = no_reference, trained_model
