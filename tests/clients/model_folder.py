"""SmolLM2 as harnesses want it: a Hugging Face folder (tokenizer, template, float32 weights) and a hub's cache of it.

1. `model_folder(root)` writes the folder with Baton's own reader, once; it is TOK in the harnesses' commands.
2. `hub_cache(root)` lays the tokenizer out as a hub's cache does, for aiperf, which takes no path when it is offline.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Final

from bench.peers.hugging_face import write_folder
from model.source import resolve
from protocol.vocabulary import load_vocabulary

HUB_NAME: Final = "local/smollm2"
_REVISION: Final = "0" * 40
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")


def baton_cache() -> Path:
    """Return the cache that `baton serve` fills."""
    return Path(os.environ.get("BATON_CACHE") or Path.home() / ".cache" / "baton")


def model_folder(root: Path) -> Path:
    """Return the folder under `root`, written if it is not whole. Raises OSError where the export fails."""
    folder, last = root / "smollm2", "chat_template.jinja"
    if (folder / last).is_file():
        return folder
    gguf = resolve("smollm2", baton_cache(), print).path
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(gguf, folder)
    template = load_vocabulary(gguf).chat_template or ""
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"chat_template": template}
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / last).write_text(template, encoding="utf-8")
    return folder


def hub_cache(root: Path) -> Path:
    """Return an HF_HOME that knows the tokenizer as HUB_NAME."""
    home, source = root / "hub-home", model_folder(root)
    entry = home / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    snapshot = entry / "snapshots" / _REVISION
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(_REVISION, encoding="utf-8")
    snapshot.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(source / name, snapshot / name)
    return home
