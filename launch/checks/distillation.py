"""Distillation checks: supported combinations of loss, teacher cache and training text; one function each."""

from gpt2lab.errors import InputError
from launch.config.schema import RunConfig


def check(config: RunConfig) -> None:
    """Run all distillation checks.

    Raises:
        InputError: the first unsupported combination.
    """
    check_teacher_cache(config)
    if not config.is_unsized:
        check_sequences(config)
    check_hidden_state_losses(config)


def check_teacher_cache(config: RunConfig) -> None:
    """Check that the loss needs no more than the teacher cache stores."""
    mode, loss = config.teacher_cache.name, config.loss
    if mode == "none":
        return
    if loss.hidden_cosine or loss.hidden_mse:
        raise InputError(
            f"teacher_cache={mode} stores no hidden states, which loss.hidden_cosine and loss.hidden_mse compare.\n"
            "Leave those out, or run the teacher at every step with teacher_cache=none."
        )
    if mode == "sampled" and loss.name != "forward_kl":
        raise InputError(
            f"teacher_cache=sampled with loss={loss.name}: samples give an unbiased estimate of forward KL only.\n"
            "Use loss=forward_kl, or teacher_cache=topk."
        )
    if loss.name == "uld":
        raise InputError(
            f"teacher_cache={mode} stores probabilities of the student's tokens, but loss=uld needs the teacher's.\n"
            "Use teacher_cache=none, or another loss if both have the same tokenizer."
        )
    if loss.name == "mse":
        raise InputError(
            "loss=mse compares every logit, but teacher_cache=topk stores only k.\n"
            "Use another loss, or teacher_cache=none."
        )
    if mode == "topk" and not config.teacher_cache.tail and loss.is_reverse_kl:
        limit = {"jsd": f" loss.beta={loss.beta:g}", "skew_reverse_kl": f" loss.alpha={loss.alpha:g}"}
        raise InputError(
            f"teacher_cache.tail=false with loss={loss.name}{limit.get(loss.name, '')}: reverse KL is infinite where "
            "the teacher has probability 0, as it then has beyond its top k tokens.\n"
            "Use teacher_cache.tail=true, or another loss: forward_kl, jsd with loss.beta below 1, skew_kl, "
            "skew_reverse_kl with loss.alpha above 0, tvd, taid."
        )


def check_sequences(config: RunConfig) -> None:
    """Check that generated training text has space for prompts, and a teacher that can score it."""
    sequences = config.sequences
    if sequences.name == "data":
        return
    if sequences.max_new_tokens >= config.context:
        raise InputError(
            f"sequences.max_new_tokens={sequences.max_new_tokens} leaves no tokens for a prompt in "
            f"context={config.context}.\n"
            f"Give sequences.max_new_tokens={config.context // 2}, or another number below the context."
        )
    if sequences.on_policy and config.teacher_cache.name != "none":
        raise InputError(
            f"teacher_cache={config.teacher_cache.name} stores teacher probabilities for the data, but with "
            f"sequences={sequences.name} the student generates other text.\n"
            "Use teacher_cache=none, or sequences=seqkd, whose text is generated once."
        )
    if config.loss.name == "uld":
        raise InputError(
            f"sequences={sequences.name} needs a teacher with the student's tokenizer; loss=uld is for another one.\n"
            "Use sequences=data, or another loss if both have the same tokenizer."
        )
    rows = config.global_batch_rows
    if sequences.name == "distillm" and sequences.capacity < rows:
        raise InputError(
            f"sequences.capacity={sequences.capacity} is less than the {rows} sequences of a step.\n"
            f"Give at least sequences.capacity={rows}."
        )


def check_hidden_state_losses(config: RunConfig) -> None:
    """Check that hidden states of teacher and student belong to the same tokens."""
    if config.loss.name == "uld" and (config.loss.hidden_cosine or config.loss.hidden_mse):
        raise InputError(
            "loss=uld is for a teacher with another tokenizer, whose hidden states have other positions.\n"
            "Leave out loss.hidden_cosine and loss.hidden_mse, or use another loss if both have the same tokenizer."
        )
