"""Page: the frame of every page of results, one self-contained file without network access.

A page with charts contains uPlot (uplot.min.js, 52 kB) and charts.js. The page of something that is not over reloads
itself and shows the time since its last update, from which a reader sees that a process was killed (age.js).
"""

import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
PLOT = 'class="plot'  # of every chart's element
AGE = '<div class="age"'
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
    used = {"uplot.min.js": has_charts, "charts.js": has_script, "age.js": AGE in body}
    scripts = [name for name, is_used in used.items() if is_used]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{RELOAD.format(reload_seconds) if reload_seconds else ""}<title>{escape(title)}</title>
<link rel="icon" href="data:,"><style>{style}</style></head><body class="results">
<h1>{escape(heading)}</h1><p class="status">{status}</p>{NO_SCRIPT * has_charts}
{body}
{"".join(f"<script>{_asset(name)}</script>" for name in scripts)}
</body></html>
"""


def shown_path(path: str | Path) -> str:
    """Return the path of a run as typed in a command: relative to the current folder if below it, without its `hf/`."""
    run, here = Path(path), Path.cwd()
    run = run.parent if run.name == "hf" else run
    return str(run.absolute().relative_to(here)) if run.absolute().is_relative_to(here) else str(run)


def section(title: str, content: str) -> str:
    """Render a section; empty without content."""
    return f"<h2>{escape(title)}</h2>{content}\n" if content else ""


def age(patience: float, resume: str = "") -> str:
    """Render the time of the page's last update, for the top of the page of something that is not over.

    Args:
        patience: seconds after which the page shows that its process was probably killed.
        resume: command that continues it; empty: none is shown.
    """
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    again = f"<div>Resume it:</div>{command(resume)}" if resume else ""
    return (
        f'{AGE} data-time="{now:.0f}" data-patience="{patience:.0f}"><p class="status">last update {shown}<span></span>'
        "</p><div hidden><p>It was probably killed: <code>python -m launch.commands.list_runs</code> prints whether it "
        f"is active.</p>{again}</div></div>"
    )


def table(columns: Sequence[tuple[str, str]], rows: Iterable[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """Render a table; on a phone each row is a block whose cells have the names of their columns.

    Args:
        columns: (name, CSS class).
        rows: (HTML attributes, HTML of each cell).
        kind: further CSS class.
    """
    head = "".join(f'<th class="{of}">{escape(name)}</th>' for name, of in columns)
    body = ""
    for attributes, cells in rows:
        named = zip(columns, cells, strict=True)
        own = "".join(f'<td class="{of}" data-name="{escape(name)}">{cell}</td>' for (name, of), cell in named)
        body += f"<tr {attributes}>{own}</tr>"
    return f'<div class="scroll"><table class="grid blocks {kind}"><tr>{head}</tr>{body}</table></div>'


def command(text: str) -> str:
    """Render a command to copy."""
    return f"<pre>{escape(text)}</pre>"


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
