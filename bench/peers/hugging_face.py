"""The model as a Hugging Face folder, for the peers that read no GGUF: the same weights, in float32.

Baton's own reader and tokenizer make it, in a process of their own, because the harness imports neither.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench.peers.layout import CHECKOUT

_EXPORT: Final = """
import sys
from pathlib import Path
from router.tokenizer import Tokenizer
from tests.golden.export_safetensors import export_safetensors
gguf, folder = map(Path, sys.argv[1:])
export_safetensors(gguf, folder, Tokenizer(gguf).to_json())
"""
# Chat is not measured; the template passes the last message on, so that a chat request has the same tokens.
_TOKENIZER_CONFIG: Final = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
    "model_max_length": 8192,
    "clean_up_tokenization_spaces": False,
    "chat_template": "{{ messages[-1]['content'] }}",
}


def write_folder(gguf: Path, folder: Path) -> None:
    """Write the folder; its last file is tokenizer_config.json. Raises OSError where Baton cannot read the model."""
    command = [sys.executable, "-c", _EXPORT, str(gguf), str(folder)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        raise OSError(0, f"the export failed:\n{done.stderr.strip()}", str(gguf))
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"model_type": "llama"}
    _write(config_file, config)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)
    _write(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)


def _write(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
