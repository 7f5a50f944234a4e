"""Hydra's composition of conf/, cached for the tests of one process, which compose it thousands of times.

The composed tree of each selection of groups is kept, and Hydra sets the keys of a command line on a copy of it. What
fails is not kept, nor is a composition from other folders than conf/ and those of packages.
"""

import copy
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

_get_mode = Hydra.get_mode
_create_defaults_list = config_loader_impl.create_defaults_list
_compose = ConfigLoaderImpl._compose_config_from_defaults_list
_process_searchpath = ConfigLoaderImpl._process_config_searchpath
_defaults: dict[str, DefaultsList] = {}
_trees: dict[str, DictConfig] = {}
_without_searchpath: set[str] = set()


def install(patch: pytest.MonkeyPatch) -> None:
    """Have Hydra compose through the cache."""
    patch.setattr(Hydra, "get_mode", mode_of)
    patch.setattr(ConfigLoaderImpl, "_process_config_searchpath", process_searchpath)
    patch.setattr(config_loader_impl, "create_defaults_list", defaults_list)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", composed)


def mode_of(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return `hydra.mode`, which Hydra.get_mode composes the whole configuration for.

    No file in conf/ sets the key (test_configuration checks that), so without an override of Hydra's own it is None.
    """
    is_overridden = any("hydra" in override for override in overrides)
    return _get_mode(hydra, config_name, overrides) if is_overridden else None


def process_searchpath(
    loader: ConfigLoaderImpl, config_name: str | None, overrides: list[Override], repo: CachingConfigRepository
) -> None:
    """Read the primary configuration for `hydra.searchpath` once only, for it sets none."""
    key = repr(([(part.provider, part.path) for part in loader.get_search_path().get_path()], config_name))
    if key in _without_searchpath and not any(given.get_key_element() == "hydra.searchpath" for given in overrides):
        return
    sources = repo.get_sources()
    _process_searchpath(loader, config_name, overrides, repo)
    if repo.get_sources() is sources:
        _without_searchpath.add(key)


def defaults_list(
    repo: CachingConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    """Return the files that the selected groups name, as Hydra's function of this name does."""
    given = Overrides(repo=repo, overrides_list=overrides_list)
    groups = given.override_choices, given.append_group_defaults, given.deletions
    sources = [(source.provider, source.path) for source in repo.get_sources()]
    key = repr((sources, config_name, groups, prepend_hydra, skip_missing))
    if key not in _defaults:
        found = _create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        if any(provider.startswith(("command-line", "hydra.searchpath")) for provider, _ in sources):
            return found
        _defaults[key] = found
    return DefaultsList(
        defaults=KeyedDefaults(_defaults[key].defaults, key),
        defaults_tree=_defaults[key].defaults_tree,
        config_overrides=given.config_overrides,
        overrides=_defaults[key].overrides,
    )


class KeyedDefaults(list[ResultDefault]):
    """Files in the order of their merging, with the key of their cache."""

    def __init__(self, defaults: list[ResultDefault], key: str) -> None:
        super().__init__(defaults)
        self.key = key


def composed(loader: ConfigLoaderImpl, defaults: list[ResultDefault], repo: CachingConfigRepository) -> DictConfig:
    """Return the merged files as a tree of the caller's own."""
    if not isinstance(defaults, KeyedDefaults):
        return _compose(loader, defaults=defaults, repo=repo)
    if defaults.key not in _trees:
        _trees[defaults.key] = _compose(loader, defaults=defaults, repo=repo)
    return copy.deepcopy(_trees[defaults.key])
