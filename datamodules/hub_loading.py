"""Loading of data sets: from the Hub, its parquet conversion where a repository has a script, or a local folder.

A broken connection is retried (gpt2lab/storage/hub.py). With HF_HUB_OFFLINE=1 the Hugging Face cache is read.
"""

import functools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import yaml

from gpt2lab.errors import InputError
from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.storage.hub import error_chain, is_hub_id, require_hub, retried

CONVERTED = "refs/convert/parquet"  # revision with the Hub's conversion, CONFIG/SPLIT/0000.parquet
PARTIAL = "partial-"  # prefix of a split's folder that contains only its first 5 GB
NO_SCRIPTS = "Dataset scripts are no longer supported"  # beginning of the error of `datasets`
NO_HUB = (
    "Give a local data set folder (data.dataset=FOLDER), or use data without network: data=stdlib, data=text path=…"
)
HUB_ADDRESS = re.compile(r"(?:https?://[^/]+/|hf://)?datasets/([^/]+/[^/@?#]+)")
NO_CONFIG = "Config name is missing."
FIXES = {  # words of an error of `datasets` → what to do
    rf"^{NO_CONFIG}|^BuilderConfig ": "Give data.config=NAME.",
    r"^(Unknown|Bad) split|^Split name|^Unrecognized instruction|^Instruction |^Percent slice": "Give data.split=NAME; "
    "a part such as train[:10%] needs data.streaming=false.",
    r"^Revision ": "Give data.revision=NAME: a branch, a tag or a commit.",
}
OTHER_DATA = "Use other data, such as data=fineweb_edu, or download its files and give them: data=text path=FILES"


def load_split(dataset: str, config: str, split: str, streaming: bool, revision: str = "") -> Any:
    """Load a split of a `save_to_disk` folder, a folder of data files, or a Hub id (at a branch or commit).

    Raises:
        InputError: the data set or split cannot be loaded.
    """
    import datasets
    import huggingface_hub

    if is_hub_id(dataset):
        require_hub(f"The data set {dataset}", NO_HUB)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    with loaded_folder(dataset) as source, load_errors(dataset, config, split):
        if is_saved(dataset):
            stored = datasets.load_from_disk(dataset)
            if isinstance(stored, datasets.DatasetDict) and split not in stored:
                raise _no_split(dataset, split, stored)
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        streaming = streaming and not _is_pattern(dataset)  # a stream is read later, without the links
        if revision == CONVERTED:
            return _load_converted(dataset, config, split, streaming, revision)
        load = functools.partial(datasets.load_dataset, name=config or None, split=split, streaming=streaming)
        try:
            return retried(f"The data set {dataset}", lambda: load(source, revision=revision or None))
        except Exception as error:
            if not is_hub_id(dataset):
                raise
            if str(error).startswith(NO_SCRIPTS) or _is_cached(dataset, CONVERTED):
                converted = _load_converted(dataset, config, split, streaming, revision)
                warn_once(f"The data set {dataset} has a loading script; the Hub's parquet conversion of it is read.")
                return converted
            if _is_cached(dataset, revision or "main"):  # by `hf download`
                return load(huggingface_hub.snapshot_download(dataset, repo_type="dataset", revision=revision or None))
            raise


def _load_converted(dataset: str, config: str, split: str, streaming: bool, revision: str) -> Any:
    """Load a split of the Hub's parquet conversion; without streaming its files go to the Hugging Face cache.

    Raises:
        InputError: there is no conversion, no such configuration or split, or the conversion is partial.
    """
    import datasets
    import huggingface_hub

    if revision not in ("", "main", CONVERTED):
        raise InputError(
            f"The data set {dataset} has a loading script, which `datasets` does not run, and the Hub's parquet "
            f"conversion is that of its main branch, not of data.revision={revision}.\n"
            "Leave out data.revision, or name a revision without a script."
        )
    files = _converted_files(dataset)
    config = _chosen_config(dataset, config, files)
    chosen = {name: _split_files(dataset, config, name, files) for name in _split_names(split)}
    if streaming and not huggingface_hub.constants.is_offline_mode():
        folder = f"hf://datasets/{dataset}@{quote(CONVERTED, safe='')}"
    else:
        patterns = [file for found in chosen.values() for file in found]
        folder = retried(
            f"The data set {dataset}",
            lambda: huggingface_hub.snapshot_download(
                dataset, repo_type="dataset", revision=CONVERTED, allow_patterns=patterns
            ),
        )
    data_files = {name: [f"{folder}/{file}" for file in found] for name, found in chosen.items()}
    return datasets.load_dataset("parquet", data_files=data_files, split=split, streaming=streaming)


def _converted_files(dataset: str) -> list[str]:
    """Return the paths of all files of the conversion; offline those of the Hugging Face cache.

    Raises:
        InputError: there is no conversion.
    """
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    if huggingface_hub.constants.is_offline_mode():
        tree = huggingface_hub.get_cached_repo_tree(dataset, repo_type="dataset", revision=CONVERTED)
        return [entry.path for entry in tree]
    try:
        hub = huggingface_hub.HfApi()  # repeats this request itself
        entries = list(hub.list_repo_tree(dataset, recursive=True, revision=CONVERTED, repo_type="dataset"))
    except RevisionNotFoundError as error:
        raise InputError(
            f"The data set {dataset} has a loading script, which `datasets` does not run, and the Hub has no parquet "
            f"conversion of it.\n{OTHER_DATA}"
        ) from error
    return [entry.path for entry in entries if entry.path.endswith(".parquet")]


