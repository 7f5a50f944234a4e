"""Mode of W&B: online, offline, disabled or shared, from the environment, the configuration, or a login."""

import os

import wandb

# Values of WANDB_MODE, in upper or lower case; `run` and `dryrun` are W&B's former names
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}
MODES |= {"shared": "shared", "disabled": "disabled"}
TRUE = ("y", "yes", "t", "true", "on", "1")  # of WANDB_DISABLED, as W&B reads its boolean variables


def chosen_mode(mode: str) -> str:
    """Return the mode that the environment sets, else `mode`, else the one of `wandb offline` or a login.

    Raises:
        ValueError: WANDB_MODE has no valid value.
    """
    given = os.environ.pop("WANDB_MODE", "").strip()  # W&B reads lower case only
    if given.lower() in MODES:
        os.environ["WANDB_MODE"] = MODES[given.lower()]
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in TRUE:
        return "disabled"
    if given and given.lower() not in MODES:
        raise ValueError(f"WANDB_MODE={given} is none of {', '.join(MODES)}")
    if given or mode != "auto":
        return MODES[given.lower()] if given else mode
    settings = wandb.setup(wandb.Settings(silent=True)).settings  # login prints otherwise
    stored = MODES[settings.mode]
    return _available_mode() if stored == "online" else stored


def _available_mode() -> str:
    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except (wandb.Error, OSError, ValueError):
        return "offline"
