#!/usr/bin/env python3
"""Write docs/configuration.md from the table of options; `--check` only tells whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from baton.command_line import describe_default
from baton.option import Option
from baton.options import OPTIONS, ROLES
from baton.vllm_names import ELSEWHERE

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

Written by `scripts/configuration_doc.py` from the table in `baton/options.py`; a test keeps the two together.

Every option can be given in three ways. The command line wins over the environment, and that over the file:

| way | example |
|---|---|
| command line | `baton serve smollm2 --max-num-seqs 32` |
| environment | `BATON_MAX_NUM_SEQS=32` (several: with commas) |
| YAML file named by `--config` or `BATON_CONFIG` | `max-num-seqs: 32`, `_` for `-` as you like (or a list) |

One file may serve every command: each takes what it knows of. A name that no command knows is an error, a `BATON_`
variable that is very like one of these is spoken of and not read. `model` (or `BATON_MODEL`, `--model`) stands for the
MODEL argument. Each worker reads the same options; `baton serve` hands its own on to the
router and the workers it starts, as their command lines.

MODEL is a directory of safetensors, a `.gguf` file, a hub id `ORG/NAME[@REVISION]`, `dummy:CONFIG` (random weights for
a config.json), or `smollm2` (SmolLM2-135M-Instruct out of the package index). For the hub, `HF_HOME`, `HF_HUB_OFFLINE`
and `HF_TOKEN` mean what they mean elsewhere.
"""


RELOADING = """\
## While a server runs

SIGHUP to `baton serve`, or to a role, reads the file and the other sources again and ends nothing. At once change
{names}.
`baton serve` passes them on to its children, also to one that is started again. A change of anything else is named in
the log and waits for a restart; where any value cannot be used, nothing changes, and one line says why. Key files are
read again by themselves, too. A server, and `baton run-batch`, also outlive the terminal that they were started from.
"""

FROM_VLLM = """\
## Coming from vLLM

Many options have the same name there, and those above that say so are taken under vLLM's name too, in files, in
variables (`BATON_` and the name) and in Python. Under that name `--gpu-memory-utilization` is the share of everything
that `baton serve` runs on the GPU, as it is in vLLM; `--kv-memory-share` is each worker's. What stands here exists only
there: the accepted values ask for what is so anyway, any other one ends the command with the word at the right.

| vLLM | accepted | here |
|---|---|---|"""


def render() -> str:
    """Give the text of the page."""
    parts = [INTRODUCTION]
    groups = dict.fromkeys(option.group for option in OPTIONS if not option.is_hidden)
    for group in groups:
        rows = [_row(option) for option in OPTIONS if option.group == group and not option.is_hidden]
        head = "| option | default | commands | meaning |\n|---|---|---|---|"
        parts.append("\n".join([f"## {group[0].upper()}{group[1:]}", "", head, *rows, ""]))
    names = ", ".join(f"`{option.name}`" for option in OPTIONS if option.reloads and not option.is_hidden)
    parts.append(RELOADING.format(names=names))
    parts.append("\n".join([FROM_VLLM, *(_elsewhere(key) for key in sorted(ELSEWHERE)), ""]))
    return "\n".join(parts)


def _elsewhere(key: str) -> str:
    found = ELSEWHERE[key]
    accepted = ", ".join(f"`{value}`" for value in sorted(found.holds))
    return f"| `--{key.replace('_', '-')}` | {accepted} | {found.says} |"


def _row(option: Option) -> str:
    commands = [role for role in ROLES if role in option.roles and role != "colocated"]
    shown = "all" if commands == [role for role in ROLES if role != "colocated"] else ", ".join(commands)
    unit = f" {option.unit.upper()}" if option.unit else ""
    choices = f" One of {', '.join(map(str, option.choices))}." if option.choices else ""
    variable = "" if option.variable == f"BATON_{option.key.upper()}" else f" Variable: `{option.variable}`."
    aliases = ", ".join(f"`--{alias.replace('_', '-')}`" for alias in option.aliases)
    also = f" In vLLM: {aliases}, which is taken too." if aliases else ""
    meaning = f"{option.help}{choices}{also}{variable}"
    return f"| `--{option.name}{unit}` | {describe_default(option)} | {shown} | {meaning} |"


def main() -> int:
    """Write the page, or with `--check` return 1 when it is not up to date."""
    if sys.argv[1:] == ["--check"]:
        return int(not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != render())
    TARGET.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
