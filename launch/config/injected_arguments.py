"""Runtime arguments: what the launcher adds to the keys of a `_target_`, where its constructor takes them."""

ARGUMENTS: dict[str, set[str]] = {
    "task": {
        "training",
        "teacher",
        "loss",
        "preflight",
        "cache",
        "cached",
        "baseline_loss",
        "sequences",
        "context",
        "shard_teacher",
    },
    "data": {
        "name",
        "tokenizer",
        "context",
        "batch_sequences",
        "eval_batch_sequences",
        "accumulate",
        "seed",
        "workers",
        "cache_dir",
        "val_fraction",
        "val_path",
        "path",
        "on_bad_line",
        "source",
        "target",
    },
    "callbacks": {"run_dir", "cache_dir", "facts", "checkpoint_every", "sample_every", "on_spike", "rank_timeout"},
    "logger": {"run_dir", "group"},
}

# Keys of conf/data/*.yaml that the launcher reads itself, before there is a data module
DATA_ONLY_KEYS = {"default_tokenizer"}
