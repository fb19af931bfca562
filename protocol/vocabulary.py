"""The vocabulary of one model, as its files give it: what router and workers read alike.

1. `load_vocabulary` reads `tokenizer.json` and its companions, or the vocabulary inside a GGUF file.
2. The router makes text of it (router/tokenizer.py). A worker knows token ids only; grammars need the bytes behind each
of them, which `TokenBytes` holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import tokenizers

from protocol.errors import ConfigError
from protocol.gguf_metadata import read_metadata
from protocol.gguf_vocabulary import build_tokenizer

_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """What the files of a model say about its text.

    Attributes:
        special: the model's own name of each special token, by its role (`bos_token`, ...).
        eos_token_ids: as the generation config or the GGUF header lists them; may repeat, may be empty.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special: dict[str, str] = {}
        self.eos_token_ids: list[int] = []
        self.chat_template: str | None = None

    def known_eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer, each once: those listed, and the one that is called EOS."""
        name = self.special.get("eos_token")
        named = None if name is None else self.tokenizer.token_to_id(name)
        num_ids = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        found = dict.fromkeys([*self.eos_token_ids, *([] if named is None else [named])])
        return tuple(token_id for token_id in found if 0 <= token_id < num_ids)


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of every token of a vocabulary.

    Attributes:
        tokens: by token id; empty for ids that stand for nothing.
        special_ids: tokens that are no text, such as the ends of turns and of answers.
        eos_token_ids: those that end an answer.
        bos_token_id: the one that begins a prompt, if there is one.
        encode: text to token ids, without any frame; the name of a special token is text like any other.
    """

    tokens: tuple[bytes, ...]
    special_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    encode: Callable[[str], list[int]]

    @classmethod
    def of_model(cls, path: Path) -> TokenBytes:
        """Read the vocabulary of the model at a path. Raises ConfigError as `load_vocabulary` does."""
        source = load_vocabulary(path)
        tokenizer, to_bytes = source.tokenizer, byte_form(source.tokenizer)
        tokenizer.encode_special_tokens = True
        pieces = {token_id: to_bytes(piece) for piece, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
        added = tokenizer.get_added_tokens_decoder()
        pieces |= {token_id: token.content.encode() for token_id, token in added.items()}
        tokens = tuple(pieces.get(token_id, b"") for token_id in range(max(pieces) + 1))
        bos, eos_token_ids = source.special.get("bos_token"), source.known_eos_token_ids()
        return cls(
            tokens,
            # What ends an answer is no text of it, whatever kind of token the files call it.
            frozenset(token_id for token_id, token in added.items() if token.special).union(eos_token_ids),
            eos_token_ids,
            None if bos is None else tokenizer.token_to_id(bos),
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        )


class Spelling:
    """How text is written with the ordinary tokens of a vocabulary: those that stand for exactly its bytes.

    As the tokenizer writes it, wherever that means the same bytes: it may normalise, put a space in front, or know only
    an "unknown" token. Then the longest token that fits is taken, again and again.
    """

    def __init__(self, vocabulary: TokenBytes) -> None:
        self._vocabulary = vocabulary

    def of(self, text: str) -> list[int]:
        """Return the token ids of a text; what no token stands for is left out."""
        found, wanted = self._vocabulary.encode(text), text.encode()
        if self._is_of(found, wanted):
            return found
        # SentencePiece puts a space of its own before a text, as a token or in the first one.
        return found[1:] if self._is_of(found[1:], wanted) else self._longest_first(wanted)

    def _is_of(self, token_ids: list[int], wanted: bytes) -> bool:
        vocabulary = self._vocabulary
        return (
            vocabulary.special_ids.isdisjoint(token_ids)
            and max(token_ids, default=-1) < len(vocabulary.tokens)
            and b"".join(vocabulary.tokens[i] for i in token_ids) == wanted
        )

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """The ordinary tokens by their bytes; few models ever need it."""
        ids: dict[bytes, int] = {}
        for token_id, token in enumerate(self._vocabulary.tokens):
            if token and token_id not in self._vocabulary.special_ids:
                ids.setdefault(token, token_id)
        return ids

    def _longest_first(self, wanted: bytes) -> list[int]:
        found, start, max_bytes = [], 0, max(map(len, self._ids), default=0)
        while start < len(wanted):
            for length in range(min(max_bytes, len(wanted) - start), 0, -1):
                token_id = self._ids.get(wanted[start : start + length])
                if token_id is not None:
                    found.append(token_id)
                    break
            else:
                length = 1
            start += length
        return found


def load_vocabulary(path: Path) -> Vocabulary:
    """Read the vocabulary at a directory with `tokenizer.json`, such a file, or a GGUF file.

    Raises:
        ConfigError: files are missing, damaged or of an unsupported kind.
    """
    if path.suffix == ".gguf":
        return _from_gguf(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"model {path}: no tokenizer.json there, and not a GGUF file")
    try:
        source = Vocabulary(tokenizers.Tokenizer.from_file(str(file)))
    except Exception as error:  # noqa: BLE001  (the binding raises plain Exception)
        raise ConfigError(f"model {folder.name}: tokenizer.json cannot be used: {error}") from error
    # What the file says about cutting and padding is for training.
    source.tokenizer.no_truncation()
    source.tokenizer.no_padding()
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            source.special[name] = content
    for config in ("generation_config.json", "config.json"):
        source.eos_token_ids = source.eos_token_ids or _ids(_read_json(folder / config).get("eos_token_id"))
    source.chat_template = _template_of(folder, settings.get("chat_template"))
    return source


def _from_gguf(path: Path) -> Vocabulary:
    metadata = read_metadata(path)
    source = Vocabulary(build_tokenizer(metadata))
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for name, key in names.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            source.special[name] = tokens[token_id]
    ending = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    source.eos_token_ids = [i for i in ending if isinstance(i, int)]
    template = metadata.get("tokenizer.chat_template")
    source.chat_template = template if isinstance(template, str) else None
    return source


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path.parent.name}: {path.name} cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _template_of(folder: Path, configured: Any) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(configured, list):
        named = {e.get("name"): e.get("template") for e in configured if isinstance(e, dict)}
        configured = named.get("default")
    return configured if isinstance(configured, str) else None


def byte_form(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """Return how this vocabulary writes bytes, told by its decoder. Raises ConfigError where that is not known."""
    if tokenizer.decoder is None:
        raise ConfigError("tokenizer: it has no decoder, so its tokens cannot be turned into text")
    state = tokenizer.decoder.__getstate__().decode()
    if '"ByteLevel"' in state:
        return _from_byte_level
    if '"WordPiece"' in state:
        return from_word_piece
    if '"Metaspace"' in state or '"ByteFallback"' in state or "▁" in state or "\\u2581" in state:
        return _from_sentence_piece
    raise ConfigError(
        f"tokenizer: a decoder like {state[:200]} is not supported (byte-level, SentencePiece and WordPiece are)"
    )


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in for each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


# Stand-ins become the characters of their bytes; other characters below 256 become one that no byte has.
_TO_LATIN_1: Final = dict.fromkeys(range(256), "\uffff") | {
    ord(char): chr(byte) for char, byte in _byte_level_alphabet().items()
}


def _from_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()  # a token that stands for itself


def _from_sentence_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def from_word_piece(piece: str) -> bytes:
    """Return the bytes of a piece of WordPiece: one that goes on with a word, or one that begins a word."""
    return piece.removeprefix("##").encode() if piece.startswith("##") else f" {piece}".encode()
