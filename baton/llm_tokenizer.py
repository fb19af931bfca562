"""The tokenizer of an engine in this process, with the calls that users of transformers know.

It is the one that the engine itself uses, so that what it says of a prompt is what the model is given. Nothing of the
engine is needed for it: it works on any thread, also after `close`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from router.tokenizer import Tokenizer


class LLMTokenizer:
    """Text to token ids and back. Not all of transformers' calls are here: those that prompts are made with are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._tokenizer.vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """The first token that ends an answer; `eos_token_ids` has all of them."""
        return next(iter(self.eos_token_ids), None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer."""
        return self._tokenizer.eos_token_ids

    @property
    def eos_token(self) -> str | None:
        """The text of `eos_token_id`."""
        return None if self.eos_token_id is None else self._tokenizer.token_text(self.eos_token_id)

    @property
    def bos_token_id(self) -> int | None:
        """The token that texts begin with, if the model has one."""
        return self._tokenizer.bos_token_id

    @property
    def bos_token(self) -> str | None:
        """The text of `bos_token_id`."""
        return None if self.bos_token_id is None else self._tokenizer.token_text(self.bos_token_id)

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask`, lists of lists where several texts are given."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        several = [self.encode(one, add_special_tokens) for one in text]
        return {"input_ids": several, "attention_mask": [[1] * len(ids) for ids in several]}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text. Raises InvalidRequest for text that is not Unicode."""
        return self._tokenizer.encode(text, add_special_tokens)

    def tokenize(self, text: str) -> list[str]:
        """Return the texts of a text's tokens, parts of characters as U+FFFD."""
        return [self._tokenizer.token_text(token_id) for token_id in self.encode(text, add_special_tokens=False)]

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids, special ones included unless told otherwise."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(token_id) for token_id in token_ids]
        return self._tokenizer.decode(ids, skip_special=skip_special_tokens)

    def batch_decode(self, several: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """Return the text of each."""
        return [self.decode(token_ids, skip_special_tokens) for token_ids in several]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token of the vocabulary, or of each of several; None for what is none."""
        if isinstance(tokens, str):
            return self._tokenizer.token_id(tokens)
        return [self._tokenizer.token_id(token) for token in tokens]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """Return a conversation as the model's template writes it: token ids, or with `tokenize=False` text.

        Args:
            conversation: messages with `role` and `content`.
            tools: functions, for templates that know them.
            add_generation_prompt: whether the beginning of the answer is written, too.
            tokenize: whether ids are wanted.
            variables: further names that the template may use.

        Raises:
            InvalidRequest: there is no template, or it refuses these messages.
        """
        text = self._tokenizer.render_chat(conversation, add_generation_prompt, variables, tools)
        return self.encode(text, add_special_tokens=False) if tokenize else text
