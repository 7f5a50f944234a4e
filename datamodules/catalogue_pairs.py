"""Rows of parallel text in gettext catalogues, `.mo` and `.po`: columns `source` (message) and `target` (translation).

Left out: headers, messages that are translated by themselves, fuzzy and obsolete entries, all plural forms but the
first, and repetitions of a pair.
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

from gpt2lab.errors import InputError

log = logging.getLogger(__name__)

SYSTEM_FOLDER = "/usr/share/locale"
SUFFIXES = (".mo", ".po")
CONTEXT_END = "\x04"  # gettext puts a message's context before it, ended by this
PO_CHARSET = re.compile(rb'^"Content-Type:[^"\n]*charset=([\w.:-]+)', re.MULTILINE | re.IGNORECASE)  # of the header
PO_LINE = re.compile(r'(?P<keyword>msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)?\s*(?P<text>".*")\s*$')


def catalogue_files(path: str, language: str) -> list[Path]:
    """The catalogues of `language` in the folder `path`, in a fixed order, or `path` itself where it is one.

    A catalogue belongs to a language by a folder of that name above it (`de/LC_MESSAGES/x.mo`) or by its own (`de.po`).

    Raises:
        InputError: no such path, no catalogue, or none of that language.
    """
    path = path or SYSTEM_FOLDER
    root = Path(path).expanduser()
    if root.is_file() and root.suffix in SUFFIXES:
        return [root]
    if not root.is_dir():
        raise InputError(
            f"path={path} is neither a folder of gettext catalogues nor a .mo or .po file.\n{_cure(language)}"
        )
    catalogues = sorted(file for suffix in SUFFIXES for file in root.rglob(f"*{suffix}"))
    chosen = [file for file in catalogues if language in _languages(file, root)]
    if not chosen:
        counts: dict[str, int] = {}
        for file in catalogues:
            for name in _languages(file, root):
                counts[name] = counts.get(name, 0) + 1
        known = sorted(counts, key=lambda name: -counts[name])
        found = f"Languages there: {', '.join(known[:12])}." if known else "It holds no .mo or .po file at all."
        raise InputError(f"No catalogue of language {language!r} under {path}.\n{found}\n{_cure(language)}")
    return chosen


def _languages(file: Path, root: Path) -> set[str]:
    folders = [part for part in file.relative_to(root).parts[:-1] if part not in ("LC_MESSAGES", "LC_TIME")]
    return {folders[-1] if folders else file.stem}


def _cure(language: str) -> str:
    return (
        f"Choose another data.language, or give path= a folder with {language}/LC_MESSAGES/*.mo or {language}.po,\n"
        "or a table (.tsv .jsonl …). Container images often leave translations out; any translated project holds some."
    )


def catalogue_rows(files: Iterable[Path], seen: set[bytes] | None = None) -> Iterator[dict[str, str]]:
    """Yield each distinct pair once, keeping 16 bytes of hash for it. Broken files are named, then passed over.

    Args:
        seen: hashes of pairs that were yielded before; grows.
    """
    seen = set() if seen is None else seen
    for file in files:
        try:
            pairs = list(_mo_pairs(file) if file.suffix == ".mo" else _po_pairs(file))
        except (OSError, LookupError, ValueError, SyntaxError, struct.error) as error:
            log.warning("%s is not a readable catalogue and is left out: %s", file, error)
            continue
        for source, target in pairs:
            source = source.rpartition(CONTEXT_END)[2]
            digest = blake2b(f"{source}\0{target}".encode(), digest_size=16).digest()
            if source.strip() and target.strip() and source != target and digest not in seen:
                seen.add(digest)
                yield {"source": source, "target": target}


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
    """The same catalogue, "?" for every other byte of its header: the stdlib takes headers, not messages, for UTF-8."""
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
    """Entries are blocks of lines `keyword "text"`, continued by lines `"text"`."""
    fuzzy, field = False, ""
    entry: dict[str, str] = {}
    content = file.read_bytes()
    charset = PO_CHARSET.search(content)
    text = content.decode(charset[1].decode() if charset and charset[1] != b"CHARSET" else "utf-8")
    for line in [*text.splitlines(), 'msgid ""']:
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
        # PO strings are escaped as in C, which Python reads the same way.
        entry[field] = entry.get(field, "") + ast.literal_eval(match["text"])


def _po_entry(entry: dict[str, str], fuzzy: bool) -> Iterator[tuple[str, str]]:
    if not fuzzy and "msgid" in entry and "msgstr" in entry:
        yield entry["msgid"], entry["msgstr"]
