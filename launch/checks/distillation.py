"""Distillation checks: which losses, caches and texts go together; each is one small function."""

from gpt2lab.errors import InputError
from launch.config.schema import RunConfig


def check(config: RunConfig) -> None:
    """All of them.

    Raises:
        InputError: the first mistake found.
    """
    check_teacher_cache(config)
    check_sequences(config)
    check_hidden_terms(config)


def check_teacher_cache(config: RunConfig) -> None:
    """A cache has not everything that a loaded teacher has."""
    mode, loss = config.teacher_cache.name, config.loss
    if mode == "none":
        return
    if loss.hidden_cosine or loss.hidden_mse:
        raise InputError(
            f"teacher_cache={mode} keeps no hidden states, which loss.hidden_cosine and loss.hidden_mse compare.\n"
            "Leave those out, or ask the teacher at every step with teacher_cache=none."
        )
    if mode == "sampled" and loss.name != "forward_kl":
        raise InputError(
            f"teacher_cache=sampled with loss={loss.name}: draws estimate forward KL without bias, other losses not.\n"
            "Use loss=forward_kl, or teacher_cache=topk."
        )
    if loss.name == "uld":
        raise InputError(
            f"teacher_cache={mode} keeps what a teacher says in the student's tokens; loss=uld asks it in its own.\n"
            "Use teacher_cache=none; with one tokenizer for both, another loss."
        )
    if loss.name == "mse":
        raise InputError(
            "loss=mse compares every logit, and teacher_cache=topk keeps only some.\n"
            "Use another loss, or teacher_cache=none."
        )
    if mode == "topk" and not config.teacher_cache.tail and loss.is_reverse_kl:
        limit = {"jsd": f" loss.beta={loss.beta:g}", "skew_reverse_kl": f" loss.alpha={loss.alpha:g}"}
        raise InputError(
            f"teacher_cache.tail=false with loss={loss.name}{limit.get(loss.name, '')}: reverse KL is infinite where "
            "the teacher has probability 0, as it then has beyond its k entries.\n"
            "Use teacher_cache.tail=true, or another loss: forward_kl, jsd with loss.beta below 1, skew_kl, "
            "skew_reverse_kl with loss.alpha above 0, tvd, taid."
        )


def check_sequences(config: RunConfig) -> None:
    """Written text needs prompts before it, and a teacher who reads it."""
    sequences = config.sequences
    if sequences.name == "data":
        return
    if sequences.max_new_tokens >= config.context:
        raise InputError(
            f"sequences.max_new_tokens={sequences.max_new_tokens} leaves no room for a prompt in "
            f"context={config.context}.\n"
            f"Give sequences.max_new_tokens={config.context // 2}, or another number below the context."
        )
    if sequences.by_student and config.teacher_cache.name != "none":
        raise InputError(
            f"teacher_cache={config.teacher_cache.name} keeps what the teacher says of the data, and with "
            f"sequences={sequences.name} the student writes other text.\n"
            "Use teacher_cache=none, or sequences=seqkd, whose text is written once."
        )
    if config.loss.name == "uld":
        raise InputError(
            f"sequences={sequences.name} needs a teacher with the student's tokens; loss=uld is for others.\n"
            "Use sequences=data; with one tokenizer for both, another loss."
        )
    rows = config.rows_of_a_step
    if sequences.name == "distillm" and sequences.capacity < rows:
        raise InputError(
            f"sequences.capacity={sequences.capacity} is less than the {rows} sequences of a step.\n"
            f"Give at least sequences.capacity={rows}."
        )


def check_hidden_terms(config: RunConfig) -> None:
    """Hidden states can be compared where both models stand at every token."""
    if config.loss.name == "uld" and (config.loss.hidden_cosine or config.loss.hidden_mse):
        raise InputError(
            "loss=uld is for a teacher with other tokens, whose hidden states stand at other positions.\n"
            "Leave out loss.hidden_cosine and loss.hidden_mse; with one tokenizer for both, use another loss."
        )
