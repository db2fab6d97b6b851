"""Names of settings of the Hugging Face Trainer, LLaMA-Factory and axolotl that no rule asks for, and known names.

Facts of ``transformers.TrainingArguments`` (4 and 5), LLaMA-Factory's ``hparams`` and axolotl's configuration
reference. A key that is neither here nor read is named in a note, since it may be misspelt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CALLED: Final[Mapping[str, str]] = {
    "lr": "learning_rate", "optimizer": "optim", "beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon",
    "weight_decay": "weight_decay", "clip": "max_grad_norm", "epochs": "num_train_epochs", "total_steps": "max_steps",
    "schedule": "lr_scheduler_type", "warmup_steps": "warmup_steps", "save_every": "save_steps",
    "attention_kernel": "attn_implementation",
}  # fmt: skip
"""Field -> the Trainer's name for it, where both mean the same number."""

MODEL_CALLED: Final[Mapping[str, str]] = {
    "n_layers": "num_hidden_layers", "d_model": "hidden_size", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "d_ff": "intermediate_size",
    "vocab_size": "vocab_size", "max_positions": "max_position_embeddings", "tied": "tie_word_embeddings",
    "init_std": "initializer_range", "attn_soft_cap": "attn_logit_softcapping",
    "logit_soft_cap": "final_logit_softcapping", "attention_kernel": "attn_implementation",
    "n_experts": "num_experts", "router_z_loss": "router_z_loss_coef", "biases": "attention_bias",
}  # fmt: skip
"""Field -> its name in ``config.json``."""

_OTHERS: Final = """
accelerator_config activation_checkpointing activation_checkpointing_kwargs auto_find_batch_size
average_tokens_across_devices batch_eval_metrics bf16_full_eval data_seed dataloader_drop_last dataloader_in_order
dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train enable_jit_checkpoint
eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
eval_use_gather_object fp16_full_eval fsdp fsdp_config full_determinism gradient_checkpointing
gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision
hub_strategy hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names
label_smoothing_factor length_column_name liger_kernel_config load_best_model_at_end local_rank log_level
log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy
lr_scheduler_kwargs metric_for_best_model neftune_noise_alpha optim_args optim_target_modules output_dir
parallelism_config per_device_eval_batch_size prediction_loss_only project push_to_hub remove_unused_columns report_to
restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model
save_total_limit seed skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode
torch_empty_cache_steps train_sampling_strategy use_cache use_cpu use_liger_kernel adafactor evaluation_strategy
eval_batch_size group_by_length half_precision_backend fp16_opt_level fp16_backend include_inputs_for_metrics
include_tokens_per_second jit_mode_eval logging_dir mp_parameters no_cuda overwrite_output_dir past_index
push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_scope save_safetensors sharded_ddp split_batches
dispatch_batches torchdynamo tpu_metrics_debug tpu_num_cores use_ipex use_legacy_prediction_loop use_mps_device
xpu_backend fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap train_batch_size model_name_or_path cache_dir
use_fast_tokenizer model_revision trust_remote_code stage dataset dataset_dir eval_dataset media_dir template
mix_strategy interleave_probs max_samples overwrite_cache preprocessing_num_workers preprocessing_batch_size packing
neat_packing streaming buffer_size tokenized_path val_size plot_loss shift_attn rope_scaling use_unsloth
enable_liger_kernel lora_rank lora_alpha lora_dropout lora_target freeze_trainable_layers mask_history train_on_prompt
ignore_pad_token_for_loss export_dir disable_gradient_checkpointing upcast_layernorm resize_vocab train_from_scratch
compute_accuracy base_model base_model_config model_type tokenizer_type tokenizer_config datasets test_datasets
val_set_size dataset_prepared_path dataset_processes shuffle_merged_datasets pretraining_dataset sample_packing
eval_sample_packing pad_to_sequence_len train_on_inputs load_in_8bit load_in_4bit strict lora_r lora_target_linear
lora_target_modules lora_modules_to_save lora_model_dir wandb_project wandb_entity wandb_watch wandb_name wandb_run_id
wandb_log_model early_stopping_patience saves_per_epoch evals_per_epoch eval_table_size eval_max_new_tokens
eval_causal_lm_metrics xformers_attention sdp_attention special_tokens tokens chat_template plugins liger_rope
liger_rms_norm liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy unfrozen_parameters
is_llama_derived_model is_mistral_derived_model is_falcon_derived_model
"""

OTHERS: Final = frozenset(_OTHERS.split())
"""What no rule asks for."""
