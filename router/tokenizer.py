"""Text to token ids and back, for one model.

1. `Tokenizer(model_path)` reads `tokenizer.json` and its companions, or the vocabulary inside a GGUF file.
2. `encode` and `render_chat` make prompts. Both are pure and may run on any thread.
3. `stream_decoder` turns one sequence's tokens into text piece by piece. Every token is a run of bytes; characters are
   emitted when their last byte is in, so that no chunk ever ends in half of one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from protocol.errors import ConfigError, InvalidRequest
from router.chat_template import ChatTemplate
from router.gguf_metadata import read_metadata
from router.gguf_vocabulary import build_tokenizer

_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Tokenizer and chat template of one model. Immutable after construction; safe to share between threads.

    Args:
        model_path: a directory with `tokenizer.json`, such a file, or a GGUF file.
        chat_template: Jinja text that replaces the model's own.

    Raises:
        ConfigError: files are missing, damaged or of an unsupported kind.
    """

    def __init__(self, model_path: str | Path, chat_template: str | None = None) -> None:
        source = _load(Path(model_path))
        self._tokenizer = source.tokenizer
        self._to_bytes = _byte_form(source.tokenizer)
        self._bytes: dict[int, bytes] = {}
        self._whole_texts = (_WholeTexts(self, skip_special=False), _WholeTexts(self, skip_special=True))
        added = source.tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = source.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.max_token_chars: int = max(map(len, vocabulary))
        self.eos_token_ids: tuple[int, ...] = self._in_vocabulary(source.eos_token_ids, source.special.get("eos_token"))
        bos = source.special.get("bos_token")
        self.bos_token_id: int | None = None if bos is None else source.tokenizer.token_to_id(bos)
        template = chat_template if chat_template is not None else source.chat_template
        self._template = None if template is None else ChatTemplate(template, source.special)

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._template is not None

    def to_json(self) -> str:
        """Return the vocabulary and rules as the text of a `tokenizer.json`."""
        text: str = self._tokenizer.to_str()
        return text

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the token ids of a text; `add_special` puts the model's own frame (usually BOS) around it.

        Raises:
            InvalidRequest: the text is not Unicode (lone surrogates).
        """
        try:
            # The batch call lets other threads run meanwhile; the single one does not.
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("the text contains lone surrogates: it is not valid Unicode") from error
        return ids

    def decode(self, token_ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""
        if self._to_bytes is _from_word_piece:
            # Where its words stand apart is for the whole text to say.
            whole: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
            return whole
        return b"".join(self.token_bytes(i, skip_special) for i in token_ids).decode("utf-8", "replace")

    def stream_decoder(self, skip_special: bool = True) -> StreamDecoder:
        """Return a decoder for the tokens of one sequence, fed one at a time."""
        return StreamDecoder(self, skip_special)

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """Return the bytes that a token stands for: none for unknown ids, and for special ones if these are skipped."""
        if skip_special and token_id in self._special_ids:
            return b""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute_bytes(token_id)
        return found

    def whole_texts(self, skip_special: bool) -> Mapping[int, str | None]:
        """Return the characters of each token id as `token_bytes` has them, None for one that holds half of one."""
        return self._whole_texts[skip_special]

    def token_text(self, token_id: int) -> str:
        """Return a token as text for reports, parts of characters as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_known(self, token_id: int) -> bool:
        """Whether the id is in the vocabulary."""
        return 0 <= token_id < self.vocab_size

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text of a conversation; encode it with `add_special=False`.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions", "messages")
        return self._template.render(messages, add_generation_prompt, variables)

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._to_bytes(piece)

    def _in_vocabulary(self, token_ids: Iterable[int], token: str | None) -> tuple[int, ...]:
        named = None if token is None else self._tokenizer.token_to_id(token)
        found = dict.fromkeys([*token_ids, *([] if named is None else [named])])
        return tuple(i for i in found if self.is_known(i))


class StreamDecoder:
    """Text of one sequence, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._whole_texts = tokenizer.whole_texts(skip_special)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside = False

    def feed(self, token_id: int) -> str:
        """Return the characters that this token completes; often all of its own, sometimes none."""
        if not self._is_inside and (text := self._whole_texts[token_id]) is not None:
            return text
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id, self._skip_special))
        self._is_inside = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """Return what is left at the end of the sequence: U+FFFD if it ends within a character."""
        return self._utf8.decode(b"", final=True)


class _WholeTexts(dict[int, str | None]):
    """Text of the tokens met so far, found on first use: nearly all tokens hold whole characters."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skip_special = skip_special

    def __missing__(self, token_id: int) -> str | None:
        try:
            found = self._tokenizer.token_bytes(token_id, self._skip_special).decode()
        except UnicodeDecodeError:
            found = None
        self[token_id] = found
        return found


class _Source:
    """What the files of a model say about its text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special: dict[str, str] = {}
        self.eos_token_ids: list[int] = []
        self.chat_template: str | None = None


def _load(path: Path) -> _Source:
    if path.suffix == ".gguf":
        return _from_gguf(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"model {path}: no tokenizer.json there, and not a GGUF file")
    try:
        source = _Source(tokenizers.Tokenizer.from_file(str(file)))
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


def _from_gguf(path: Path) -> _Source:
    metadata = read_metadata(path)
    source = _Source(build_tokenizer(metadata))
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


def _byte_form(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """Return how this vocabulary writes bytes, told by its decoder."""
    if tokenizer.decoder is None:
        raise ConfigError("tokenizer: it has no decoder, so its tokens cannot be turned into text")
    state = tokenizer.decoder.__getstate__().decode()
    if '"ByteLevel"' in state:
        return _from_byte_level
    if '"WordPiece"' in state:
        return _from_word_piece
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


_ALPHABET: Final = _byte_level_alphabet()


def _from_byte_level(piece: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in piece)
    except KeyError:
        return piece.encode()  # a token that stands for itself


def _from_sentence_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _from_word_piece(piece: str) -> bytes:
    return piece.removeprefix("##").encode() if piece.startswith("##") else f" {piece}".encode()
