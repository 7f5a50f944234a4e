"""Figures on pages: three significant digits in tables and on axes; commands keep the full value."""

import math

from gpt2lab.analysis.sweep_axes import NUMBER, override_value


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


def tick_text(text: str) -> str:
    """Format the value of an override beside an axis: as short as three significant digits permit."""
    shorter = override_value(text)
    if not NUMBER.fullmatch(text) or not 0 < abs(float(text)) < 1e-2:
        return shorter
    mantissa, exponent = f"{float(text):.2e}".split("e")
    return min(shorter, f"{float(mantissa):g}e{int(exponent)}", key=len)


def duration(seconds: float) -> str:
    """Format as 2 h 05 min, 3 min 20 s or 12.5 s."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02} s"
    return f"{significant(seconds)} s"
