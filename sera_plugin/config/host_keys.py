"""What SeRA does with keys that are the host's; docs/configuration.md is generated from it."""

from sera_plugin.config.kinds import LOSSES

#: Keys of the host's, separated by commas, and what SeRA does with them, in Markdown.
HOST_KEYS = {
    "num_epochs": "T, the number of iterations; a whole number. 3 unless set.",
    "rl_beta, trl.beta": "beta of the loss. Unless set, the paper's: "
    + ", ".join(f"{kind.beta:g} for {name}" for name, kind in LOSSES.items())
    + " (SimPO, KTO-Pair and ORPO: those of their own papers).",
    "dpo_label_smoothing": "Share of labels taken to be wrong: cDPO with `loss: dpo`, rDPO with "
    "`loss: robust`.",
    "dpo_loss_type, dpo_loss_weights, dpo_use_weighting": "Any loss type of the host's DPO trainer "
    "instead of `sera.loss`.",
    "simpo_gamma, cpo_alpha": "SimPO's target margin and NLL weight; 0 unless set.",
    "sequence_len": "Longest prompt + completion in tokens, for data and for samples.",
    "excess_length_strategy": "`drop` (default), `truncate` or `raise` for longer rows; see "
    "data.md.",
    "seed": "Seeds new adapters, held-out pairs, data order and samples. 42 unless set.",
    "lr_scheduler": "Of each iteration with `restart_optimizer: true`, else of the run; any but "
    "`reduce_lr_on_plateau` and `greedy`. A schedule of one step is constant.",
    "warmup_ratio, warmup_steps": "Its warm-up, at most all of its steps but one.",
    "val_set_size, test_datasets": "Held-out pairs, scored and referenced anew each iteration.",
    "vllm": "How vLLM samples: `gpu_memory_utilization` (unset: what is free), "
    "`tensor_parallel_size`, `dtype` (unset: as trained), `max_model_len` (unset: prompts + "
    "`max_new_tokens`), `enforce_eager`, `enable_prefix_caching`; for `vllm-server`, `host` and "
    "`port` of the one server, unless `sera.servers` has several. See sampling.md.",
    "gradient_accumulation_steps, gradient_checkpointing, optimizer": "As for any other `rl`: "
    "reentrant or not, 8-bit and paged optimizers too.",
    "dpo_padding_free": "`true`: a micro-batch is passed without padding, as one line. Needs flash "
    "attention; see install.md.",
    "dpo_use_liger_kernel": "Nothing more: SeRA's losses take their logits a part at a time "
    "already, which saves the memory that Liger's fused loss is for.",
    "activation_offloading": "`true` keeps activations in host memory (TRL's offloader, for "
    "accelerators only); `hidden_states` with reentrant checkpointing is the host's own.",
    "load_best_model_at_end, early_stopping_patience": "`true` is `sera.keep: best`, `false` is "
    "`last`. The patience is how many iterations in a row may bring no better policy before "
    "training ends: 2 unless set, 0 for no such end; a number implies `keep: best`. The host asks "
    "for `save_steps` and `eval_steps` beside it.",
    "lora_model_dir": "An adapter to continue; theta_0 is the base model with it.",
    "auto_resume_from_checkpoints, resume_from_checkpoint": "Continue the run in `output_dir` "
    "where it stopped.",
}
