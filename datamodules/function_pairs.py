"""Rows of the Python functions in source files.

Columns: `name`; `code` (signature and body without the docstring); `body` (without signature and docstring); `summary`
(first line of the docstring); `docstring`; `stub` (signature and docstring as written; stub + "\\n" + body is the
whole function).
"""

import ast
import warnings
from collections.abc import Iterator


def function_rows(source: str) -> Iterator[dict[str, str]]:
    """Yield a row for every function with a docstring and a body, in order.

    A source that this interpreter cannot parse has no rows: an installation contains some on purpose.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    # ast counts these lines; splitlines would also split at form feeds.
    lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(functions, key=lambda function: function.lineno):
        row = _row(node, lines)
        if row is not None:
            yield row


def _row(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> dict[str, str] | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    text = node.body[0]
    # One-liners such as `def f(): "text"; return 1` cannot be split by lines.
    if text.lineno == node.lineno or node.body[1].lineno == text.end_lineno or text.end_lineno is None:
        return None
    signature = lines[node.lineno - 1 : text.lineno - 1]
    body = lines[text.end_lineno : node.end_lineno]
    indent = " " * node.col_offset
    return {
        "name": node.name,
        "code": _dedent(signature + body, indent),
        "body": _dedent(body, indent),
        "summary": docstring.strip().splitlines()[0].strip(),
        "docstring": docstring,
        "stub": _dedent(lines[node.lineno - 1 : text.end_lineno], indent),
    }


def _dedent(lines: list[str], indent: str) -> str:
    """Remove the indentation of the `def`; less indented lines inside multi-line strings are unchanged."""
    return "\n".join(line.removeprefix(indent) for line in lines).strip("\n")
