"""Config files of another trainer (`--from`): the keys without a counterpart that change no result and are ignored.

Some are ignored at any value (`harmless`), some at the values that describe what is done here anyway (`fixed`), and
some where another key of the config decides (`answered`). All others are refused, as they would change the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Logging, saving, speed, and where things go.
TRAINER = """
    overwrite_output_dir do_train do_eval do_predict eval_strategy evaluation_strategy prediction_loss_only
    per_device_eval_batch_size eval_accumulation_steps eval_delay torch_empty_cache_steps log_level log_level_replica
    log_on_each_node logging_dir logging_strategy logging_first_step logging_nan_inf_filter save_strategy
    save_total_limit save_safetensors save_on_each_node save_only_model restore_callback_states_from_checkpoint
    jit_mode_eval use_ipex half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend
    dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory dataloader_persistent_workers run_name
    disable_tqdm remove_unused_columns label_names load_best_model_at_end ignore_data_skip debug group_by_length
    length_column_name train_sampling_strategy report_to project trackio_space_id ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_timeout ddp_static_graph hub_model_id hub_strategy hub_token
    hub_private_repo hub_always_push hub_revision gradient_checkpointing_kwargs include_inputs_for_metrics
    include_for_metrics eval_do_concat_batches auto_find_batch_size full_determinism ray_scope torch_compile
    torch_compile_backend torch_compile_mode include_tokens_per_second include_num_input_tokens_seen eval_on_start
    batch_eval_metrics eval_use_gather_object use_liger_kernel liger_kernel_config accelerator_config
    skip_memory_metrics use_legacy_prediction_loop mp_parameters fp16_backend fp16_opt_level fsdp_config
    fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap average_tokens_across_devices parallelism_config
    push_to_hub_model_id push_to_hub_organization push_to_hub_token past_index use_mps_device torchdynamo
    packing packing_strategy padding_free eval_packing dataset_num_proc activation_offloading inference_mode
    attn_implementation use_cache preprocessing_num_workers max_eval_samples max_predict_samples cache_dir
"""
LLAMA_FACTORY = """
    overwrite_cache plot_loss preprocessing_batch_size tokenized_path media_dir use_fast_tokenizer neat_packing
    compute_accuracy eval_on_each_dataset predict_with_generate use_unsloth enable_liger_kernel flash_attn
    disable_gradient_checkpointing use_reentrant_gc print_param_status include_effective_tokens_per_second
    hf_hub_token ms_hub_token om_hub_token use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode
    swanlab_api_key infer_backend infer_dtype offload_folder use_kv_cache low_cpu_mem_usage quantization_device_map
    streaming buffer_size create_new_adapter adapter_folder pref_beta pref_loss pref_ftx export_dir export_size
    export_device export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager ray_run_name
    ray_storage_path ray_num_workers resources_per_worker placement_strategy dataset_shards do_sample
"""
AXOLOTL = """
    dataset_prepared_path dataset_processes dataset_keep_in_memory dataset_num_proc skip_prepare_dataset use_wandb
    wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model wandb_mode use_mlflow
    mlflow_tracking_uri mlflow_experiment_name mlflow_run_name use_comet comet_project_name comet_workspace
    flash_attention xformers_attention sdp_attention flex_attention eager_attention flash_attn_cross_entropy
    flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp sample_packing eval_sample_packing
    sample_packing_eff_est sample_packing_group_size sample_packing_bin_size pad_to_sequence_len eval_batch_size
    eval_table_size eval_max_new_tokens evals_per_epoch saves_per_epoch tokenizer_type model_type tokenizer_use_fast
    tokenizer_legacy is_llama_derived_model is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model
    device_map max_memory low_cpu_mem_usage auto_resume_from_checkpoints unsloth_cross_entropy_loss unsloth_lora_mlp
    unsloth_lora_qkv unsloth_lora_o lora_mlp_kernel lora_qkv_kernel lora_o_kernel plugins liger_rope liger_rms_norm
    liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy cut_cross_entropy strict loss_watchdog
    loss_watchdog_threshold loss_watchdog_patience gc_steps push_dataset_to_hub hf_use_auth_token sequence_parallel
    shuffle_merged_datasets val_set_size_seed axolotl_config_path profiler_steps
