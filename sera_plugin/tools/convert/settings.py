"""A LLaMA-Factory YAML: its values, and LLaMA-Factory's own names, of which some become nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted

#: LLaMA-Factory's defaults, and those of the trainer under it, where the host's differ.
DEFAULTS: dict[str, Any] = {
    "stage": "sft", "finetuning_type": "lora", "cutoff_len": 2048, "dataset_dir": "data",
    "pref_beta": 0.1, "pref_loss": "sigmoid", "simpo_gamma": 0.5,
    "lora_rank": 8, "lora_dropout": 0.0, "lora_target": "all",
    "freeze_trainable_layers": 2, "freeze_trainable_modules": "all",
    "quantization_method": "bnb", "quantization_type": "nf4", "double_quantization": True,
    "num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5, "lr_scheduler_type": "linear", "optim": "adamw_torch", "seed": 42,
    "use_reentrant_gc": True, "logging_steps": 500, "save_strategy": "steps", "save_steps": 500,
}  # fmt: skip

_NO_SYSTEM = "It takes no system message; LLaMA-Factory puts one before the first turn."
_LATE_SYSTEM = "A system message goes before the last turn, not the first."

#: `flash_attn` here and there.
ATTENTION = {
    **{"auto": None, "disabled": "eager", "sdpa": "sdpa"},
    **{"fa2": "flash_attention_2", "fa3": "flash_attention_3"},
}
#: template -> (chat_template, what differs). Those that say nothing render the same conversation
#: as the same text, white space around a message aside (the host's Llama 3 and Gemma trim it).
TEMPLATES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("chatml", "yi", "smollm", "qwen3_nothink"), ("chatml", "")),
    "qwen": ("qwen_25", ""),
    **{name: (name, "") for name in ("falcon_h1", "llama3", "llama4")},
    "phi": ("phi_35", ""),
    **dict.fromkeys(("gemma", "gemma2"), ("gemma", _NO_SYSTEM)),
    "gemma3": ("gemma3", ""),
    "ministral": ("mistral_v3_tekken", _LATE_SYSTEM),
    "mistral": ("mistral_v2v3", _LATE_SYSTEM),
}

#: Where the name says nothing to the host: the one that the model was made with.
OWN_TEMPLATE = "tokenizer_default"

#: Columns where `dataset_info.json` names none, roles where its `tags` do not.
COLUMNS = {"prompt": "instruction", "query": "input", "messages": "conversations"}
TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "system_tag": "system", "observation_tag": "observation", "function_tag": "function_call",
}  # fmt: skip
#: Keys of `dataset_info.json` that become nothing, and what to do.
DATASET_KEYS = {
    "tools": "Descriptions of tools do not come into the prompts.",
    "folder": "Put the files' names into `data_files`.",
    "num_samples": "To take the first N rows write `split: train[:N]`.",
}
#: Keys that become nothing, or patterns of them, separated by spaces; and why.
LEFT_OUT: dict[str, str] = {
    "do_train": "`axolotl train` trains.",
    "do_eval": "`axolotl sera eval` evaluates a trained model.",
    "do_predict eval_num_beams predict_with_generate generation_* infer_* export_* sglang_* "
    "do_sample top_k num_beams max_length repetition_penalty length_penalty "
    "skip_special_tokens use_kv_cache offload_folder":
        "it is for generation, inference or export, not for this training.",
    "trust_remote_code":
        "it would run code of the model's repository. Add it only if the model needs that.",
    "fsdp*": "FSDP2's keys have other names in the host: docs/many-gpus.md.",
    "max_steps": "rl: sera trains whole epochs.",
    "streaming": "rl: sera scores the whole dataset every iteration.",
    "buffer_size": "it is for streaming.",
    "mix_strategy": "datasets are concatenated and shuffled, as with concat.",
    "interleave_probs": "datasets are concatenated and shuffled.",
    "packing neat_packing": "preference pairs are not packed.",
    "overwrite_cache": "data is prepared anew when it, or what prepares it, has changed.",
    "preprocessing_batch_size": "the host has no such size.",
    "tokenized_path": "the host keeps what it has prepared in `dataset_prepared_path`.",
    "plot_loss": "`axolotl sera report` has the curves.",
    "cache_dir": "set HF_HOME instead.",
    "metric_for_best_model greater_is_better early_stopping_steps":
        "the host has it for supervised fine-tuning only; `keep: best` in `sera:` leaves the "
        "policy that is best on the held-out pairs.",
    "save_only_model": "a run that is cut off continues from whole checkpoints.",
    "ref_model*":
        "the reference is the policy that an iteration starts from, or with `reference: initial` "
        "in `sera:` the model itself.",
    "pref_bco_weight": "rl: sera has no loss with BCO's.",
    "ld_alpha": "rl: sera has no LD-DPO.",
    "kto_*": "it is for KTO.",
    "ppo_*": "it is for PPO.",
    "reward_model*": "it is for PPO; one that ranks SeRA's samples is sera.reward_model.",
    "default_system":
        "put the system message into the data, or into a template of your own "
        "(`chat_template_jinja`).",
    "enable_thinking": "the host's template decides; `chat_template_kwargs` takes enable_thinking.",
    "tool_format": "tool calls are rendered by the chat template.",
    "train_on_prompt": "DPO never does.",
    "mask_history": "DPO trains the last answer only.",
    "ignore_pad_token_for_loss": "padding never counts.",
    "rope_scaling": "write it into `overrides_of_model_config`.",
    "resize_vocab": "the host grows the embeddings when tokens are added.",
    "upcast_*": "log-probabilities are in float32; nothing else is upcast.",
    "train_from_scratch": "preference tuning starts from a trained model.",
    "low_cpu_mem_usage": "the host loads so by itself.",
    "split_special_tokens": "special tokens stay whole.",
    "init_special_tokens new_special_tokens_config use_unsloth* use_v1_kernels shift_attn "
    "mixture_of_depths use_llama_pro fp8* quantization_device_map use_apollo apollo_* "
    "use_badam badam_* use_adam_mini use_mca use_kt kt_*":
        "there is nothing like it in the host's preference training.",
    "enable_liger_kernel":
        "add axolotl.integrations.liger.LigerPlugin to `plugins` with liger_rope, liger_rms_norm "
        "and liger_glu_activation.",
    "moe_aux_loss_coef": "write router_aux_loss_coef into `overrides_of_model_config`.",
    "pissa_*": "LLaMA-Factory refuses it for DPO too.",
    "oft_* module_dropout": "it is for OFT.",
    "use_galore galore_*": "the host has it as an `optimizer`.",
    "use_muon": "the host has it as `optimizer: muon`.",
    "use_swanlab swanlab_*": "add axolotl.integrations.swanlab.SwanLabPlugin to `plugins`.",
    "use_dft_loss": "it is for supervised fine-tuning.",
    "freeze_vision_tower freeze_multi_modal_projector freeze_language_model media_dir "
    "image_* video_* audio_* use_audio_in_video crop_to_patches":
        "it is for images, sound and video; rl: sera trains on text.",
    "compute_accuracy": "the trackers have rewards/accuracies and sera/held_out/accuracy.",
    "disable_shuffling": "every iteration draws an order of its own from `seed`.",
    "data_seed": "`seed` is for the data too.",
    "group_by_length": "the host has it for supervised fine-tuning only.",
    "neftune_noise_alpha": "noise would make the policy differ from its own reference.",
    "include_*": "summary.json has tokens and seconds.",
    "print_param_status": "the host logs what it trains.",
    "remove_unused_columns label_names": "it is decided by the trainer.",
    "push_to_hub": "`hub_model_id` alone pushes.",
    "*_token": "log in with `hf auth login` instead; do not put it into a YAML.",
    "*_api_key": "set it in the environment; do not put it into a YAML.",
    "logging_dir": "the host puts tensorboard's files into `output_dir`.",
    "logging_strategy logging_first_step": "the host logs by `logging_steps`.",
    "disable_tqdm": "bars are for terminals only.",
    "ddp_find_unused_parameters": "the host decides it by the model.",
    "ray_* resources_per_worker placement_strategy": "the host has "
    "keys of its own: `use_ray`, `ray_num_workers`, `resources_per_worker` (many-gpus.md).",
    "adapter_folder": "put the folder into adapter_name_or_path.",
    "eval_on_each_dataset": "held-out pairs are evaluated together.",
    "per_gpu_*": "its name of today is per_device_...",
    "vllm_*": "it is for inference; SeRA samples with the keys of `sera:` and `vllm:`.",
    "temperature": "SeRA samples with sera.temperature.",
    "top_p": "SeRA samples with sera.top_p.",
    "max_new_tokens": "SeRA samples up to sera.max_new_tokens.",
}  # fmt: skip


@dataclass
class Settings:
    """A conversion under way: the YAML that is read, and what has become of it so far."""

    given: Mapping[str, Any]
    #: Where the new one will go, None if nowhere.
    output: Path | None = None
    #: Its keys, in order.
    out: dict[str, Any] = field(default_factory=dict)
    #: The given keys that have become something, and those that become nothing -> why.
    read: dict[str, None] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    #: What a reader should know, a sentence or two each.
    notes: list[str] = field(default_factory=list)
    #: Files to be written beside the new one -> their rows.
    rows: dict[Path, list[Any]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the YAML sets a key to something else than null."""
        return self.given.get(name) is not None

    def lose(self, name: str, why: str) -> None:
        """A key becomes nothing, and this is why; nothing is said of one that is not there."""
        if self.has(name):
            self.lost[name] = why

    def value(self, name: str) -> Any:
        """What LLaMA-Factory would use: the YAML's value, else its default, else None.

        The methods below read it as a kind of value, and raise ValueError where it is another.
        """
        self.read[name] = None
        return self.given[name] if self.has(name) else DEFAULTS.get(name)

    def text(self, name: str) -> str | None:
        value = self.value(name)
        if isinstance(value, Mapping | list):
            raise ValueError(f"{name}: {quoted(value)} is not text")
        return None if value is None else str(value)

    def texts(self, name: str) -> list[str]:
        """Several things, separated by commas or as a list."""
        value = self.value(name)
        parts = value if isinstance(value, list) else str(value or "").split(",")
        return [str(part).strip() for part in parts if str(part).strip()]

    def number(self, name: str) -> float | None:
        """5e-6 is text to YAML 1.1, and a number here."""
        value = self.value(name)
        if value is None:
            return None
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name}: {quoted(value)} is not a number")
        return value if isinstance(value, int) else number

    def whole(self, name: str) -> int | None:
        number = self.number(name)
        if number is not None and not float(number).is_integer():
            raise ValueError(f"{name}: {quoted(self.given.get(name))} is not a whole number")
        return None if number is None else int(number)

    def switch(self, name: str) -> bool | None:
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(f"{name}: {quoted(value)} is neither true nor false")
