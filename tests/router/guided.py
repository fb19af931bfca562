"""What a grammar lets through: a client's fields, as the router's child makes a grammar of them, text by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.guidance import compile_matcher, open_tokenizer
from protocol.request import Grammar, GrammarKind
from protocol.vocabulary import TokenBytes
from router import exact_json
from router.api import ChatRequest, parse
from router.grammar_child import Trial
from router.structured import structured_output
from router.tools import tool_use
from tests.router.tiny import byte_ids, byte_level_gguf
from tests.router.workers import HI

NAME: Final = "f"


class Guide:
    """The small vocabulary, and the child's work in this process."""

    def __init__(self, folder: Path) -> None:
        path = byte_level_gguf(folder / "tiny.gguf")
        vocabulary = TokenBytes.of_model(path)
        self._trial = Trial(path)
        self._tokenizer = open_tokenizer(vocabulary, len(vocabulary.tokens))

    def held(self, grammar: Grammar) -> Grammar:
        """Return a grammar as workers get it. Raises GrammarError."""
        return msgspec.structs.replace(grammar, text=self._trial.text_of(grammar))

    def accepted(self, grammar: Grammar, *texts: str) -> list[str]:
        """Return those texts that obey a grammar, whole."""
        start = compile_matcher(self._tokenizer, self.held(grammar))
        found = []
        for text in texts:
            matcher = start.deep_copy()
            if all(matcher.try_consume_tokens([token_id]) for token_id in byte_ids(text)) and matcher.is_accepting():
                found.append(text)
        return found

    def by_schema(self, schema: Any, *texts: str, **fields: Any) -> list[str]:
        """Return those texts that a schema allows as `structured_outputs`, with further fields of it."""
        return self.accepted(asked(structured_outputs={"json": schema, **fields}), *texts)

    def by_tool(self, schema: Any, *texts: str) -> list[str]:
        """Return those texts that a schema allows as the arguments of a forced call."""
        written = [f'[{{"name": "{NAME}", "arguments": {text}}}]' for text in texts]
        accepted = self.accepted(forced(schema), *written)
        return [text for text, whole in zip(texts, written, strict=True) if whole in accepted]

    def by_regex(self, pattern: str, *texts: str) -> list[str]:
        """Return those texts that a regular expression allows."""
        return self.accepted(Grammar(kind=GrammarKind.REGEX, text=pattern), *texts)


def asked(**fields: Any) -> Grammar:
    """Return the grammar of a chat with these fields, decoded as from a client."""
    found = structured_output(parse(_body(fields), ChatRequest))
    assert found is not None
    return found.grammar


def forced(*schemas: Any) -> Grammar:
    """Return the grammar of a forced call of one of some functions."""
    names = [NAME, *(f"{NAME}{i}" for i in range(1, len(schemas)))]
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in zip(names, schemas, strict=True)
    ]
    request = parse(_body({"tools": tools, "tool_choice": "required"}), ChatRequest)
    use = tool_use(request.tools, request.tool_choice, request.parallel_tool_calls)
    assert use is not None
    grammar = use.grammar()
    assert grammar is not None
    return grammar


def _body(fields: dict[str, Any]) -> bytes:
    return exact_json.encode({**HI, **fields})
