"""Page: the frame of every page of results, one self-contained file without network access.

A page with charts contains uPlot (uplot.min.js, 52 kB) and charts.js.
"""

from html import escape
from pathlib import Path

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
PLOT = 'class="plot'  # of every chart's element
RELOAD = '<meta http-equiv="refresh" content="{}">'
NO_SCRIPT = '<noscript><p class="status">The charts need JavaScript. Their values are in metrics.csv.</p></noscript>'


def render_page(title: str, heading: str, status: str, body: str, reload_seconds: int = 0) -> str:
    """Render a page.

    Args:
        title, heading: plain text.
        status: HTML below the heading.
        body: HTML.
        reload_seconds: the page reloads itself so often; 0: never.
    """
    has_charts, has_script = PLOT in body, PLOT in body or "data-s=" in body
    style = (_asset("uplot.min.css") if has_charts else "") + STYLE
    scripts = [name for name, is_used in (("uplot.min.js", has_charts), ("charts.js", has_script)) if is_used]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{RELOAD.format(reload_seconds) if reload_seconds else ""}<title>{escape(title)}</title>
<link rel="icon" href="data:,"><style>{style}</style></head><body class="results">
<h1>{escape(heading)}</h1><p class="status">{status}</p>{NO_SCRIPT * has_charts}
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
