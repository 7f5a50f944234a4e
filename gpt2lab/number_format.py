"""Figures on pages and terminals: three significant digits; commands keep the full value."""

import math
from collections.abc import Iterable

MOST_DECIMALS = 4


def significant(value: float, digits: int = 3) -> str:
    """Format with significant digits: 0.0123, 4.56, 1,230, 3.00e-05; integers below 1,000,000 in full."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (isinstance(value, int) and abs(value) < 1e6):
        return f"{int(value):,}".replace("-", "−")
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{round(value, decimals) if decimals else float(f'{value:.{digits}g}'):,.{decimals}f}".replace("-", "−")


def loss(value: float) -> str:
    """Format a loss: three decimals, because runs that are compared differ in the third."""
    return f"{value:.3f}"


def column_decimals(values: Iterable[float], lower_is_better: bool = True) -> int:
    """Return the decimals of a column of losses or scores.

    Three significant digits of the best, or as many as distinguish it from the second best, up to four decimals.
    """
    finite = sorted(filter(math.isfinite, values), reverse=not lower_is_better)
    best, *others = finite or [0.0]
    second = next((value for value in others if value != best), math.inf)
    decimals = min(max(2 - math.floor(math.log10(abs(best) or 1.0)), 0), MOST_DECIMALS)
    while decimals < MOST_DECIMALS and fixed(best, decimals) == fixed(second, decimals):
        decimals += 1
    return decimals


def fixed(value: float, decimals: int) -> str:
    """Format with as many decimals: 3.97, −0.250, 1,230."""
    return f"{value:,.{decimals}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Format as 2 h 05 min, 3 min 20 s or 12.5 s."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02} s"
    return f"{significant(seconds)} s"
