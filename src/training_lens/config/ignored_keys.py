"""Config files of another trainer (`--from`): the keys without a counterpart that change no result and are ignored.

Some are ignored at any value (`harmless`), some at the values that describe what is done here anyway (`fixed`), and
some where another key of the config decides (`answered`). All others are refused, as they would change the result.
Checked against transformers 5.23, trl 1.16 and the argument classes of LLaMA-Factory and axolotl of 2026.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# Logging, saving, speed, and where things go. A name that ends in '_' stands for all that begin with it.
TRAINER = """
    accelerator_config activation_checkpointing_kwargs activation_offloading attn_implementation
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16_full_eval bnb_4bit_quant_storage
    cache_dir dataloader_ dataset_num_proc dataset_streaming ddp_ debug disable_tqdm do_eval do_predict do_train
    enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_packing
    eval_strategy eval_use_gather_object evaluation_strategy fp16_backend fp16_full_eval fp16_opt_level
    fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap full_determinism generation_config generation_max_length
    generation_num_beams gradient_checkpointing_kwargs group_by_length half_precision_backend hub_
    ignore_bias_buffers ignore_data_skip include_for_metrics include_inputs_for_metrics
    include_num_input_tokens_seen include_tokens_per_second inference_mode jit_mode_eval label_names
    length_column_name liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica
    log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_strategy max_eval_samples
    max_predict_samples mp_parameters overwrite_output_dir packing_strategy pad_to_multiple_of pad_token
    padding_free parallelism_config past_index per_device_eval_batch_size predict_with_generate prediction_loss_only
    preprocessing_num_workers project push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_
    remove_unused_columns report_to restore_callback_states_from_checkpoint run_name save_on_each_node
    save_only_model save_safetensors save_strategy save_total_limit shuffle_dataset skip_memory_metrics
    sortish_sampler tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps torchdynamo
    trackio_ train_sampling_strategy use_cache use_ipex use_legacy_prediction_loop use_liger_kernel use_mps_device
"""
LLAMA_FACTORY = """
    apollo_ audio_sampling_rate badam_ buffer_size compute_accuracy crop_to_patches data_shared_file_system
    disable_gradient_checkpointing enable_liger_kernel eval_num_beams eval_on_each_dataset export_ flash_attn
    galore_ hf_hub_token image_ include_effective_tokens_per_second infer_backend infer_dtype loraplus_lr_embedding
    low_cpu_mem_usage media_dir ms_hub_token offload_folder om_hub_token overwrite_cache pissa_convert pissa_iter
    placement_strategy plot_loss pref_ preprocessing_batch_size print_param_status quantization_device_map
    resources_per_worker sglang_ streaming swanlab_ tokenized_path use_audio_in_video use_fast_tokenizer
    use_kv_cache use_reentrant_gc use_swanlab use_unsloth use_unsloth_gc use_v1_kernels video_ vllm_
"""
AXOLOTL = """
    auto_resume_from_checkpoints axolotl_config_path batch_flattening chunked_cross_entropy
    chunked_cross_entropy_num_chunks comet_ context_parallel_size cut_cross_entropy dataset_keep_in_memory
    dataset_prepared_path dataset_processes ddp device_map do_causal_lm_eval dp_replicate_size dp_shard_size
    dynamic_checkpoint eager_attention embeddings_skip_upcast eval_batch_size eval_causal_lm_metrics
    eval_max_new_tokens eval_sample_packing eval_sequence_len eval_table_size evals_per_epoch experts_implementation
    flash_attention flash_attn_ flex_attention flex_attn_compile_kwargs freeze_mm_modules gc_steps generate_samples
    generation_max_new_tokens generation_temperature gpu_memory_limit gradio_ heads_k_stride hf_mlflow_log_artifacts
    hf_use_auth_token include_tkps is_falcon_derived_model is_llama_derived_model is_mistral_derived_model
    is_preprocess is_qwen_derived_model layer_offloading liger_ lora_embedding_kernel lora_mlp_kernel lora_o_kernel
    lora_on_cpu lora_qkv_kernel loraplus_lr_embedding loss_watchdog_patience loss_watchdog_threshold
    low_cpu_mem_usage max_memory max_prompt_len mean_resizing_embeddings merge_lora merge_method mlflow_ model_type
    num_dataset_shards_to_save num_generation_samples otel_ pad_to_sequence_len plugins preprocess_iterable
    processor_type profiler_steps profiler_steps_start push_dataset_to_hub qlora_sharded_model_loading
    resize_token_embeddings_to_32x ring_attn_func sample_packing_bin_size sample_packing_eff_est
    sample_packing_group_size sample_packing_mp_start_method save_first_step saves_per_epoch sdp_attention
    sequence_parallel_degree skip_prepare_dataset strict tensor_parallel_size tiled_mlp tiled_mlp_num_shards
    tokenizer_legacy tokenizer_save_jinja_files tokenizer_type tokenizer_use_fast type_of_model unsloth_ use_comet
    use_mlflow use_ray use_tensorboard use_wandb val_set_size_seed wandb_ world_size xformers_attention
