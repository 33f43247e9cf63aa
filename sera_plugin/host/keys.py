"""Keys of the host that mean nothing with `rl: sera`: refused, or named in a warning.

A key of neither table is honoured, by the host's preference training or by SeRA, and listed in
tests/host_keys.txt. What would change what is trained, on which data, or when it ends, is refused;
what changes no result is warned of. Facts are those of axolotl 0.19 and trl 1.9.
"""

from sera_plugin.host.given import Refusal

TRAINER = "sera_plugin.host.trainer.SeraTrainer"
WHOLE = "FULL_STATE_DICT"

_BEST = (
    "the host ignores it in preference training. Remove it; sera.keep: best leaves the policy that "
    "is best on the held-out pairs"
)
_OFFLOADING = (
    "under DPO the host has one offloader, to host memory. Set gradient_checkpointing: true and "
    "activation_offloading: true"
)
#: What is refused whatever its value and whatever else is set, unless it is off.
_NEVER = {
    "max_steps": "rl: sera needs whole epochs; remove max_steps and set num_epochs",
    "streaming": "rl: sera scores the whole dataset each iteration; remove streaming",
    "pretraining_dataset": "rl: sera needs preference pairs; use datasets",
    "sample_packing": "preference pairs cannot be packed; remove sample_packing",
    "rl_adapter_ref_model": "rl: sera keeps no reference model; remove {key}",
    "neftune_noise_alpha, noisy_embedding_alpha": "noise makes the policy differ from its own "
    "reference; remove {key}",
    "relora": "rl: sera snapshots one adapter per iteration; remove relora",
    "metric_for_best_model, greater_is_better": _BEST,
    "use_liger_kernel": "it is not a key of the host, which would drop it. Remove it; for Liger's "
    "layers use the plugin axolotl.integrations.liger.LigerPlugin with liger_rope, liger_rms_norm "
    "and liger_glu_activation",
    "layer_offloading": "the host offloads layers in its trainer for supervised fine-tuning only. "
    "Remove it; to save memory load the base in 4 bits (adapter: qlora), or set "
    "gradient_checkpointing: true",
    "deepcompile": "it compiles what rl: sera takes apart. Remove it",
    "dpo_beta": "it is an old name of rl_beta. Set rl_beta instead",
    "orpo_alpha": "ORPO's lambda is rl_beta here. Set rl_beta with sera.loss: orpo, or remove it",
    "kto_desirable_weight, kto_undesirable_weight": "sera.loss: kto_pair weighs both sides of a "
    "pair alike; remove {key}",
    "reward_model, process_reward_model": "it makes the host train a reward model. Remove {key}; "
    "one that ranks samples goes into the block: `sera: {{labeler: reward_model, reward_model: "
    "...}}`",
    "curriculum_sampling": "each iteration draws its own order. Remove it; sera.selection: "
    "curriculum trains easy pairs first",
    "min_sample_len, dataset_shard_num, dataset_shard_idx": "the host leaves rows out so in "
    "supervised fine-tuning only. Remove {key}; to take a part of a dataset write `split: "
    "train[:10%]`",
    "dataloader_drop_last": "every pair of an iteration is trained, those of a smaller last batch "
    "too. Remove it",
    "auto_find_batch_size": "the host tries smaller batches in supervised fine-tuning only. Remove "
    "it and set micro_batch_size; `axolotl sera plan` says what fits",
    "loss_watchdog_threshold": "the host watches the loss in supervised fine-tuning only. Remove "
    "it; rl: sera stops where the loss is not finite, and docs/alarms.md has what else is watched",
    "lisa_n_layers, lisa_step_interval, jagged_restart_steps, lr_quadratic_warmup, use_eaft, "
    "use_pose": "the host does that in supervised fine-tuning only. Remove {key}",
    "lr_div_factor": "nothing in the host reads it. Remove it; lr_scheduler_kwargs takes what a "
    "schedule has",
}
#: What does not work here, as docs/configuration.md has it.
REFUSALS = (
    *(Refusal(keys, remedy) for keys, remedy in _NEVER.items()),
    Refusal("save_strategy", f"{_BEST}. Set save_strategy: epoch", values="best"),
    Refusal(
        "trainer_cls",
        "rl: sera brings its own trainer; remove trainer_cls",
        lambda value, _: value not in (None, TRAINER),
    ),
    # would save no memory
    Refusal("gradient_checkpointing", _OFFLOADING, values="offload_disk"),
    Refusal(
        "activation_offloading",
        _OFFLOADING,
        # `hidden_states` is done by reentrant checkpointing itself, in any trainer
        lambda value, given: (
            isinstance(value, str)
            and not (
                value == "hidden_states"
                and given.get("gradient_checkpointing_kwargs.use_reentrant")
            )
        ),
        "legacy, disk",
    ),
    Refusal(
        "precompute_ref_log_probs",
        "rl: sera always has reference values as data, from the scoring that selection needs "
        "anyway. Remove it",
        values="false",
    ),
    Refusal(
        "float32",
        "the host takes its precision from bf16 and fp16 alone. Set bf16: false and fp16: false",
        lambda value, given: value and (given.get("bf16") is not False or given.get("fp16")),
        "true without bf16: false",
    ),
    # several devices
    Refusal(
        "context_parallel_size, sequence_parallel_degree, tensor_parallel_size, "
        "expert_parallel_size",
        "scoring needs whole sequences and layers on each rank; remove {key}",
        lambda value, _: str(value or 1) != "1",
        "above 1",
    ),
    Refusal(
        "fsdp_version",
        "FSDP1 flattens the weights that rl: sera takes snapshots of. Set fsdp_version: 2",
        lambda value, given: given.sharded and value not in (2, "2"),
        "1",
    ),
    Refusal(
        "fsdp_config.state_dict_type, fsdp_config.fsdp_state_dict_type, "
        "fsdp_config.final_state_dict_type, fsdp_config.fsdp_final_state_dict_type",
        f"a run continues from, and ends with, whole weights. Set it to {WHOLE}, or leave it out",
        lambda value, given: given.sharded and value not in (None, "", WHOLE),
    ),
    Refusal(
        "load_in_4bit, load_in_8bit",
        "with FSDP the host trains by preference only what is not quantised. Remove {key}, or "
        "fsdp_version and fsdp_config",
        lambda value, given: given.sharded and value,
    ),
)

