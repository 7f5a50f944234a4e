"""The house rules that a machine can keep: who imports whom, where `_target_` stands, what names and calls are banned.

Every rule is a function from a project folder to a list of violations. It is asserted on this project, and a planted
violation proves that it bites.
"""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CORE = "gpt2lab"
MIDDLE = ("lightning_modules", "datamodules", "callbacks")
ENTRY = ("train", "evaluate", "generate", "launch", "hydra_plugins", "benchmarks", "docs")
OWN = (CORE, *MIDDLE, *ENTRY)
NOT_IN_CORE = ("lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb")
CONFIGURATION_LIBRARIES = ("hydra", "omegaconf")
TARGET_SEAMS = ("task", "data", "callbacks", "logger", "trainer")
BANNED_NAMES = ("utils", "util", "common", "helpers", "helper", "misc", "gpt2")
LONGEST_FUNCTION = 100
LONGEST_TEST_NAME = 60
CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
# Functions of tests/ that read a clock only to give up on something that hangs, after a minute or more
HANG_GUARDS = ("chromium.py:Browser", "test_launchers.py:wait_for")
HANG_GUARDS += ("slurm_cluster.py:end", "slurm_cluster.py:wait_until_idle")  # of slow tests alone
SHORTEST_TIMEOUT = 120  # seconds; a machine that does other things too may take long to start a process

# Folders from the bottom up: a file imports from its own folder and from those listed before
LAYERS: tuple[str, ...] = ("gpt2lab", "gpt2lab/storage", "gpt2lab/system", "gpt2lab/optim", "gpt2lab/model")
LAYERS += ("gpt2lab/data", "gpt2lab/losses", "gpt2lab/evaluation", "gpt2lab/generation", "gpt2lab/distillation")
LAYERS += ("gpt2lab/analysis", "gpt2lab/reports", "lightning_modules/plugins", "lightning_modules", "datamodules")
LAYERS += ("callbacks/loggers", "callbacks", "launch/config", "launch", "launch/distributed", "launch/checks")
LAYERS += ("launch/memory", "launch/run", "launch/sweep", "launch/evaluate", "launch/generate", "launch/commands")
LAYERS += ("hydra_plugins", "hydra_plugins/gpt2lab_processes", ".", "docs", "benchmarks")

# A docstring begins with a verb or a noun phrase, not with one of these words or a bracket
NO_SUBJECT = re.compile(
    r"(?:Of|As|What|Those|Who|Whom|Whose|Whoever|Where|Wherever|When|How|Which|That|By|To|For|In|Into|At|With|From|On)\b(?!-)|\("
)
# Personification, and everyday words for the field's terms
NOT_PLAIN = re.compile(
    r"\b(?:told|tells|says|said|asks|asked|asking|hears?|heard|speaks?|wants?|wanted|lets? (?:know|in)|leaves? word|"
    r"looks? (?:at|free)|in vain|by its own word|whoever|nobody|somebody|anybody|hopeless|settled|settles|"
    r"likeliest|likelier|means? no token|vocabulary entr(?:y|ies)|entr(?:y|ies) of (?:the|a|its) vocabulary|"
    r"number formats?|both ways|rehearsals?|knobs?|deeds?|farewells?|mistakes?|mends?|cures?|cut out|cut short|"
    r"goes? on|going on|went on|taken up|takes up|cannot be had|to be had)\b",
    re.IGNORECASE,
)

Rule = Callable[[Path], list[str]]
tree_of = functools.cache(ast.parse)  # every rule reads the same trees


def own_files(root: Path, tests: bool = False) -> list[Path]:
    """Python files of the project, tests only when asked for."""
    folders = [name for name in (*OWN, "tests") if (root / name).is_dir() and (tests or name != "tests")]
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return sorted([*root.glob("*.py"), *files])