def _is_cached(dataset: str, revision: str) -> bool:
    """Whether HF_HUB_OFFLINE is set, and the Hugging Face cache has the list of the files of a revision."""
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if not huggingface_hub.constants.is_offline_mode():
        return False
    try:
        return bool(huggingface_hub.get_cached_repo_tree(dataset, repo_type="dataset", revision=revision))
    except CachedRepoTreeNotFoundError:
        return False


def _chosen_config(dataset: str, config: str, files: list[str]) -> str:
    found = sorted({file.split("/")[0] for file in files})
    if config in found or (not config and ("default" in found or len(found) == 1)):
        return config or ("default" if "default" in found else found[0])
    given = f"data.config={config} does not exist" if config else "data.config is not given"
    raise InputError(f"The data set {dataset} has several configurations: {given}.\nAllowed: {', '.join(found)}.")


def _split_names(split: str) -> list[str]:
    """Return the names in an expression such as train[:1%]+validation."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _split_files(dataset: str, config: str, split: str, files: list[str]) -> list[str]:
    """Return the files of a split; a large one has several folders, such as train-part0.

    Raises:
        InputError: no such split, or its conversion is partial.
    """
    folders: dict[str, list[str]] = {}
    for file in sorted(files):
        own_config, *inner, _ = file.split("/")
        if own_config == config and inner:
            folders.setdefault(re.sub(r"-part\d+$", "", inner[0]), []).append(file)
    if split in folders:
        return folders[split]
    if f"{PARTIAL}{split}" in folders:
        raise InputError(
            f"The Hub's parquet conversion of the data set {dataset} is partial: its split {split} ends after 5 GB, "
            f"and `datasets` runs no loading scripts.\n{OTHER_DATA}"
        )
    raise _no_split(f"{dataset} (config {config})", split, [name.removeprefix(PARTIAL) for name in folders])


def _no_split(dataset: str, split: str, found: Iterable[str]) -> InputError:
    return InputError(
        f"The data set {dataset} has no split {split!r}; it has: {', '.join(found)}.\nGive data.split=NAME."
    )


def is_saved(dataset: str) -> bool:
    """Whether it is a folder written by `save_to_disk`."""
    return (Path(dataset) / "dataset_dict.json").is_file() or (Path(dataset) / "state.json").is_file()


@contextmanager
def loaded_folder(dataset: str) -> Iterator[str]:
    """Yield the Hub id, or the folder without symbolic links in its path.

    Instead of a folder with `[`, `*` or `?`, which is a pattern for `datasets`, yield a copy that consists of links.
    """
    if _is_pattern(dataset):
        with TemporaryDirectory() as scratch:
            copy = Path(scratch).resolve() / "data"
            yield str(shutil.copytree(Path(dataset).resolve(), copy, copy_function=os.symlink))
    else:
        yield str(Path(dataset).resolve()) if Path(dataset).is_dir() else dataset


def _is_pattern(dataset: str) -> bool:
    return Path(dataset).is_dir() and has_magic(str(Path(dataset).resolve()))


@contextmanager
def load_errors(dataset: str, config: str, split: str) -> Iterator[None]:
    """Replace every error of a library by an InputError with its reason and what to do."""
    import datasets
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    of_files = (yaml.YAMLError, StopIteration)  # a README.md with invalid options; an empty file
    known = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, CachedRepoTreeNotFoundError)
    try:
        yield
    except InputError:
        raise
    except (*known, *of_files) as error:
        raise InputError(
            f"Cannot load the data set {dataset} (config {config or 'default'}, split {split}): {_reason(error)}\n"
            f"{_fix(dataset, error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the reason for an error of a library in one line: that of its cause where it only names the step."""
    import datasets

    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        return _reason(error.__cause__)
    if isinstance(error, StopIteration):
        return "a file contains no data"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    count = 2 if lines[0] == NO_CONFIG else 1  # the second line lists those that exist
    return " ".join(line.strip() for line in lines[:count])[:200]


def _fix(dataset: str, error: BaseException) -> str:
    """Return what to do about an error of a library."""
    import datasets
    import pyarrow
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError

    page = f"{constants.ENDPOINT}/datasets/{dataset}"
    if "gated dataset" in str(error) or any(isinstance(one, GatedRepoError) for one in error_chain(error)):
        if get_token():
            return f"The account of HF_TOKEN has no access: accept the conditions on {page}"
        return f"Accept the conditions on {page}, and set HF_TOKEN to a token of your account."
    if (found := HUB_ADDRESS.match(dataset)) and not Path(dataset).exists():
        return f"Give its Hub id: data.dataset={found[1]}"
    for words, fix in FIXES.items():
        if re.search(words, str(error)):
            return fix
    if isinstance(error, datasets.exceptions.DatasetGenerationError | pyarrow.ArrowInvalid | StopIteration):
        return f"Its files are damaged, or of another format. {OTHER_DATA}"
    if not is_hub_id(dataset):
        return f"Check the folder and its files.\n{NO_HUB}"
    if constants.is_offline_mode():
        return f"HF_HUB_OFFLINE is set: load the data set once without it, or fetch its cache.\n{NO_HUB}"
    return f"Check the name and the network; a private data set needs HF_TOKEN.\n{NO_HUB}"
