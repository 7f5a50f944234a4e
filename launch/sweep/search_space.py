"""Search space: converts overrides in Hydra's sweep syntax into Optuna distributions.

a,b,c  choice(a,b,c)  glob(*)     one of these values
range(1,10)  range(0,1,0.1)       numbers with a step; the end is excluded, as in Python
interval(1e-4,1e-2)               any number in between; int(interval(1,100)) any whole number
tag(log,…)  tag(linear,…)         uniform on a logarithmic or a linear scale
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from gpt2lab.errors import InputError
from launch.config.groups import groups
from launch.config.unused_keys import deciding_groups, given_keys

TAGS = ("log", "linear")
# An interval of these keys is logarithmic by default if high ≥ LOG_SCALE_RATIO · low
LOG_SCALE_KEYS = ("optimizer.lr", "optimizer.adamw_lr", "optimizer.weight_decay", "optimizer.eps", "z_loss")
LOG_SCALE_RATIO = 10


@dataclass(frozen=True)
class Dimension:
    """A searched key and the distribution of its values.

    Attributes:
        key: name of the parameter in the Optuna study, without a leading `+`.
        typed: the key as typed, with it.
    """

    key: str
    typed: str
    distribution: BaseDistribution

    def suggest(self, trial: Trial) -> str:
        """Sample a value for the trial; return the override."""
        kind = self.distribution
        value: object
        if isinstance(kind, CategoricalDistribution):
            value = trial.suggest_categorical(self.key, kind.choices)
        elif isinstance(kind, IntDistribution):
            value = trial.suggest_int(self.key, kind.low, kind.high, step=kind.step, log=kind.log)
        else:
            assert isinstance(kind, FloatDistribution)
            value = trial.suggest_float(self.key, kind.low, kind.high, step=kind.step, log=kind.log)
        return f"{self.typed}={value}"

    def allows(self, override: str) -> bool:
        """Whether the override sets this key to one of its values; for a range, to any finite number."""
        key, _, text = override.partition("=")
        if key != self.typed:
            return False
        if isinstance(self.distribution, CategoricalDistribution):
            return text in map(str, self.distribution.choices)
        try:
            return math.isfinite(float(text))
        except ValueError:
            return False

    @property
    def examples(self) -> list[str]:
        """Overrides with all choices, or with one number of the range."""
        kind = self.distribution
        if isinstance(kind, CategoricalDistribution):
            return [f"{self.typed}={value}" for value in kind.choices]
        assert isinstance(kind, IntDistribution | FloatDistribution)
        is_free = isinstance(kind, FloatDistribution) and kind.step is None
        return [f"{self.typed}={(kind.low + kind.high) / 2 if is_free else kind.low}"]


def parse(arguments: Sequence[str], loader: ConfigLoader) -> tuple[list[str], list[Dimension]]:
    """Split overrides into (overrides that all jobs share, searched dimensions).

    A dimension comes after those that decide whether its key exists.

    Raises:
        InputError: a range contains no values or has an unsupported tag.
    """
    fixed: list[str] = []
    dimensions: list[Dimension] = []
    for override, argument in zip(
        OverridesParser.create(loader).parse_overrides(list(arguments)), arguments, strict=True
    ):
        key = given_keys([argument])[0]
        if override.is_sweep_override():
            dimensions.append(Dimension(key, override.get_key_element(), _distribution(key, override, argument)))
        else:
            fixed.append(argument)
    return fixed, sorted(dimensions, key=_rank)


def _rank(dimension: Dimension) -> int:
    """Sort key: task and experiment decide which groups exist, groups which keys, and some keys which other keys."""
    if dimension.key in ("task", "experiment"):
        return 0
    depends = bool(deciding_groups(dimension.key))
    return (1 if dimension.key in groups() else 3) + depends


def _distribution(key: str, override: Override, argument: str) -> BaseDistribution:
    value = override.value()
    tags = value.tags if isinstance(value, Sweep) else set()
    unknown = sorted(tags - set(TAGS))
    if unknown or len(tags) > 1:
        raise InputError(f"{argument}: a range is tagged with one of {', '.join(TAGS)}, as in tag(log,interval(1,9)).")
    if not isinstance(value, IntervalSweep | RangeSweep):
        if tags:
            raise InputError(f"{argument}: tags apply to ranges, not to choices.\nLeave out tag(…).")
        return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
    if isinstance(value, RangeSweep):
        end = value.stop
        assert end is not None
        # Because of rounding errors, a range with step 0.1 may include its end
        numbers = [number for number in value.range() if not math.isclose(number, end)]
        return _range_distribution(numbers, "log" in tags, argument)
    low, high = value.start, value.end
    assert low is not None
    assert high is not None
    _check_bounds(low, high, "log" in tags, argument)
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log="log" in tags)
    is_wide = key in LOG_SCALE_KEYS and low > 0 and high >= LOG_SCALE_RATIO * low
    return FloatDistribution(low, high, log="log" in tags or (is_wide and not tags))


def _range_distribution(numbers: list[float], log: bool, argument: str) -> BaseDistribution:
    if not numbers:
        raise InputError(f"{argument} contains no number.\nGive range(low,high) with low below high; high is left out.")
    numbers = sorted(numbers)
    low, high = numbers[0], numbers[-1]
    step = round(numbers[1] - low, 12) if len(numbers) > 1 else 1
    if log and not (isinstance(low, int) and step == 1):
        raise InputError(f"{argument}: a logarithmic range supports whole numbers with step 1 only.")
    if log:
        _check_bounds(low, high, log, argument)
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(low), int(high), step=1 if log else int(step), log=log)
    return FloatDistribution(low, round(low + (len(numbers) - 1) * step, 12), step=step)


def _check_bounds(low: float, high: float, log: bool, argument: str) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{argument}: the lower bound must be a number below the upper one, interval(low,high).")
    if log and low <= 0:
        raise InputError(
            f"{argument}: a logarithmic scale needs numbers above 0.\nRaise the lower bound, or leave out log."
        )