def parsed(root: Path, tests: bool = False) -> Iterator[tuple[str, ast.Module]]:
    for path in own_files(root, tests):
        yield path.relative_to(root).as_posix(), tree_of(path.read_text())


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: ast.AST, file: str) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported anywhere below a node, relative imports resolved."""
    package = module_name(file).split(".") if file.endswith("__init__.py") else module_name(file).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}", node.lineno


def top(dotted: str) -> str:
    return dotted.split(".")[0]


def may_import(importer: str, imported: str) -> bool:
    """Entry side → lightning_modules | datamodules | callbacks → gpt2lab; inside its own folder anybody."""
    if importer in ENTRY:
        return True
    return imported in (importer, CORE)


def wrong_way_imports(root: Path) -> list[str]:
    return [
        f"{file}:{line}: {top(file.removesuffix('.py').replace('/', '.'))} may not import {name}"
        for file, tree in parsed(root)
        for name, line in imports(tree, file)
        if top(name) in OWN and not may_import(top(module_name(file)), top(name))
    ]


def upward_imports(root: Path) -> list[str]:
    """Imports from a folder that is no layer below; without one there is no circle between folders either."""
    trees = dict(parsed(root))
    folder_of = {module_name(file): Path(file).parent.as_posix() for file in trees}
    found = []
    for file, tree in trees.items():
        folder = Path(file).parent.as_posix()
        if folder not in LAYERS:
            found.append(f"{file}: {folder} has no place in LAYERS")
            continue
        for name, line in imports_at_run_time(tree, file):
            module = name if name in folder_of else name.rpartition(".")[0]
            imported = folder_of.get(module, folder)
            if imported in LAYERS and LAYERS.index(imported) > LAYERS.index(folder):
                found.append(f"{file}:{line}: {folder} is a layer below {imported} and may not import {module}")
    return found


def imports_at_run_time(tree: ast.Module, file: str) -> Iterator[tuple[str, int]]:
    """Every import, those in functions too, but for those below `if TYPE_CHECKING:`."""
    guarded = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {line for node in guarded for line in range(node.lineno, (node.body[-1].end_lineno or 0) + 1)}
    return ((name, line) for name, line in imports(tree, file) if line not in skipped)


def import_cycles(root: Path) -> list[str]:
    """Cycles between own modules; an import inside a function counts too."""
    trees = dict(parsed(root))
    modules = {module_name(file) for file in trees}
    graph: dict[str, set[str]] = {}
    for file, tree in trees.items():
        names = {name for name, _ in imports(tree, file)}
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module_name(file)] = (targets & modules) - {module_name(file)}
    cycles, done = [], set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            cycles.append(" → ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return cycles


def frameworks_in_the_core(root: Path) -> list[str]:
    """gpt2lab is plain PyTorch and NumPy; torchmetrics, slow to import, only inside the function that needs it."""
    found = []
    for file, tree in parsed(root):
        if top(module_name(file)) != CORE:
            continue
        at_module_level = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for name, line in imports(node, file):
                if top(name) in NOT_IN_CORE or (top(name) == "torchmetrics" and id(node) in at_module_level):
                    found.append(f"{file}:{line}: {name} in the core")
    return found


def configuration_trees_below_the_entry(root: Path) -> list[str]:
    return [
        f"{file}:{line}: {name}: configuration becomes plain arguments in launch/"
        for file, tree in parsed(root)
        for name, line in imports(tree, file)
        if top(module_name(file)) in (CORE, *MIDDLE) and top(name) in CONFIGURATION_LIBRARIES
    ]


def banned_names(root: Path) -> list[str]:
    paths = [path for folder in (*OWN, "tests", "conf") for path in (root / folder).rglob("*")]
    paths += [path for path in root.iterdir() if not path.name.startswith(".")]
    return [
        f"{path.relative_to(root)}: name it after its subject"
        for path in paths
        if "__pycache__" not in path.parts and path.suffix in ("", ".py")
        if path.stem in BANNED_NAMES or path.stem.endswith(("_utils", "_helpers", "_common"))
    ]


def probing_calls(root: Path) -> list[str]:
    """hasattr, and getattr with a default: an attribute is part of a type or it is not there."""
    return [
        f"{file}:{node.lineno}: {ast.unparse(node)[:80]}"
        for file, tree in parsed(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
    ]


# Functions that a library calls with keywords of its own: an attention function of transformers
CALLED_WITH_ANY_KEYWORD = ("gpt2lab/model/short_attention.py:short_attention",)


def keyword_catch_alls(root: Path) -> list[str]:
    return [
        f"{file}:{node.lineno}: {node.name}(**{node.args.kwarg.arg})"
        for file, tree in parsed(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg
        if f"{file}:{node.name}" not in CALLED_WITH_ANY_KEYWORD
    ]


def prints_outside_entry_modules(root: Path) -> list[str]:
    """An entry module is one that can be run (it has an `if __name__ == "__main__"`) or one of launch/, its speaker."""
    found = []
    for file, tree in parsed(root):
        if top(module_name(file)) == "launch":
            continue
        runnable = any(
            isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body
        )
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        found += [f"{file}:{call.lineno}: print" for call in calls if call.func.id == "print" and not runnable]
    return found


def bare_excepts(root: Path) -> list[str]:
    return [
        f"{file}:{node.lineno}: say which exception"
        for file, tree in parsed(root, tests=True)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def giant_functions(root: Path) -> list[str]:
    return [
        f"{file}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for file, tree in parsed(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]


def missing_docstrings(root: Path) -> list[str]:
    return [
        f"{file}: the first line says what the module is"
        for file, tree in parsed(root, tests=True)
        if tree.body and not ast.get_docstring(tree)
    ]


def docstrings_without_a_subject(root: Path) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        f"{file}:{node.body[0].lineno}: begin with a verb or a noun phrase: {docstring.splitlines()[0]}"
        for file, tree in parsed(root)
        for node in ast.walk(tree)
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)) and NO_SUBJECT.match(docstring)
    ]


def words_that_are_not_plain(root: Path) -> list[str]:
    """Words of NOT_PLAIN in docstrings, other strings and comments; a line break counts as a space."""
    found = []
    for path in own_files(root):
        file = path.relative_to(root).as_posix()
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                words = [match[0] for match in NOT_PLAIN.finditer(" ".join(token.string.split()))]
                found += [f"{file}:{token.start[0]}: {word!r}: use the field's term" for word in words]
    return found


def named_tests(root: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (file, line, name) of every test function."""
    for file, tree in parsed(root, tests=True):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield file, node.lineno, node.name


