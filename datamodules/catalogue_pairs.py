"""Rows of parallel text in gettext catalogues, `.mo` and `.po`.

Columns: `source` (message), `target` (translation) and `file` (path of the catalogue).

Skipped: headers, messages equal to their translation, fuzzy and obsolete entries, all plural forms but the first, and
repeated pairs.
"""

import ast
import gettext
import io
import logging
import re
import struct
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from datamodules.text_decoding import decode
from gpt2lab.errors import InputError

log = logging.getLogger(__name__)

SYSTEM_FOLDER = "/usr/share/locale"
SUFFIXES = (".mo", ".po")
CONTEXT_END = "\x04"  # gettext prefixes a message with its context and this separator
PO_CHARSET = re.compile(rb'^"Content-Type:[^"\n]*charset=([\w.:-]+)', re.MULTILINE | re.IGNORECASE)  # of the header
PO_LINE = re.compile(r'(?P<keyword>msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)?\s*(?P<text>".*")\s*$')


def catalogue_files(path: str, language: str) -> list[Path]:
    """Return the catalogues of `language` in the folder `path`, sorted, or `path` itself if it is a catalogue.

    The language is the name of a folder above the catalogue (`de/LC_MESSAGES/x.mo`) or of the file (`de.po`).

    Raises:
        InputError: no such path, no catalogue, or none of that language.
    """
    path = path or SYSTEM_FOLDER
    root = Path(path).expanduser()
    if root.is_file() and root.suffix in SUFFIXES:
        return [root]
    if not root.is_dir():
        raise InputError(
            f"path={path} is neither a folder of gettext catalogues nor a .mo or .po file.\n{_advice(language)}"
        )
    catalogues = sorted(file for suffix in SUFFIXES for file in root.rglob(f"*{suffix}"))
    chosen = [file for file in catalogues if language in _languages(file, root)]
    if not chosen:
        counts: dict[str, int] = {}
        for file in catalogues:
            for name in _languages(file, root):
                counts[name] = counts.get(name, 0) + 1
        known = sorted(counts, key=lambda name: -counts[name])
        found = f"Languages found: {', '.join(known[:12])}." if known else "It contains no .mo or .po file."
        raise InputError(f"No catalogue of language {language!r} under {path}.\n{found}\n{_advice(language)}")
    return chosen


def _languages(file: Path, root: Path) -> set[str]:
    folders = [part for part in file.relative_to(root).parts[:-1] if part not in ("LC_MESSAGES", "LC_TIME")]
    return {folders[-1] if folders else file.stem}


def _advice(language: str) -> str:
    return (
        f"Choose another data.language, or give path= a folder with {language}/LC_MESSAGES/*.mo or {language}.po,\n"
        "or a table (.tsv .jsonl …). Container images often lack translations; any translated project has some."
    )


def catalogue_rows(files: Iterable[Path]) -> Iterator[dict[str, str]]:
    """Yield each distinct pair once, storing a 16-byte hash of it. Unreadable files are logged and skipped."""
    seen: set[bytes] = set()
    for file in files:
        try:
            pairs = list(_mo_pairs(file) if file.suffix == ".mo" else _po_pairs(file))
        except (OSError, LookupError, ValueError, SyntaxError, struct.error) as error:
            log.warning("%s is not a readable catalogue and is skipped: %s", file, error)
            continue
        for source, target in pairs:
            source = source.rpartition(CONTEXT_END)[2]
            digest = blake2b(f"{source}\0{target}".encode(), digest_size=16).digest()
            if source.strip() and target.strip() and source != target and digest not in seen:
                seen.add(digest)
                yield {"source": source, "target": target, "file": str(file)}


def _mo_pairs(file: Path) -> Iterator[tuple[str, str]]:
    stream = io.BytesIO(_with_ascii_header(file.read_bytes()))
    # The stdlib parses catalogues but has no public way to list their messages.
    messages: dict[str | tuple[str, int], str] = vars(gettext.GNUTranslations(stream))["_catalog"]
    for message, translation in messages.items():
        if isinstance(message, str):
            yield message, translation
        elif message[1] == 0:  # plural forms are listed as (message, number of the form)
            yield message[0], translation


def _with_ascii_header(content: bytes) -> bytes:
    """Replace the non-ASCII bytes of the header by "?": the stdlib decodes headers, unlike messages, as UTF-8."""
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    if len(content) < 28:
        return content
    count, sources, targets = struct.unpack(f"{order}3I", content[8:20])
    if not count or content[sources : sources + 4] != bytes(4):  # the header is the translation of the empty message
        return content
    length, start = struct.unpack(f"{order}2I", content[targets : targets + 8])
    header = bytes(byte if byte < 128 else ord("?") for byte in content[start : start + length])
    return content[:start] + header + content[start + len(header) :]


def _po_pairs(file: Path) -> Iterator[tuple[str, str]]:
    """Parse entries: blocks of lines `keyword "text"`, continued by lines `"text"`."""
    fuzzy, field = False, ""
    entry: dict[str, str] = {}
    content = file.read_bytes()
    charset = PO_CHARSET.search(content)
    declared = charset[1].decode() if charset and charset[1] != b"CHARSET" else ""
    text = content.decode(declared) if declared else decode(content)[0]
    for line in [*text.removeprefix("\ufeff").split("\n"), 'msgid ""']:
        match = PO_LINE.match(line)
        if match is None:
            if line.startswith("#,"):
                yield from _po_entry(entry, fuzzy)
                fuzzy, entry = "fuzzy" in line, {}
            continue
        keyword = match["keyword"]
        if keyword in ("msgctxt", "msgid") and "msgstr" in entry:
            yield from _po_entry(entry, fuzzy)
            fuzzy, entry = False, {}
        if keyword:
            field = "msgstr" if keyword == "msgstr[0]" else keyword
            entry[field] = ""
        # PO strings have C escapes, which Python literals share.
        entry[field] = entry.get(field, "") + ast.literal_eval(match["text"])


def _po_entry(entry: dict[str, str], fuzzy: bool) -> Iterator[tuple[str, str]]:
    if not fuzzy and "msgid" in entry and "msgstr" in entry:
        yield entry["msgid"], entry["msgstr"]
