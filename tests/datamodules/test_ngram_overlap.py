"""The share of the validation text's 13-grams in the training text: equal to that of sets, with bounded memory."""

import json
import os
import random
import re
from pathlib import Path

import pytest

from datamodules.documents import Document
from datamodules.ngram_overlap import BLOCK, NgramOverlap
from gpt2lab.storage.prepared_cache import read_ledger
from tests.conftest import Train
from tests.datamodules.test_documents import text_data
from tests.datamodules.test_pair_sources import make

SOURCE = "".join(Path(os.__file__).with_name(name).read_text() for name in ("argparse.py", "heapq.py", "textwrap.py"))
CHINESE = "河上有一座桥。他们在桥上等了一个小时，然后回家了。"
RUSSIAN = "Окно в доме у реки. Лампа стоит на камне, и мы ждём её. Потом — домой, через мост, ещё раз."
WORD = re.compile("[\u4e00-\u9fff]|[^\\W\u4e00-\u9fff]+")


def thirteens(text: str) -> list[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return [tuple(words[start : start + 13]) for start in range(len(words) - 12)]


def share(train: list[str], val: list[str], **arguments: int) -> float | None:
    overlap = NgramOverlap(**arguments)
    documents = [*(("train", text) for text in train), *(("val", text) for text in val)]
    random.Random(0).shuffle(documents)
    assert len(list(overlap.documents((side, Document(text, text)) for side, text in documents))) == len(documents)
    return overlap.share()


LINES = SOURCE.splitlines(keepends=True)
TEXTS = [
    ([SOURCE], [SOURCE]),
    ([SOURCE], ["".join(LINES[::2])]),
    (["".join(LINES[100:900])], ["".join(LINES[:500]), "".join(LINES[700:1200])]),
    ([SOURCE[:5000]], [RUSSIAN, CHINESE, SOURCE[4000:8000]]),
    ([RUSSIAN + CHINESE], [CHINESE + RUSSIAN]),
    ([SOURCE.upper()], [re.sub(r"[^\w\s]", " ", SOURCE)]),
    (["one two three"] * 9, ["one two three " * 9]),  # no 13-gram spans two documents
    (["a b c d e f g h i j k l m " * 2], [" ".join("abcdefghijklm")]),
]


@pytest.mark.parametrize(("train", "val"), TEXTS)
def test_overlap_equals_that_of_sets_of_words(train: list[str], val: list[str]) -> None:
    known = {gram for text in train for gram in thirteens(text)}
    found = [gram for text in val for gram in thirteens(text)]
    assert share(train, val) == pytest.approx(sum(gram in known for gram in found) / len(found))


def test_overlap_of_short_texts_is_unknown() -> None:
    assert share([SOURCE], ["only twelve words are in this text so it has no gram"]) is None
    assert share([SOURCE], []) is None


def test_overlap_of_a_sample_is_close_to_the_whole() -> None:
    rows = [" ".join(str(number * 40 + word) for word in range(40)) for number in range(4000)]
    estimate = share(rows, [*rows[:300], *(row.replace(" ", " x") for row in rows[:700])], sample=2**13)
    assert estimate == pytest.approx(0.3, abs=0.05)


def test_long_document_in_pieces_counts_like_a_whole() -> None:
    overlap, words = NgramOverlap(), " ".join(str(number) for number in range(BLOCK // 4))
    for side in ("train", "val"):
        for start in range(0, len(words), 2**16):
            overlap.add(side, words[start : start + 2**16], continues=start > 0)
    assert overlap.share() == 1.0


def test_overlap_is_stored_reported_and_planned(train_here: Train, tiny: list[str], tmp_path: Path) -> None:
    for name, text in (("train", SOURCE), ("val", "".join(LINES[:400]) + RUSSIAN * 30)):
        (tmp_path / f"{name}.txt").write_text(text)
    words = [word for word in tiny if not word.startswith(("path=", "val_fraction="))]
    words += ["path=train.txt", "val_path=val.txt", "steps=2"]
    plan = ("plan=true", "plan_memory=80", "accelerator=gpu", "devices=1")  # of another machine: nothing is measured
    assert re.search(r"overlap +\? +of the validation", train_here(*words, *plan).stdout)
    done = train_here(*words, "run_dir=run")
    assert done.code == 0, done.stderr
    known, grams = set(thirteens(SOURCE)), thirteens((tmp_path / "val.txt").read_text())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = report["data"]["val_overlap"]
    assert found == pytest.approx(sum(gram in known for gram in grams) / len(grams))
    assert f"{found:.1%} of the 13-grams".replace("%", " %") in done.stderr
    assert f"<b>{found:.1%}</b>" in (tmp_path / "run" / "report.html").read_text()
    assert f"{found:.1%}" in train_here(*words, *plan).stdout


def test_overlap_of_pairs_covers_source_and_target(tmp_path: Path) -> None:
    rows = [{"source": f"question {number}", "target": " ".join(LINES[:9])} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(tmp_path / "a.jsonl", tmp_path / "cache").prepare()
    (folder,) = [path for path in (tmp_path / "cache" / "tokenized_pairs").iterdir() if path.is_dir()]
    assert 0.8 < read_ledger(folder)["val_overlap"] < 1


def test_words_of_a_text_column_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": SOURCE}) + "\n" for _ in range(2)))
    (tmp_path / "v.jsonl").write_text(json.dumps({"text": SOURCE}))
    facts = text_data(tmp_path / "a.jsonl", tmp_path / "cache", val_path=str(tmp_path / "v.jsonl")).prepare()
    assert facts.val_overlap == 1.0