def names_that_are_no_promise(root: Path) -> list[str]:
    """A test is named by its promise, in few and plain words."""
    return [
        f"{file}:{line}: {name}: at most {LONGEST_TEST_NAME} characters, in the field's terms"
        for file, line, name in named_tests(root)
        if len(name) > LONGEST_TEST_NAME or NOT_PLAIN.search(name.replace("_", " "))
    ]


def repeated_tests(root: Path) -> list[str]:
    """A second test of the same name in a file hides the first from pytest."""
    seen: set[tuple[str, str]] = set()
    found = []
    for file, line, name in named_tests(root):
        if (file, name) in seen:
            found.append(f"{file}:{line}: {name} hides another test of this name")
        seen.add((file, name))
    return found


def conf_files(root: Path) -> list[Path]:
    return sorted((root / "conf").rglob("*.yaml"))


def target_paths(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where `_target_` stands in a tree, as the keys above it."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path
        for key, value in node.items():
            yield from target_paths(value, (*path, str(key)))
    elif isinstance(node, list):
        for value in node:
            yield from target_paths(value, (*path, "[]"))


def stray_targets(root: Path) -> list[str]:
    """`_target_` only in the seams: at the top, or one named level below for callbacks and loggers."""
    found = []
    for path in conf_files(root):
        name = path.relative_to(root / "conf").as_posix()
        text = path.read_text()
        if "_partial_" in text:
            found.append(f"{name}: _partial_")
        places = list(target_paths(yaml.safe_load(text)))
        seam = top(name.replace("/", "."))
        depth = 1 if seam in ("callbacks", "logger") else 0
        if text.startswith("# @package _global_"):  # the file spells its own group's key
            places = [place[1:] if place[:1] == (seam,) else ("outside", *place) for place in places]
        for place in places:
            nested = any(other != place and place[: len(other)] == other for other in places)
            if seam not in TARGET_SEAMS or len(place) > depth or nested:
                found.append(f"{name}: _target_ below {'.'.join(place) or 'the top'}")
    return found


def silent_recipes(root: Path) -> list[str]:
    """Every configuration file opens by saying what it is; only Hydra's own `# @package` may stand above."""
    found = []
    for path in conf_files(root):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        if not lines or not lines[0].startswith("# "):
            found.append(str(path.relative_to(root)))
    return found


def is_slow(marks: list[ast.expr]) -> bool:
    """Whether one of these marks leaves a test out of `make test`; a mark of some parameters does not."""
    words = [ast.unparse(mark) for mark in marks]
    return any("parametrize" not in word and ("mark.slow" in word or "mark.chaos" in word) for word in words)


def clocks_in_quick_tests(root: Path) -> list[str]:
    """What `make test` runs reads no clock and gives no process a short time to end: it passes on a busy machine."""
    found = []
    for path in sorted((root / "tests").rglob("*.py")):
        parts = tree_of(path.read_text()).body
        marks = [node.value for node in parts if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
        for part in [] if is_slow(marks) else parts:
            is_named = isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_named and f"{path.name}:{part.name}" in HANG_GUARDS:
                continue
            if is_named and is_slow(part.decorator_list):
                continue
            found += [f"tests/{path.name}:{line}: {why}" for line, why in _clocks(part)]
    return found


def _clocks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "time":
            if node.attr.removesuffix("_ns") in CLOCKS:
                yield node.lineno, f"count work instead of reading time.{node.attr}, or mark the test slow"
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield node.lineno, "import time, so that its clocks are seen"
        elif isinstance(node, ast.keyword) and node.arg == "timeout" and isinstance(node.value, ast.Constant):
            seconds = node.value.value
            if isinstance(seconds, int | float) and seconds < SHORTEST_TIMEOUT:
                yield node.value.lineno, f"timeout={seconds} is short; give {SHORTEST_TIMEOUT} or more"


# Rule, file in which a violation is planted, its text.
PLANTED: list[tuple[Rule, str, str]] = [
    (wrong_way_imports, "gpt2lab/a.py", "def f():\n    from launch import build\n"),
    (wrong_way_imports, "datamodules/a.py", "import callbacks.report\n"),
    (wrong_way_imports, "lightning_modules/a.py", "from datamodules import pairs\n"),
    (wrong_way_imports, "callbacks/a.py", "from train import main\n"),
    (upward_imports, "gpt2lab/losses/a.py", "def f():\n    from gpt2lab.reports import plot\n"),
    (upward_imports, "gpt2lab/misplaced/a.py", "x = 1\n"),
    (upward_imports, "gpt2lab/backbone.py", "from gpt2lab.reports.plot import x\n"),
    (import_cycles, "gpt2lab/backbone.py", "def f():\n    from gpt2lab import loss\n"),
    (import_cycles, "gpt2lab/backbone.py", "from .loss import total\n"),
    (frameworks_in_the_core, "gpt2lab/a.py", "def f():\n    import lightning.pytorch\n"),
    (frameworks_in_the_core, "gpt2lab/a.py", "from torchmetrics.text import ROUGEScore\n"),
    (configuration_trees_below_the_entry, "callbacks/a.py", "from omegaconf import DictConfig\n"),
    (banned_names, "gpt2lab/utils.py", ""),
    (banned_names, "callbacks/plot_utils.py", ""),
    (banned_names, "gpt2/model.py", ""),
    (banned_names, "datamodules/gpt2/model.py", ""),
    (probing_calls, "gpt2lab/a.py", "x = getattr(object(), 'weight', None)\n"),
    (probing_calls, "launch/a.py", "x = hasattr(object(), 'weight')\n"),
    (keyword_catch_alls, "gpt2lab/a.py", "def f(a, **options):\n    pass\n"),
    (prints_outside_entry_modules, "callbacks/a.py", "def f():\n    print('x')\n"),
    (bare_excepts, "gpt2lab/a.py", "try:\n    pass\nexcept:\n    pass\n"),
    (giant_functions, "gpt2lab/a.py", "def f():\n" + "    x = 1\n" * 100),
    (missing_docstrings, "gpt2lab/a.py", "x = 1\n"),
    (docstrings_without_a_subject, "gpt2lab/model/b.py", '"""What a model is."""\n'),
    (docstrings_without_a_subject, "datamodules/a.py", 'def f():\n    """(B, T) → (B, V)."""\n'),
    (docstrings_without_a_subject, "callbacks/loggers/a.py", 'class A:\n    """Of a run."""\n'),
    (words_that_are_not_plain, "gpt2lab/model/b.py", '"""A run that is\ntold what to do."""\n'),
    (words_that_are_not_plain, "datamodules/a.py", 'x = f"The likeliest of {1}"\n'),
    (words_that_are_not_plain, "benchmarks/a.py", "x = 1  # nobody reads it\n"),
    (words_that_are_not_plain, "gpt2lab/losses/a.py", '"""Head of 50,304 vocabulary entries."""\n'),
    (names_that_are_no_promise, "tests/test_a.py", f"def test_{'a' * 56}():\n    pass\n"),
    (names_that_are_no_promise, "tests/test_a.py", "def test_a_mistake_is_told():\n    pass\n"),
    (repeated_tests, "tests/test_a.py", "def test_a():\n    pass\n\n\ndef test_a():\n    pass\n"),
    (stray_targets, "conf/model/a.yaml", "# a\n_target_: x.Y\n"),
    (stray_targets, "conf/task/a.yaml", "# a\n_target_: x.Y\nloss:\n  _target_: x.Z\n"),
    (stray_targets, "conf/task/a.yaml", "# @package _global_\n_target_: x.Y\n"),
    (stray_targets, "conf/callbacks/a.yaml", "# a\nreport:\n  _target_: x.Y\n  writer:\n    _target_: x.Z\n"),
    (stray_targets, "conf/task/a.yaml", "# a\n_target_: x.Y\n_partial_: true\n"),
    (clocks_in_quick_tests, "tests/test_a.py", "def test_a():\n    start = time.perf_counter()\n"),
    (
        clocks_in_quick_tests,
        "tests/test_a.py",
        "@pytest.mark.parametrize('a', [1])\ndef test_a(a):\n    time.time_ns()\n",
    ),
    (clocks_in_quick_tests, "tests/test_a.py", "from time import monotonic\n"),
    (clocks_in_quick_tests, "tests/test_a.py", "def ended(process):\n    process.wait(timeout=5)\n"),
    (silent_recipes, "conf/task/a.yaml", "_target_: x.Y\n"),
    (silent_recipes, "conf/task/a.yaml", "# @package _global_\nsteps: 3\n"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in PLANTED))

# A small project that keeps every rule.
KEPT = {
    "train.py": '"""Entry."""\nfrom launch import job\nif __name__ == "__main__":\n    print(job)\n',
    "launch/job.py": '"""Jobs."""\nfrom omegaconf import OmegaConf\nfrom callbacks import report\nimport datamodules\n',
    "callbacks/report.py": '"""Report."""\nimport lightning\nfrom gpt2lab.backbone import Backbone\n',
    "datamodules/pairs.py": '"""Pairs."""\nfrom gpt2lab import loss\n',
    "gpt2lab/backbone.py": '"""Backbone."""\nimport torch\ngetattr(torch, "float32")\n',
    "gpt2lab/loss.py": '"""Loss."""\nfrom gpt2lab.backbone import Backbone\ndef f():\n    import torchmetrics\n',
    "gpt2lab/reports/plot.py": '"""Plot."""\nfrom gpt2lab import loss\n',
    "gpt2lab/model/a.py": '"""A."""\nif TYPE_CHECKING:\n    from gpt2lab.reports.plot import x\n',
    "tests/test_speed.py": '"""Speed."""\n@pytest.mark.slow\ndef test_a():\n    time.time()\n    wait(timeout=5)\n',
    "tests/test_kills.py": f'"""Kills."""\npytestmark = pytest.mark.chaos\ndef test_{"a" * 55}():\n    time.time()\n',
    "conf/task/pretrain.yaml": "# Pretraining.\n_target_: lightning_modules.pretrain.Pretrain\n",
    "conf/callbacks/default.yaml": "# What is observed.\nreport:\n  _target_: callbacks.report.Report\n",
    "conf/experiment/quick.yaml": "# @package _global_\n# Quick.\nsteps: 3\n",
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_project_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_project_that_keeps_the_rules_passes(rule: Rule, tmp_path: Path) -> None:
    write(tmp_path, KEPT)
    assert rule(tmp_path) == []


@pytest.mark.parametrize(
    ("rule", "file", "text"), PLANTED, ids=[f"{rule.__name__}-{number}" for number, (rule, _, _) in enumerate(PLANTED)]
)
def test_a_planted_violation_is_found(rule: Rule, file: str, text: str, tmp_path: Path) -> None:
    write(tmp_path, KEPT | {file: text})
    found = rule(tmp_path)
    assert found
    assert any(Path(file).parts[0] in line or Path(file).stem in line for line in found)
