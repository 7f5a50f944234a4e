"""Plan data: sizes of the data that a plan finds without preparing them."""

from contextlib import suppress
from dataclasses import dataclass, replace

from datamodules.language_modeling import LanguageModelingData
from datamodules.pairs import PairData
from gpt2lab.errors import InputError
from gpt2lab.storage.hub import is_hub_id
from gpt2lab.storage.prepared_cache import NotPreparedError, without_building
from launch.config.run_spec import RunSpec
from launch.config.schema import steps_of_epochs, with_steps
from launch.run.build import data_module
from launch.run.run_cost import BYTES_OF_A_TOKEN


@dataclass(frozen=True)
class PreparedData:
    """Sizes of prepared data.

    Attributes:
        samples: of the training data, each of which an epoch uses once.
        validation_tokens: of the validation split.
        overlap: share of the validation text's 13-grams that occur in the training text; None: unknown.
    """

    samples: int
    validation_tokens: int
    overlap: float | None


def find_prepared(spec: RunSpec) -> PreparedData | None:
    """Return the sizes of data that are in the cache; None before the preparation, which is not begun."""
    config, module = spec.config, data_module(spec)
    is_hub_pairs = config.takes_pairs and not config.path and is_hub_id(str(config.data.get("dataset") or ""))
    if is_hub_pairs or not isinstance(module, LanguageModelingData | PairData):  # whose identity needs a download
        return None
    with suppress(InputError, NotPreparedError), without_building():  # a plan may be made where the data are not
        facts = module.prepare()
        validation = int(module.val_samples.numbered_tokens()[1].sum())
        return PreparedData(len(module.train_samples), validation, facts.val_overlap)
    return None


def with_counted_steps(spec: RunSpec, data: PreparedData | None) -> tuple[RunSpec, str]:
    """Return the run with the steps of its epochs, and how they were found; "" without epochs."""
    config = spec.config
    if config.epochs is None:
        return spec, ""
    samples, found = (data.samples, "counted in the prepared data") if data is not None else _estimated_samples(spec)
    if samples:
        spec = replace(spec, config=with_steps(config, steps_of_epochs(config, samples)))
    return spec, f"epochs={config.epochs:g}: {found}"


def _estimated_samples(spec: RunSpec) -> tuple[float, str]:
    """Return (training samples at most, or 0; what is known of them) of data that are not prepared."""
    config, text = spec.config, 0
    with suppress(InputError):
        text = 0 if config.takes_pairs else data_module(spec).text_bytes()
    if not text:
        return 0, "UNKNOWN until the data are prepared, by a run with trainer.fast_dev_run=true"
    samples = text / BYTES_OF_A_TOKEN * (1 - config.val_fraction) / config.context
    return samples, "at most, since the data are not prepared"
