"""Text metrics agree with the packages that define them."""

import math
import subprocess
import sys
from itertools import islice

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import chrf_score, sacre_bleu_score

from datamodules.documents import stdlib_corpus
from datamodules.function_pairs import function_rows
from gpt2lab.evaluation.bootstrap import text_scores
from gpt2lab.evaluation.text_metrics import PLACEHOLDER, TEXT_METRICS
from tests.support.text_values import text_metrics

OF_TEXT = tuple(name for name in TEXT_METRICS if name not in ("compiles", "placeholders"))
ZH_REFERENCES = ["打开文件时出错。", "没有这样的文件或目录", "无法创建临时文件"]
ZH_PREDICTIONS = ["打开文件出错。", "没有这个文件或目录", "不能创建 temp 文件"]


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    """60 summaries of the standard library and imperfect predictions: truncated, of another text, one empty."""
    rows = (row for document in stdlib_corpus().documents() for row in function_rows(document.text))
    references = [row["summary"] for row in islice(rows, 60)]
    predictions = [
        text if number % 5 == 0 else text[: len(text) * 2 // 3] if number % 2 else references[number - 1]
        for number, text in enumerate(references)
    ]
    predictions[7] = ""
    return predictions, references


def test_rouge_equals_rouge_score(texts):
    predictions, references = texts
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    each = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)]
    ours = text_metrics(names, predictions, references)
    for name in names:
        theirs = 100 * sum(score[name].fmeasure for score in each) / len(each)
        assert ours[name] == pytest.approx(theirs, abs=1e-3)
        assert 10 < ours[name] < 100


def test_bleu_equals_torchmetrics_own_sacrebleu(texts):
    predictions, references = texts
    theirs = 100 * sacre_bleu_score(predictions, [[text] for text in references]).item()
    assert text_metrics(["bleu"], predictions, references)["bleu"] == pytest.approx(theirs, abs=1e-3)


def test_bleu_counts_chinese_characters_as_words():
    theirs = 100 * sacre_bleu_score(ZH_PREDICTIONS, [[text] for text in ZH_REFERENCES], tokenize="zh").item()
    ours = text_metrics(["bleu"], ZH_PREDICTIONS, ZH_REFERENCES)["bleu"]
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours > 10


def test_chrf_equals_torchmetrics_on_overlapping_texts(texts):
    pairs = [
        (prediction, reference) for prediction, reference in zip(*texts, strict=True) if prediction[:9] == reference[:9]
    ]
    predictions, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    theirs = 100 * chrf_score(predictions, [[text] for text in references], n_word_order=0).item()
    # Smoothing differs in the fourth digit.
    assert text_metrics(["chrf"], predictions, references)["chrf"] == pytest.approx(theirs, abs=0.02)


def test_chrf_counts_references_without_any_match():
    predictions, references = ["abcdefgh", "zzzzzzzz"], ["abcdefgh", "ijklmnop"]
    # Each order n: half of the n-grams match on both sides, so precision = recall = F = 1/2.
    assert text_metrics(["chrf"], predictions, references) == {"chrf": pytest.approx(50)}


def test_exact_ignores_white_space_at_the_ends():
    assert text_metrics(["exact"], [" a b\n", "a  b"], ["a b", "a b"]) == {"exact": 50.0}


def test_a_perfect_prediction_scores_100_in_every_metric(texts):
    _, references = texts
    assert text_metrics(OF_TEXT, references, references) == {name: pytest.approx(100, abs=1e-3) for name in OF_TEXT}


def test_empty_predictions_score_0_and_do_not_fail():
    assert text_metrics(OF_TEXT, ["", ""], ["one two three four", "five"]) == dict.fromkeys(OF_TEXT, 0.0)


def test_unknown_names_and_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="allowed: rouge1"):
        text_metrics(["meteor"], ["a"], ["a"])
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        text_metrics(["exact"], ["a"], ["a", "b"])


def test_the_module_itself_does_not_import_torchmetrics():
    program = (
        "import sys, gpt2lab.evaluation.text_metrics; sys.exit('torchmetrics' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_compiles_counts_valid_function_bodies():
    bodies = ["    return 1", "    await x\n    return 2", "return 1", "    if x:", "    yield 1\n\n    return 3", ""]
    assert text_metrics(["compiles"], bodies, bodies) == {"compiles": pytest.approx(50)}


def test_every_body_of_the_standard_library_compiles():
    rows = (row for document in stdlib_corpus().documents() for row in function_rows(document.text))
    bodies = [row["body"] for row in islice(rows, 400)]
    assert text_metrics(["compiles"], bodies, bodies)["compiles"] > 99  # `nonlocal` needs an enclosing function


def test_accuracy_and_macro_f1_equal_torchmetrics():
    from torchmetrics.functional.classification import multiclass_f1_score

    references = ["spam", "ham", "ham", "eggs", "ham", "spam"]
    predictions = ["spam", "ham", " spam", "ham", "ham", "spam"]
    scores = text_metrics(["accuracy", "f1"], predictions, references)
    assert scores["accuracy"] == pytest.approx(100 * 4 / 6)
    numbers = {"spam": 0, "ham": 1, "eggs": 2}
    ours, theirs = (torch.tensor([numbers[text.strip()] for text in texts]) for texts in (predictions, references))
    assert scores["f1"] == pytest.approx(100 * float(multiclass_f1_score(ours, theirs, 3, average="macro")), abs=1e-3)
    assert text_metrics(["f1"], ["no label at all", "ham"], ["spam", "ham"])["f1"] == pytest.approx(50)


def test_placeholders_must_each_appear_once():
    references = ["%s von %d", "kein Platz", "{name}: %(count)d %%", "%5.2f", "%s in %s"]
    predictions = ["%d aus %s", "%s", "{name}: %(count)d", "%5.2f Euro", "in %s"]
    assert text_metrics(["placeholders"], predictions, references)["placeholders"] == pytest.approx(100 * 2 / 4)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("%2$s of %1$ld", ["%2$s", "%1$ld"]),
        ("%-5.2f %*d %.*s %%", ["%-5.2f", "%*d", "%.*s", "%%"]),
        ("%zu at %(place)s", ["%zu", "%(place)s"]),
        ("{} {0} {name!r:>8}", ["{}", "{0}", "{name!r:>8}"]),
        ("100 % of {a, b}", []),
    ],
)
def test_placeholders_of_printf_and_of_format_are_known(text: str, found: list[str]) -> None:
    assert PLACEHOLDER.findall(text) == found


def test_placeholders_without_any_in_references_have_no_score():
    assert math.isnan(text_metrics(["placeholders"], ["%s", "nichts"], ["nothing", "none"])["placeholders"])
    found = text_scores(["placeholders", "exact"], ["%s", "nichts"], ["nothing", "none"])
    assert found["placeholders"].value is found["placeholders"].standard_error is None
    assert found["exact"].value == 0
