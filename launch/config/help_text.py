"""Help text of train.py --help: all groups with their choices and all top-level keys, read from conf/."""

from launch.config.groups import CONF, groups, values

HEAD = """train.py: pretrain, distill or fine-tune a GPT-2.

  python train.py                                                       pretrain nano on the standard library's source
  python train.py task=distill model=nano teacher=RUN_DIR               distill a trained run into a small model
  python train.py task=finetune init=RUN_DIR data=summarize             fine-tune on pairs
  python train.py -m model=nano,micro optimizer.lr=1e-3,3e-3            a sweep: every combination
  python train.py --cfg job                                             the whole configuration, keys of groups included
"""


def help_text() -> str:
    """Return example commands, groups and top-level keys."""
    return f"{HEAD}\nGroups (group=value, the default in brackets)\n\n{_groups()}\n\nKeys (key=value)\n\n{_keys()}"


def _groups() -> str:
    defaults = _defaults()
    lines = []
    for group in groups():
        shown = [f"[{value}]" if value == defaults.get(group) else value for value in values(group)]
        lines.append(f"  {group:<11}{' '.join(shown)}")
    return "\n".join(lines)


def _defaults() -> dict[str, str]:
    """Return {group: default}, from the lines `  - group: value` of conf/train.yaml."""
    pairs = [line.strip()[2:].partition(": ") for line in _lines() if line.startswith("  - ") and ": " in line]
    return {group: value for group, _, value in pairs}


def _keys() -> str:
    """Return the top-level keys of conf/train.yaml, with their comments."""
    lines = _lines()
    start = next(number for number, line in enumerate(lines) if line.startswith("# Run directory"))
    return "\n".join(f"  {line}".rstrip() for line in lines[start : lines.index("hydra:")])


def _lines() -> list[str]:
    return (CONF / "train.yaml").read_text(encoding="utf-8").splitlines()
