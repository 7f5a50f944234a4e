"""Suggestions for error messages: the most similar name, or this project's key for the name of another library."""

import difflib
from collections.abc import Iterable

# Key of this project → its names in Hugging Face's Trainer and TRL, nanoGPT, nanochat, Lightning, torchrun and others.
# A name that is the last part of a key (n_embd, weight_decay, beta2) is found without this table.
NAMES_ELSEWHERE = {
    "steps": "max_steps max_iters num_iterations num_steps n_steps total_steps train_steps num_training_steps "
    "max_train_steps iterations",
    "epochs": "max_epochs num_train_epochs num_epochs n_epochs epoch train_epochs",
    "batch_tokens or batch_sequences": "batch_size train_batch_size total_batch_size global_batch_size bs",
    "micro_batch": "per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size device_batch_size "
    "micro_batch_size eval_batch_size per_device_batch_size auto_find_batch_size",
    "batch_tokens, batch_sequences or micro_batch": "gradient_accumulation_steps accumulate_grad_batches "
    "grad_accum_steps gradient_accumulation accumulation_steps grad_accumulation_steps",
    "context": "block_size seq_len seq_length sequence_length sequence_len max_seq_len max_seq_length max_length "
    "max_sequence_length context_length context_size ctx_len n_ctx",
    "optimizer": "optim optimizer_type optimizer_name",
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr matrix_lr init_lr lr_max",
    "optimizer.adamw_lr": "embedding_lr unembedding_lr",
    "optimizer.weight_decay": "wd l2 adam_weight_decay",
    "optimizer.beta1": "adam_beta1 betas",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon epsilon adam_eps",
    "schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style",
    "schedule.warmup_steps": "warmup_ratio warmup_iters warmup num_warmup_steps warmup_fraction lr_warmup_steps",
    "schedule.final_fraction": "min_lr final_lr min_lr_ratio min_lr_rate final_lr_frac",
    "schedule.decay_fraction": "decay_ratio lr_decay_iters warmdown_ratio warmdown_iters cooldown_frac num_decay_steps",
    "gradient_clip": "max_grad_norm grad_clip gradient_clip_val clip_grad_norm clip_grad max_norm gradient_clipping",
    "early_stop_patience": "patience early_stopping_patience early_stopping early_stop",
    "export": "load_best_model_at_end save_best save_best_only",
    "validate_every": "eval_steps eval_interval eval_every eval_strategy evaluation_strategy validation_steps "
    "val_check_interval val_interval val_every",
    "validate_tokens": "eval_iters eval_tokens val_tokens max_eval_samples max_eval_batches val_max_steps",
    "checkpoint_every": "save_steps save_every save_interval save_strategy checkpoint_interval ckpt_every",
    "callbacks.checkpoint.keep_last": "save_total_limit save_top_k keep_checkpoints",
    "sample_every": "sample_interval generate_every",
    "log_every": "logging_steps log_interval log_every_n_steps logging_strategy",
    "precision": "bf16 fp16 tf32 amp dtype torch_dtype mixed_precision autocast",
    "compile": "torch_compile use_compile",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing",
    "seed": "random_seed manual_seed data_seed rng_seed",
    "run_dir": "output_dir out_dir save_dir logging_dir default_root_dir work_dir",
    "name": "run_name exp_name experiment_name wandb_run_name",
    "resume": "resume_from_checkpoint ckpt_path resume_from",
    "init or resume": "init_from",
    "init": "model_name_or_path pretrained_model_name_or_path pretrained pretrained_model from_pretrained",
    "model": "model_name model_size model_type",
    "model.n_layer": "n_layers num_layers num_hidden_layers depth layers",
    "model.n_head": "n_heads num_heads num_attention_heads heads",
    "model.n_embd": "n_embed hidden_size d_model embed_dim model_dim width hidden_dim",
    "model.n_positions": "max_position_embeddings",
    "model.dropout": "resid_pdrop attn_pdrop embd_pdrop",
    "data or path": "dataset_name train_file data_dir data_path train_data",
    "val_path": "validation_file eval_file val_file valid_file",
    "val_fraction": "validation_split_percentage test_size eval_split_ratio",
    "tokenizer": "tokenizer_name tokenizer_type",
    "workers": "num_workers dataloader_num_workers n_workers",
    "devices": "gpus num_gpus n_gpus nproc_per_node num_devices",
    "num_nodes": "nnodes num_machines nodes",
    "accelerator": "device use_cpu no_cuda use_cuda cpu",
    "strategy": "fsdp ddp deepspeed distributed_strategy distributed_backend",
    "logger": "report_to wandb use_wandb wandb_log tensorboard",
    "logger.project": "wandb_project",
    "label_smoothing": "label_smoothing_factor",
    "ema": "ema_decay",
    "teacher": "teacher_model teacher_model_name_or_path teacher_path",
    "loss.hard_weight": "kd_ratio kd_weight distillation_alpha ce_weight alpha_ce",
    "loss.temperature": "kd_temperature distillation_temperature",
    "task.lora.rank": "lora_rank lora_r",
    "task.lora.alpha": "lora_alpha",
    "task.lora.dropout": "lora_dropout",
    "sampling.top_k": "topk",
    "sampling.top_p": "topp",
}
ELSEWHERE = {name: key for key, names in NAMES_ELSEWHERE.items() for name in names.split()}


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean …?)` with the most similar allowed name, or "" if none is similar.

    A key of a group is found by its last part too: top_k → sampling.top_k; and so is the name of another library.
    """
    names = list(allowed)
    matches = [name for name in names if name.endswith(f".{given}")]
    heads = {name.split(".")[0] for name in names}
    matches += [key for key in [elsewhere(given)] if {part.split(".")[0] for part in parts(key)} <= heads and key]
    matches = matches or difflib.get_close_matches(given, names, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def elsewhere(given: str) -> str:
    """Return the key, or `this or that`, that has this name in another library; "" where none has."""
    return ELSEWHERE.get(given.rpartition(".")[2].lstrip("-").replace("-", "_").lower(), "")


def parts(keys: str) -> list[str]:
    """Return the single keys of a value of ELSEWHERE."""
    return keys.replace(" or ", ", ").split(", ") if keys else []