"""
# The values that describe what is done here anyway; others would change the result.
OPTIMIZATION: dict[str, tuple[Any, ...]] = {
    "adam_beta1": (0.9, None),
    "adam_beta2": (0.999, None),
    "adam_epsilon": (1e-8, None),
    "label_smoothing_factor": (0, None),
    "neftune_noise_alpha": (None,),
    "deepspeed": (None, ""),
    "fsdp": (None, "", [], False),
    "lr_scheduler_kwargs": (None, {}, "{}", ""),
    "optim_args": (None, ""),
    "optim_target_modules": (None,),
    "dataloader_drop_last": (False,),
    "resume_from_checkpoint": (None, False),
    "push_to_hub": (False, None),
    "data_seed": (None,),
    "metric_for_best_model": (None, "loss", "eval_loss"),
    "greater_is_better": (None, False),
    "completion_only_loss": (None, True),
    "loss_type": (None, "nll"),
    "bias": ("none", None),
    "task_type": ("CAUSAL_LM", None),
    "peft_type": ("LORA", None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True,),
    "layers_to_transform": (None,),
    "num_beams": (1, None),
    "repetition_penalty": (1, None),
}


@dataclass(frozen=True)
class Origin:
    """A trainer whose config files are read, and its keys without a counterpart here.

    `harmless` keys are ignored. `fixed` has the values at which a key is ignored, `answered` the key of ours that must
    be set instead, in the same file or by an override.
    """

    title: str
    harmless: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]
    answered: Mapping[str, str] = field(default_factory=dict)


ORIGINS = {
    "hf": Origin("the Hugging Face Trainer or TRL", frozenset(TRAINER.split()), OPTIMIZATION),
    "llama-factory": Origin(
        "LLaMA-Factory",
        frozenset((TRAINER + LLAMA_FACTORY).split()),
        OPTIMIZATION
        | {
            "stage": ("sft",),
            "finetuning_type": ("lora",),
            "quantization_method": ("bnb", "bitsandbytes"),
            "quantization_type": ("nf4",),
            "double_quantization": (True,),
            "split_special_tokens": (False,),
            "ignore_pad_token_for_loss": (True,),
            "mix_strategy": ("concat",),
            "interleave_probs": (None,),
            "default_system": (None,),
            "tool_format": (None,),
            "rope_scaling": (None,),
            "mixture_of_depths": (None,),
            "new_special_tokens": (None,),
            "add_tokens": (None,),
            "add_special_tokens": (None,),
            **dict.fromkeys(
                "pure_bf16 upcast_layernorm shift_attn resize_vocab use_galore use_apollo use_badam use_adam_mini "
                "use_muon use_llama_pro freeze_vision_tower train_mm_proj_only use_dft_loss".split(),
                (False, None),
            ),
        },
        {
            "dataset": "data.train",
            "dataset_dir": "data.train",
            "eval_dataset": "data.validation",
            "template": "data.template",
        },
    ),
    "axolotl": Origin(
        "axolotl",
        frozenset((TRAINER + AXOLOTL).split()),
        OPTIMIZATION
        | {
            "adapter": ("lora", "qlora"),
            "special_tokens": (None, {}),
            "tokens": (None, []),
            "added_tokens_overrides": (None, {}),
            "rl": (None,),
            "reward_model": (None, False),
            "noisy_embedding_alpha": (None,),
            "lora_fan_in_fan_out": (None, False),
            "peft_layers_to_transform": (None, []),
            "unfrozen_parameters": (None, []),
            "cosine_constant_lr_ratio": (None,),
            "embedding_lr": (None,),
            "s2_attention": (None, False),
            "pretraining_dataset": (None, []),
            "relora": (None, False),
            "relora_steps": (None,),
        },
        {"datasets": "data.train", "test_datasets": "data.validation", "chat_template": "data.template"},
    ),
}


@dataclass(frozen=True)
class ForeignKeys:
    """A file's values without the ignored keys, their names, and a line for each problem."""

    rest: dict[str, Any]
    ignored: list[str]
    problems: list[str]


def remove_foreign_keys(
    values: Mapping[str, Any], origin: str | None, sections: Collection[str], decided: Mapping[str, Any]
) -> ForeignKeys:
    """Remove the top-level keys of another trainer that change no result here; none without an origin.

    Args:
        sections: our own top-level names.
        decided: the settings under our dotted keys.
    """
    rest = dict(values)
    ignored: list[str] = []
    problems: list[str] = []
    if origin is None:
        return ForeignKeys(rest, ignored, problems)
    trainer = ORIGINS[origin]
    for name in [name for name in values if name not in sections]:
        problem = _describe_refusal(name, values[name], trainer, decided)
        if problem is None:
            ignored.append(name)
        elif problem:
            problems.append(problem)
        else:
            continue  # not one of its keys: the schema refuses it
        del rest[name]
    return ForeignKeys(rest, ignored, problems)


def _describe_refusal(name: str, value: Any, trainer: Origin, decided: Mapping[str, Any]) -> str | None:
    """Why the key is not ignored; None where it is, empty where it is not one of the trainer's keys."""
    if name in trainer.harmless:
        return None
    if name in trainer.fixed:
        if value in trainer.fixed[name]:
            return None
        expected = " or ".join(repr(one) for one in trainer.fixed[name])
        return (
            f"{name}: given {value!r}. It would change the result, and nothing here honours it; expected {expected}. "
            "Take it out to train without it"
        )
    if name in trainer.answered:
        key = trainer.answered[name]
        return None if key in decided else f"{name}: given {value!r}, which {trainer.title} alone knows; set {key}"
    return ""


def find_origins(name: str) -> list[str]:
    """The trainers that have this key, without a counterpart here."""
    return [
        origin
        for origin, trainer in ORIGINS.items()
        if name in trainer.harmless or name in trainer.fixed or name in trainer.answered
    ]


def describe_ignored(names: Sequence[str]) -> str:
    """A line on the ignored keys."""
    return f"set aside, as nothing here depends on them: {', '.join(names)}"
