"""Text to token ids and back, for one model.

1. `Tokenizer(model_path)` reads `tokenizer.json` and its companions, or the vocabulary inside a GGUF file.
2. `encode` and `render_chat` make prompts. Both are pure and may run on any thread.
3. `stream_decoder` turns one sequence's tokens into text piece by piece. Every token is a run of bytes; characters are
   emitted when their last byte is in, so that no chunk ever ends in half of one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from protocol.errors import InvalidRequest
from protocol.vocabulary import byte_form, from_word_piece, load_vocabulary
from router.chat_template import ChatTemplate


class Tokenizer:
    """Tokenizer and chat template of one model. Immutable after construction; safe to share between threads.

    Args:
        model_path: a directory with `tokenizer.json`, such a file, or a GGUF file.
        chat_template: Jinja text that replaces the model's own.

    Raises:
        ConfigError: files are missing, damaged or of an unsupported kind.
    """

    def __init__(self, model_path: str | Path, chat_template: str | None = None) -> None:
        source = load_vocabulary(Path(model_path))
        self._tokenizer = source.tokenizer
        self._to_bytes = byte_form(source.tokenizer)
        added = source.tokenizer.get_added_tokens_decoder()
        vocabulary = source.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        pieces = {token_id: self._to_bytes(piece) for piece, token_id in vocabulary.items()}
        pieces |= {token_id: token.content.encode() for token_id, token in added.items()}
        self._texts, self._parts = _texts_of(pieces, self.vocab_size)
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._shown_texts = list(self._texts)
        for token_id in self._special_ids:
            self._shown_texts[token_id] = ""
        self.max_token_chars: int = max(map(len, vocabulary))
        self.eos_token_ids: tuple[int, ...] = source.known_eos_token_ids()
        bos = source.special.get("bos_token")
        self.bos_token_id: int | None = None if bos is None else source.tokenizer.token_to_id(bos)
        template = chat_template if chat_template is not None else source.chat_template
        self._template = None if template is None else ChatTemplate(template, source.special)

    def warm(self) -> None:
        """Start what renders the chat template elsewhere, if anything does."""
        if self._template is not None:
            self._template.warm()

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._template is not None

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template can say which functions there are."""
        return self._template is not None and self._template.knows_tools

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
        if self._to_bytes is from_word_piece:
            # Where its words stand apart is for the whole text to say.
            whole: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
            return whole
        return b"".join(self.token_bytes(i, skip_special) for i in token_ids).decode("utf-8", "replace")

    def stream_decoder(self, skip_special: bool = True) -> StreamDecoder:
        """Return a decoder for the tokens of one sequence, fed one at a time."""
        return StreamDecoder(self, skip_special)

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """Return the bytes that a token stands for: none for unknown ids, and for special ones if these are skipped."""
        if not self.is_known(token_id):
            return b""
        text = self.texts(skip_special)[token_id]
        return self._parts[token_id] if text is None else text.encode()

    def texts(self, skip_special: bool) -> Sequence[str | None]:
        """Return the characters of each known token as `token_bytes` has them, None for one that holds half of one."""
        return self._shown_texts if skip_special else self._texts

    def token_text(self, token_id: int) -> str:
        """Return a token as text for reports, parts of characters as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether a token is markup of the model, and no text."""
        return token_id in self._special_ids

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def is_known(self, token_id: int) -> bool:
        """Whether the id is in the vocabulary."""
        return 0 <= token_id < self.vocab_size

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the prompt text of a conversation; encode it with `add_special=False`.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses these messages.
            RequestFailed, RendersElsewhere: as `ChatTemplate.render` does.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions", "messages")
        return self._template.render(messages, add_generation_prompt, variables, tools)


class StreamDecoder:
    """Text of one sequence, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._texts = tokenizer.texts(skip_special)
        self._num_texts = len(self._texts)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside = False

    def feed(self, token_id: int) -> str:
        """Return the characters that this token completes; often all of its own, sometimes none."""
        if not self._is_inside and token_id < self._num_texts and (text := self._texts[token_id]) is not None:
            return text
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id, self._skip_special))
        self._is_inside = bool(self._utf8.getstate()[0])
        return text

    def num_broken(self, token_id: int) -> int:
        """Return how many characters come before this token, if it is fed next, that were begun and do not go on."""
        if not self._is_inside:
            return 0
        data = self._tokenizer.token_bytes(token_id, self._skip_special)
        # A byte that continues a character has 10 as its highest bits.
        return 1 if data and data[0] & 0xC0 != 0x80 else 0

    def flush(self) -> str:
        """Return what is left at the end of the sequence: U+FFFD if it ends within a character."""
        return self._utf8.decode(b"", final=True)


def _texts_of(pieces: Mapping[int, bytes], vocab_size: int) -> tuple[list[str | None], dict[int, bytes]]:
    """Return the text of each token, and the bytes of those that are no whole characters.

    All of them, at once: what is filled in as tokens are met goes on growing for as long as a router lives.
    """
    texts: list[str | None] = [""] * vocab_size
    parts: dict[int, bytes] = {}
    for token_id, data in pieces.items():
        try:
            texts[token_id] = data.decode()
        except UnicodeDecodeError:
            texts[token_id], parts[token_id] = None, data
    return texts, parts
