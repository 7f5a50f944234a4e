"""Objective checks: supported combinations of objective, data, task and loss."""

from gpt2lab.errors import InputError
from launch.config.schema import RunConfig


def check(config: RunConfig) -> None:
    """Run all objective checks.

    Raises:
        InputError: the first unsupported combination.
    """
    _check_data(config)
    _check_sampling(config)
    _check_sampled_softmax(config)
    if config.task_name == "distill":
        _check_distillation(config)


def _check_data(config: RunConfig) -> None:
    name = config.objective.name
    if config.objective.kind.rewrites_text and config.takes_pairs:
        raise InputError(
            f"objective={name} is for running text, but data={config.groups['data']} are pairs.\n"
            "Give objective=clm or objective=prefix_lm, or running text such as data=stdlib."
        )


def _check_sampling(config: RunConfig) -> None:
    if config.objective.kind.fills_masks and config.sampling.name != "auto":
        raise InputError(
            f"sampling={config.sampling.name} continues text, but objective={config.objective.name} fills masks.\n"
            "Leave sampling out."
        )


def _check_sampled_softmax(config: RunConfig) -> None:
    if not config.objective.kind.samples_softmax:
        return
    if config.task_name == "distill":
        raise InputError(
            "objective=sampled_softmax computes a few logits only, but distillation compares whole distributions.\n"
            "Give objective=clm."
        )
    for key in ("label_smoothing", "z_loss"):
        if vars(config)[key]:
            raise InputError(
                f"{key} needs the full softmax, which objective=sampled_softmax does not compute.\nLeave it out."
            )


def _check_distillation(config: RunConfig) -> None:
    name, cache, sequences = config.objective.name, config.teacher_cache.name, config.sequences.name
    if cache != "none" and not config.objective.kind.scores_all_text and not config.takes_pairs:
        raise InputError(
            f"teacher_cache={cache} stores teacher probabilities once, but objective={name} has other inputs in "
            "every epoch.\nGive teacher_cache=none, or objective=clm."
        )
    if config.packing and config.takes_pairs and sequences != "data":
        raise InputError(f"sequences={sequences} needs one prompt per row, without packing.\nLeave packing out.")
    if name != "clm" and sequences != "data":
        raise InputError(f"sequences={sequences} generates with objective=clm only, not {name}.\nGive objective=clm.")
    if config.loss.name == "uld" and (name != "clm" or config.packing):
        what = "packing=true" if config.packing else f"objective={name}"
        raise InputError(
            f"loss=uld aligns tokens of whole causal sequences and does not support {what}.\nLeave it out."
        )