"""


def _list_values(names: str, *values: Any) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names.split(), values)


# The values that describe what is done here anyway; others would change the result.
OPTIMIZATION: dict[str, tuple[Any, ...]] = {
    "adam_beta1": (0.9, None),
    "adam_beta2": (0.999, None),
    "adam_epsilon": (1e-8, None),
    "label_smoothing_factor": (0, None),
    "optim_args": (None, ""),
    "dataloader_drop_last": (False, None),
    "resume_from_checkpoint": (None, False),
    "metric_for_best_model": (None, "loss", "eval_loss"),
    "dataset_text_field": (None, "text"),
    "loss_type": (None, "nll", "chunked_nll"),
    "bias": ("none", None),
    "peft_type": ("LORA", None),
    "use_peft": (True,),
    "bnb_4bit_quant_type": ("nf4", None),
    "use_bnb_nested_quant": (True,),
    "num_beams": (1, None),
    "repetition_penalty": (1, None),
    "router_aux_loss_coef": (None, 0),
    **_list_values("task_type lora_task_type", "CAUSAL_LM", None),
    **_list_values("lr_scheduler_kwargs model_init_kwargs dataset_kwargs", None, {}, "{}", ""),
    **_list_values("push_to_hub greater_is_better fan_in_fan_out", False, None),
    **_list_values("neftune_noise_alpha optim_target_modules data_seed layers_to_transform eos_token", None),
}
OF_DATA = {"dataset_name": "data.train", "dataset_config": "data.train", "dataset_train_split": "data.train"}
PACKED = "there a step takes batch_size rows of packed examples, here batch_size examples; raise training.batch_size"
SHARDED = "no weights are sharded here: the model must fit on each device"


@dataclass(frozen=True)
class Origin:
    """A trainer whose config files are read, and its keys without a counterpart here.

    `harmless` keys are ignored; one that ends in '_' stands for all that begin with it. `fixed` has the values at which
    a key is ignored, `answered` the key of ours that must be set instead, in the same file or by an override, `noted`
    what differs where a key is set, and `other` names that are translated for other trainers, but mean something else.
    """

    title: str
    harmless: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]
    answered: Mapping[str, str]
    noted: Mapping[str, str]
    other: Mapping[str, str] = field(default_factory=dict)

    def has_key(self, name: str) -> bool:
        """Whether the trainer has this key, without a counterpart here."""
        return name in {**self.fixed, **self.answered, **self.noted} or self.is_harmless(name)

    def is_harmless(self, name: str) -> bool:
        """Whether the key changes no result, whatever its value."""
        return name in self.harmless or any(name.startswith(start) for start in self.harmless if start.endswith("_"))


ORIGINS = {
    "hf": Origin(
        "the Hugging Face Trainer or TRL",
        frozenset(TRAINER.split()),
        OPTIMIZATION,
        {**OF_DATA, "dataset_test_split": "data.validation", "chat_template_path": "data.template"},
        {"packing": PACKED, "deepspeed": SHARDED, "fsdp": SHARDED, "fsdp_config": SHARDED},
    ),
    "llama-factory": Origin(
        "LLaMA-Factory",
        frozenset((TRAINER + LLAMA_FACTORY).split()),
        OPTIMIZATION
        | {
            "stage": ("sft",),
            "finetuning_type": ("lora",),
            "quantization_method": ("bnb", "bitsandbytes"),
            "quantization_type": ("nf4",),
            "mix_strategy": ("concat",),
            **_list_values("double_quantization freeze_vision_tower freeze_multi_modal_projector", True, None),
            **_list_values("ignore_pad_token_for_loss", True),
            **_list_values(
                "interleave_probs default_system tool_format rope_scaling mixture_of_depths new_special_tokens "
                "new_special_tokens_config add_tokens add_special_tokens adapter_folder moe_aux_loss_coef",
                None,
            ),
            **_list_values(
                "pure_bf16 upcast_layernorm upcast_lmhead_output shift_attn resize_vocab split_special_tokens "
                "use_galore use_apollo use_badam use_adam_mini use_muon use_mca use_kt use_llama_pro use_dft_loss fp8 "
                "train_mm_proj_only freeze_language_model train_from_scratch create_new_adapter disable_shuffling",
                False,
                None,
            ),
        },
        dict.fromkeys(("dataset", "dataset_dir"), "data.train")
        | {"eval_dataset": "data.validation", "template": "data.template", "enable_thinking": "data.thinking"}
        | {"do_sample": "inference.temperature"},
        {
            **dict.fromkeys(("packing", "neat_packing"), PACKED),
            **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), SHARDED),
        },
        {"max_length": "the longest generation there; the longest example is cutoff_len"},
    ),
    "axolotl": Origin(
        "axolotl",
        frozenset((TRAINER + AXOLOTL).split()),
        OPTIMIZATION
        | {
            "adapter": ("lora", "qlora"),
            "shuffle_merged_datasets": (True, None),
            **_list_values("special_tokens added_tokens_overrides bnb_config_kwargs chat_template_kwargs", None, {}),
            **_list_values(
                "tokens unfrozen_parameters pretraining_dataset peft_layers_to_transform lr_groups eot_tokens", None, []
            ),
            **_list_values(
                "rl noisy_embedding_alpha cosine_constant_lr_ratio embedding_lr embedding_lr_scale relora_steps "
                "default_system_message min_sample_len lisa_n_layers base_model_config tokenizer_config rope_scaling "
                "peft_layers_pattern peft_layer_replication peft_trainable_token_indices trainer_cls "
                "fix_untrained_tokens",
                None,
            ),
            **_list_values(
                "reward_model process_reward_model lora_fan_in_fan_out s2_attention relora lr_quadratic_warmup fp8 "
                "bfloat16 float16 gptq use_pose use_eaft scaling_softmax reinit_weights curriculum_sampling "
                "sample_packing_sequentially shuffle_before_merging_datasets dataset_exact_deduplication "
                "tokenizer_use_mistral_common shrink_embeddings quantize_moe_experts",
                False,
                None,
            ),
        },
        {"datasets": "data.train", "test_datasets": "data.validation"}
        | dict.fromkeys(("chat_template", "chat_template_jinja"), "data.template"),
        {"sample_packing": PACKED, **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "fsdp_version"), SHARDED)},
        {"batch_size": "the examples of a whole step there; give micro_batch_size and gradient_accumulation_steps"},
    ),
}


@dataclass(frozen=True)
class ForeignKeys:
    """A file's values without the ignored keys, a line on these, a line for each note, and for each problem."""

    rest: dict[str, Any]
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def remove_foreign_keys(
    values: Mapping[str, Any], origin: str | None, sections: Collection[str], decided: Mapping[str, Any]
) -> ForeignKeys:
    """Remove the top-level keys of another trainer that change no result here; none without an origin.

    `sections` are our own top-level names, `decided` the settings under our dotted keys.
    """
    found = ForeignKeys(dict(values))
    trainer = ORIGINS[origin] if origin else None
    for name, value in values.items():
        if trainer is None or name in sections or not (trainer.has_key(name) or name in trainer.other):
            continue  # the schema refuses what is not one of its keys
        del found.rest[name]
        if problem := _describe_refusal(name, value, trainer, decided):
            found.problems.append(problem)
        elif value and name in trainer.noted:
            found.notes.append(f"{name}: {trainer.noted[name]}")
        else:
            found.ignored.append(name)
    return found


def _describe_refusal(name: str, value: Any, trainer: Origin, decided: Mapping[str, Any]) -> str | None:
    """Why one of the trainer's keys is not ignored; None where it is."""
    if name in trainer.other and value is not None:
        return f"{name}: given {value!r}, {trainer.other[name]}"
    if name == "special_tokens" and isinstance(value, Mapping) and set(value) == {"pad_token"}:
        return None  # padding changes nothing
    if name in trainer.fixed and value not in trainer.fixed[name]:
        expected = " or ".join(map(repr, trainer.fixed[name]))
        return (
            f"{name}: given {value!r}. It would change the result, and nothing here honours it; expected {expected}. "
            "Take it out to train without it"
        )
    if name in trainer.answered and value is not None and trainer.answered[name] not in decided:
        return f"{name}: given {value!r}, which {trainer.title} alone knows; set {trainer.answered[name]}"
    return None
