"""A small byte-level vocabulary in a real GGUF file: 4 special tokens, every byte, a few merged words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from router.tokenizer import Tokenizer

SPECIAL = ("<|end|>", "<|start|>", "<|stop|>", "<|tool|>")
EOS_ID = 2
MERGES = ("t h", "th e", "Ġ the", "a n", "an d")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def alphabet() -> list[str]:
    """Give the printable stand-in of each byte, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def write_gguf(path: Path, tokens: list[str], types: list[int], **values: Any) -> Path:
    """Write a GGUF file that holds a vocabulary and nothing else; `values` name `tokenizer.ggml.*` entries."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(values.pop("model", "gpt2"))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if (scores := values.pop("scores", None)) is not None:
        writer.add_token_scores(scores)
    if (merges := values.pop("merges", None)) is not None:
        writer.add_token_merges(merges)
    if (template := values.pop("chat_template", None)) is not None:
        writer.add_chat_template(template)
    for name, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_string(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_gguf(path: Path, pre: str = "smollm", **values: Any) -> Path:
    """Write the small vocabulary; ids 4 to 259 are the bytes."""
    tokens = [*SPECIAL, *alphabet(), *(m.replace(" ", "") for m in MERGES)]
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    defaults: dict[str, Any] = {
        "pre": pre,
        "merges": list(MERGES),
        "bos_token_id": 1,
        "eos_token_id": EOS_ID,
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }
    return write_gguf(path, tokens, types, **{**defaults, **values})


def byte_id(char: str) -> int:
    """Give the token of one ASCII character."""
    return len(SPECIAL) + ord(char)


def byte_ids(text: str) -> list[int]:
    """Give the byte tokens of a text, unmerged."""
    return [len(SPECIAL) + b for b in text.encode()]


def small_tokenizer(folder: Path) -> Tokenizer:
    """Give a tokenizer of the small vocabulary."""
    return Tokenizer(byte_level_gguf(folder / "tiny.gguf"))
