"""Row plot: labelled rows over one numeric axis, as inline SVG, to which dots and intervals are added."""

from html import escape

from gpt2lab.reports.report_html import LEFT, RIGHT, WIDTH, ticks

LABELS = 210  # pixels left of the plots
ROW = 34  # pixels of one row
AXIS = 44  # pixels below the rows
OWN_STYLE = """
circle.run { fill: var(--train); fill-opacity: .75; } .mean { stroke: var(--val); stroke-width: 3; }
.interval { stroke: var(--train); stroke-width: 3; } .zero { stroke: var(--ink); stroke-dasharray: 3 4; }
"""


class RowPlot:
    """Plot whose `parts` are drawn over the axis.

    Args:
        values: values that the axis must include.
        labels: labels of the rows, from the top.
        axis: label of the axis.
    """

    def __init__(self, values: list[float], labels: list[str], axis: str) -> None:
        self.ticks = ticks(min(values), max(values), 6)
        self.rows = len(labels)
        bottom = ROW * self.rows
        self.parts: list[str] = []
        for tick in self.ticks:
            x = self.x(tick)
            self.parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{bottom}"/>')
            self.parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
        middle = (LABELS + LEFT + WIDTH - RIGHT) / 2
        self.parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(axis)}</text>')
        for row, label in enumerate(labels):
            self.parts.append(f'<text x="0" y="{self.y(row) + 4}">{escape(label)}</text>')

    def x(self, value: float) -> float:
        """Horizontal position of a value in pixels."""
        low, high = self.ticks[0], self.ticks[-1]
        left = LABELS + LEFT
        return round(left + (value - low) / (high - low) * (WIDTH - RIGHT - left), 1)

    def y(self, row: int) -> float:
        """Vertical position of the middle of a row in pixels."""
        return ROW * row + ROW / 2

    def svg(self, label: str) -> str:
        """Render the plot with an accessible label."""
        size = f'viewBox="0 0 {WIDTH} {ROW * self.rows + AXIS}"'
        return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(self.parts)}</svg>'
