"""Hooks of mkdocs: files outside docs/ that a page links to, and notebooks, become pages of the site.

The Markdown files link to files of the repository by relative paths, as GitHub expects. Here each linked file outside
docs/ becomes a page `source/<path>`, and links to it are changed to that page.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(?=[)#])")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".js": "javascript", ".css": "css"}
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"  # from the index of the search


def repository_path(src_uri: str) -> str:
    """Return the path in the repository of a page of the site."""
    return src_uri.removeprefix("source/") if src_uri.startswith("source/") else f"docs/{src_uri}"


def page_of(path: str) -> str:
    """Return the page, as a path in docs/, of a file of the repository."""
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}" if path.endswith(".md") else f"source/{path or 'repository'}.md"


def linked_files(src_uri: str, markdown: str) -> set[str]:
    """Return the files and folders of the repository, outside docs/, that a page links to."""
    folder = posixpath.dirname(repository_path(src_uri))
    paths = {posixpath.normpath(posixpath.join(folder, target)) for target in LINK.findall(markdown)}
    return {path for path in paths if not path.startswith(("docs/", "..")) and path != "docs"}


def with_site_links(src_uri: str, markdown: str) -> str:
    """Change the relative links of a page to pages of the site."""
    folder = posixpath.dirname(repository_path(src_uri))

    def site_link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        page = "README.md" if target == "docs" else page_of(target)
        return posixpath.relpath(page, posixpath.dirname(src_uri) or ".")

    return LINK.sub(site_link, markdown)


def source_page(path: str) -> str:
    """Return the Markdown of a file outside docs/, or of the list of a folder."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(f"{each.name}{'/' * each.is_dir()}" for each in file.iterdir() if each.name[0] not in "._")
        return f"{HIDDEN}# {path}/\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    if file.suffix == ".md":
        return re.sub(r"^```mermaid$", "```text", file.read_text(), flags=re.MULTILINE)
    return f"{HIDDEN}# {path}\n\n`````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}\n`````\n"


def output_markdown(output: dict[str, Any]) -> str:
    """Return an output of a notebook's cell as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"`````text\n{text}\n`````" if text else ""


def notebook_page(notebook: dict[str, Any]) -> str:
    """Return the Markdown of a notebook with its stored outputs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [output_markdown(output) for output in cell.get("outputs", [])]
    return "\n\n".join(part for part in parts if part) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook and for each linked file outside docs/."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        markdown = notebook_page(json.loads(file.content_string))
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=markdown))
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = files.get_file_from_path(waiting.pop())
        assert page
        for path in linked_files(page.src_uri, page.content_string):
            if (ROOT / path).exists() and not files.get_file_from_path(page_of(path)):
                files.append(File.generated(config, page_of(path), content=source_page(path)))
                waiting.append(page_of(path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change the links of each page."""
    return with_site_links(page.file.src_uri, markdown)
