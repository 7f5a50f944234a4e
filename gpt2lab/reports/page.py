"""Page: the frame of every page of results, one self-contained file without network access.

A page with charts contains uPlot (uplot.min.js, 52 kB) and charts.js. The page of something that is not over reloads
itself and shows the time since its last update, from which a reader sees that a process was killed (age.js).
"""

import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
PLOT = 'class="plot'  # of every chart's element
RELOAD_SECONDS = 30
RELOAD = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">'
NO_SCRIPT = '<noscript><p class="status">The charts need JavaScript. Their values are in metrics.csv.</p></noscript>'


@dataclass(frozen=True)
class Unfinished:
    """How a page that is not the last one is followed.

    Attributes:
        patience: seconds without an update after which the page shows that its process has probably ended.
        resume: command that continues it; empty: none is shown.
    """

    patience: float
    resume: str = ""

    def html(self) -> str:
        """Render the time of the update, which age.js completes."""
        now = time.time()
        shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
        resume = f"<div>Resume it:</div>{command(self.resume)}" if self.resume else ""
        return (
            f'<div class="age" data-time="{now:.0f}" data-patience="{self.patience:.0f}"><p class="status">'
            f"last update {shown}<span></span></p><div hidden><p>It was probably killed: "
            f"<code>python -m launch.commands.list_runs</code> prints whether it is active.</p>{resume}</div></div>"
        )


def render_page(title: str, heading: str, status: str, body: str, unfinished: Unfinished | None = None) -> str:
    """Render a page.

    Args:
        title, heading: plain text.
        status: HTML below the heading.
        body: HTML.
        unfinished: for a page that reloads itself, until it is replaced by one without.
    """
    has_charts, has_script = PLOT in body, PLOT in body or "data-s=" in body
    style = (_asset("uplot.min.css") if has_charts else "") + STYLE
    used = {"uplot.min.js": has_charts, "charts.js": has_script, "age.js": unfinished is not None}
    scripts = [name for name, is_used in used.items() if is_used]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{RELOAD if unfinished else ""}<title>{escape(title)}</title>
<link rel="icon" href="data:,"><style>{style}</style></head><body class="results">
<h1>{escape(heading)}</h1><p class="status">{status}</p>{unfinished.html() if unfinished else ""}{NO_SCRIPT * has_charts}
{body}
{"".join(f"<script>{_asset(name)}</script>" for name in scripts)}
</body></html>
"""


def section(title: str, content: str) -> str:
    """Render a section; empty without content."""
    return f"<h2>{escape(title)}</h2>{content}\n" if content else ""


def command(text: str) -> str:
    """Render a command to copy."""
    return f"<pre>{escape(text)}</pre>"


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