#: What has no effect and does no harm: keys -> why. `block.*` is all of a block that is not in
#: `config.host_keys`.
UNUSED = {
    "liger_cross_entropy, liger_fused_linear_cross_entropy, liger_use_token_scaling, "
    "cut_cross_entropy, chunked_cross_entropy, chunked_cross_entropy_num_chunks, "
    "flash_attn_cross_entropy": "kernels for the cross-entropy of labels, and a preference loss "
    "has none",
    "train_on_inputs, eot_tokens, role_boundaries": "they say which tokens are labels; of a pair "
    "the whole of each answer is trained",
    "eval_sample_packing, sample_packing_group_size, sample_packing_bin_size, "
    "sample_packing_sequentially, sample_packing_mp_start_method, sample_packing_eff_est, "
    "multipack_real_batches, batch_flattening, pad_to_sequence_len, group_by_length, "
    "total_num_tokens, total_supervised_tokens": "pairs are not sorted by length, and a "
    "micro-batch is padded to its longest row, or by dpo_padding_free not at all",
    "pretrain_multipack_attn, pretrain_multipack_buffer_size, pretraining_sample_concatenation, "
    "streaming_multipack_buffer_size, preprocess_iterable, dataset_keep_in_memory": "pairs are "
    "loaded as a whole and kept in a file",
    "max_prompt_len, eval_sequence_len": "sequence_len bounds prompt and answer together, of "
    "held-out pairs too",
    "do_bench_eval, bench_dataset, bench_split, do_causal_lm_eval, eval_causal_lm_metrics, "
    "eval_table_size, eval_max_new_tokens, generate_samples, num_generation_samples, "
    "generation_max_new_tokens, generation_temperature, generation_top_p, generation_top_k, "
    "generation_prompt_ratio, generation_do_sample": "the host evaluates so in supervised "
    "fine-tuning only; `axolotl sera eval` compares answers, `axolotl sera inspect` shows samples",
    "ddp_bucket_cap_mb, ddp_broadcast_buffers, ddp_find_unused_parameters, include_tkps": "the "
    "host reads it in supervised fine-tuning only",
    "image_size, image_resize_algorithm": "pairs have no images",
    "remove_unused_columns": "the columns that are trained are SeRA's own",
    "ebft": "it is for rl: ebft",
    "trl.*": "all but beta is for rl: grpo; the sera block says how answers are sampled",
    "vllm.device, vllm.data_parallel_size, vllm.enable_reasoning, vllm.reasoning_parser, "
    "vllm.serve_module, vllm.worker_extension_cls": "it is for the server of `axolotl vllm-serve`, "
    "which rl: sera does not use",
    "device, world_size, local_rank, is_falcon_derived_model": "the host finds it out itself",
    "default_system_message": "it replaces words that no chat template has; write system messages "
    "into the data, or into a template",
    "fsdp_final_state_dict_type": "a run ends with whole weights",
    "center_rewards_coefficient, num_labels, eaft_alpha, eaft_k, pose_split_on_token_ids, "
    "pose_max_context_len, pose_num_chunks, lisa_layers_attribute, jagged_restart_warmup_steps, "
    "jagged_restart_anneal_steps, relora_prune_ratio, relora_prune_method, relora_cpu_offload, "
    "loss_watchdog_patience, heads_k_stride, ring_attn_func": "it belongs to a key that does "
    "not work with rl: sera",
}
#: The host's types that read messages, and where they find them; None where in the answers.
MESSAGE_TYPES = {"chat_template.default": "messages", "chat_template.argilla_chat": None}
#: Keys of an entry of `datasets` that these types alone read.
ENTRY_OF_MESSAGES = (
    "field_messages, field_chosen, field_rejected, field_tools, roles, message_property_mappings, "
    "message_field_role, message_field_content"
)
#: Keys without effect in an entry of `datasets`, where its `type` is one of the host's.
ENTRY_UNUSED = {
    "roles_to_train, train_on_eos, train_on_eot, message_field_training, "
    "message_field_training_detail": "they say which tokens are labels; of a pair the whole of "
    "each answer is trained",
    "conversation, input_format, input_transform, field, field_human, field_model, "
    "logprobs_field, temperature": "it is for supervised fine-tuning",
}
