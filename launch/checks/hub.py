"""Hub: checks of the upload to the Hugging Face Hub and of the model card's keys, without a request to the Hub."""

import re

from gpt2lab.errors import InputError
from launch.config.schema import RunConfig
from launch.config.unused_keys import given_keys

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*", re.ASCII)  # an identifier of the Hub
LANGUAGE = re.compile(r"code|multilingual|[a-z]{2,3}([-_]\w+)?", re.ASCII | re.IGNORECASE)
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."


def check(config: RunConfig) -> None:
    """Check the name of the repository, that a token is at hand, and that the run has a model to upload.

    Raises:
        InputError: an upload that cannot succeed, or a license or language that is no identifier.
    """
    hub = config.hub
    if hub.license is not None and not LICENSE.fullmatch(hub.license):
        raise InputError(
            f"hub.license={hub.license} is no license of the Hub.\n"
            "Give its identifier in lower case, such as mit, apache-2.0, cc-by-4.0 or other."
        )
    for language in config.data.get("languages") or []:
        if not LANGUAGE.fullmatch(str(language)):
            raise InputError(f"data.languages: {language} is no language code.\nGive ISO 639 codes (en, de), or code.")
    if hub.push is None:
        return
    _check_name(hub.push, hub.revision)
    _check_run(config)
    _check_token(hub.push)


def _check_name(push: str, revision: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(push)
    except HFValidationError:
        is_valid = False
    else:
        is_valid = push.count("/") == 1
    if not is_valid:
        raise InputError(
            f"hub.push={push} is no name of a repository.\n"
            "Give USER/NAME, or ORGANIZATION/NAME: letters, digits, -, _ and . (at most 96 characters)."
        )
    if not re.fullmatch(r"[\w][\w./-]*", revision, re.ASCII) or ".." in revision:
        raise InputError(f"hub.revision={revision} is no name of a branch.\nGive one such as main or v1.")


def _check_run(config: RunConfig) -> None:
    if config.is_study:
        raise InputError(
            "hub.push uploads one model, but experiment=distill_study trains many.\n"
            "Leave it out, and upload the best: hf upload USER/NAME RUN_DIR/hf"
        )
    if config.invocation.sweep and "hub.push" not in given_keys(config.invocation.overrides):
        raise InputError(f"hub.push={config.hub.push}: every job of the sweep would upload to it.\nLeave it out.")
    if config.callbacks.get("checkpoint") is None and config.resume is None:
        raise InputError(
            "hub.push uploads hf/, which callbacks.checkpoint writes.\nLeave out callbacks.checkpoint=null."
        )


def _check_token(push: str) -> None:
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise InputError(f"hub.push={push}: HF_HUB_OFFLINE is set, so nothing can be uploaded.\nUnset it.")
    if not get_token():
        raise InputError(f"hub.push={push} needs a token of the Hugging Face Hub, and there is none.\n{LOGIN}")
