"""Study table: terminal output of a distillation study."""

from gpt2lab.analysis.study_results import TIME, TOKENS, ArmResult, Contrast, LearningRates, StudyResults
from gpt2lab.number_format import fixed, significant

HEADINGS = {TOKENS: "At equal tokens", TIME: "At equal time: CE for as long as KD took"}
ERRORS = "± of a loss: standard deviation over seeds. ± documents: standard error between validation documents."
CAUTION = "Intervals are not corrected for multiple comparisons: of 20 true ties, about one appears as a difference."


def format_study(results: StudyResults) -> str:
    """Format the table of arms, the learning rates that were tried, and all verdicts."""
    lines = ["", *_arms(results), "", ERRORS, ""]
    for rates in results.learning_rates:
        lines += _rates(rates, rates.arm if len(results.learning_rates) > 1 else "all runs")
    for budget, heading in HEADINGS.items():
        found = [contrast for contrast in results.contrasts if contrast.budget == budget]
        lines += ["", f"Verdicts. {heading}"] if found else []
        lines += [line for contrast in found for line in _contrast(contrast)]
    lines += ["", CAUTION] if results.contrasts else []
    if results.failed_runs:
        lines += ["", "Runs that did not finish", *(f"  {run}" for run in results.failed_runs)]
    return "\n".join([*lines, ""])


def _arms(results: StudyResults) -> list[str]:
    teacher = "" if results.teacher_loss is None else f" (validation loss {significant(results.teacher_loss)})"
    seeds = ", ".join(map(str, results.seeds))
    lines = [f"Teacher: {results.teacher}{teacher}", f"Seeds: {seeds}", ""]
    lines += [f"  {'':<22}{'validation loss':<24}{'± documents':>11}{'steps':>8}{'seconds':>9}"]
    for budget, heading in HEADINGS.items():
        of_budget = [result for result in results.arms if result.budget == budget]
        lines += [heading, *(_arm(result, results.decimals) for result in of_budget)] if of_budget else []
    return lines


def _arm(result: ArmResult, decimals: int) -> str:
    found = result.summary
    score = "no run finished" if found.mean is None else fixed(found.mean, decimals)
    score += "" if found.sd is None else f" ± {significant(found.sd)}"
    missing = len(result.losses) - found.n
    score += f"  ({missing} failed)" if missing and found.n else ""
    seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
    documents = "" if result.document_error is None else significant(result.document_error)
    return f"  {result.arm.name:<22}{score:<24}{documents:>11}{result.steps:>8}{seconds:>9}"


def _contrast(contrast: Contrast) -> list[str]:
    """The verdict over seeds and, on its own line, the difference paired by document."""
    lines = [f"  {contrast.title}", f"      {contrast.verdict}"]
    return lines if contrast.by_document is None else [*lines, f"      by document: {contrast.by_document}"]


def _rates(rates: LearningRates, runs: str) -> list[str]:
    lines = [f"Learning rate of {runs}: {rates.chosen:g}, the best of {rates.arm} with the first seed"]
    for rate, loss in rates.losses.items():
        lines.append(f"  {rate:<8g}{'failed' if loss is None else fixed(loss, rates.decimals)}")
    if rates.at_the_edge:
        side = "smallest" if rates.at_the_edge == "lower" else "largest"
        hint = f"{rates.arm} may do better still at a {rates.at_the_edge} one (study.lr_factors)."
        lines.append(f"Warning: that is the {side} one tried; {hint}")
    return lines
