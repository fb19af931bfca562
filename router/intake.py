"""From a validated body to sequences that workers can run.

1. The model must be one that is served here. 2. Messages become text by the chat template; text becomes token ids.
3. Prompt and max_tokens must fit the context; token ids must be in the vocabulary. 4. Every choice of every prompt is a
sequence of its own, with its own seed.

Pure but for drawing seeds, and possibly slow (a megabyte of text takes half a second): long bodies go to a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from protocol.errors import ContextTooLong, InvalidRequest, RequestRejected, UnknownModel
from protocol.readout import MAX_PROMPT_VALUES
from protocol.request import MAX_SEED, Grammar, SamplingParams
from router.api import (
    MAX_CHOICES,
    MAX_PROMPTS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    TokenizeRequest,
)
from router.conversation import calls_of, check_results, render, told
from router.request_ids import check as check_request_id
from router.response_request import RENAMED, ResponsesRequest, renamed
from router.structured import Structured, structured_output
from router.text import TextOptions
from router.tokenizer import Tokenizer
from router.tools import ToolUse, tool_use

DEFAULT_COMPLETION_TOKENS = 16
_MIN_TEMPERATURE = 1e-5
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """One prompt. `echo` is its text if the answer repeats it, as `is_echoed` says."""

    token_ids: tuple[int, ...]
    echo: str = ""
    is_echoed: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice to be generated; `index` counts over all prompts."""

    index: int
    prompt: PromptTokens
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """An admitted request of the API.

    Attributes:
        request_id: the id that its body gave it, if it did.
        grammar_field: the field that asked for the choices' grammar; empty where they have none.
        has_usage, has_running_usage: whether a stream reports usage at its end, or in every chunk.
        priority: lower ones are served earlier.
        tools: functions that the answer may call.
        response: the body of /v1/responses that it came from, if it did.
        num_prompt_top: how many of the likeliest tokens are read beside each prompt token; None reads no prompt.
        num_shown_top: of these, how many `prompt_logprobs` shows; None shows none.
        is_prompt_only: nothing is generated.
    """

    is_chat: bool
    model: str
    prompts: tuple[PromptTokens, ...]
    choices: tuple[Choice, ...]
    text: TextOptions
    cache_salt: str
    is_stream: bool
    has_usage: bool
    has_running_usage: bool
    returns_token_ids: bool
    request_id: str | None = None
    priority: int = 0
    tools: ToolUse | None = None
    response: ResponsesRequest | None = None
    grammar_field: str = ""
    num_prompt_top: int | None = None
    num_shown_top: int | None = None
    is_prompt_only: bool = False

    def with_grammar(self, grammar: Grammar) -> Job:
        """Return the job with every choice bound by a grammar."""
        choices = (replace(c, sampling=msgspec.structs.replace(c.sampling, grammar=grammar)) for c in self.choices)
        return replace(self, choices=tuple(choices))


class Intake:
    """Makes jobs of requests for one model."""

    def __init__(self, tokenizer: Tokenizer, served_model_names: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._names = tuple(served_model_names)

    def job(self, request: ChatRequest | CompletionRequest | ResponsesRequest, max_model_len: int) -> Job:
        """Tokenise and check a request.

        Args:
            request: the decoded body.
            max_model_len: prompt plus output tokens that a worker can hold.

        Raises:
            RequestRejected: this model cannot take it; the message names the field.
        """
        if isinstance(request, ResponsesRequest):
            return self._response_job(request, max_model_len)
        self.check_model(request.model)
        tools = None
        if isinstance(request, ChatRequest):
            tools = tool_use(request.tools, request.tool_choice, request.parallel_tool_calls)
            prompts = [self._chat_prompt(request, max_model_len, tools)]
        else:
            prompts = self._completion_prompts(request, max_model_len)
        if len(prompts) * (request.n or 1) > MAX_CHOICES:
            raise InvalidRequest(f"n: prompts times n may be at most {MAX_CHOICES}", "n")
        base_seed = secrets.randbits(63) if request.seed is None else request.seed & MAX_SEED
        choices: list[Choice] = []
        for number, prompt in enumerate(prompts):
            for i in range(request.n or 1):
                # Unseeded prompts draw independently; a seed gives every prompt the same numbers, as if asked alone.
                seed = (base_seed + i + (number << 32 if request.seed is None else 0)) & MAX_SEED
                sampling = self._sampling(request, prompt, seed, max_model_len)
                choices.append(Choice(len(choices), prompt, sampling))
        structured = structured_output(request)
        if tools is not None and (grammar := tools.grammar()) is not None:
            if structured is not None:
                raise InvalidRequest(f"tool_choice: {structured.field} asks for something else", "tool_choice")
            structured = Structured(grammar, "tools")
        options = request.stream_options
        job = Job(
            is_chat=isinstance(request, ChatRequest),
            model=request.model,
            prompts=tuple(prompts),
            choices=tuple(choices),
            text=self._text_options(request),
            cache_salt=request.cache_salt or "",
            is_stream=bool(request.stream),
            has_usage=bool(options and options.include_usage),
            has_running_usage=bool(options and options.include_usage and options.continuous_usage_stats),
            returns_token_ids=bool(request.return_token_ids),
            request_id=check_request_id(request.request_id),
            priority=request.priority or 0,
            tools=tools,
            grammar_field="" if structured is None else structured.field,
            num_prompt_top=_num_prompt_top(request, prompts),
            num_shown_top=request.prompt_logprobs,
            is_prompt_only=request.max_tokens == 0 and isinstance(request, CompletionRequest),
        )
        return job if structured is None else job.with_grammar(structured.grammar)

    def _response_job(self, request: ResponsesRequest, max_model_len: int) -> Job:
        chat = request.to_chat()
        try:
            job = self.job(chat, max_model_len)
        except RequestRejected as error:
            raise renamed(error) from error
        return replace(job, response=request, grammar_field=RENAMED.get(job.grammar_field, job.grammar_field))

    def check_model(self, model: str | None) -> None:
        """Raise UnknownModel unless the name is served here; None is whatever is served."""
        if model is not None and model not in self._names:
            raise UnknownModel(
                f"the model {model[:200]!r} does not exist here; served: {', '.join(self._names)}", "model"
            )

    def tokenize(self, request: TokenizeRequest, max_model_len: int) -> list[int]:
        """Return the token ids of a prompt or conversation."""
        self.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("give either prompt or messages", "prompt")
        if request.messages is not None:
            plain = plain_messages(request.messages)
            text = self._tokenizer.render_chat(
                told(self._tokenizer, plain, None)[0], request.add_generation_prompt is not False
            )
            return self._encode(text, bool(request.add_special_tokens), max_model_len, "messages")
        assert request.prompt is not None
        return self._encode(request.prompt, request.add_special_tokens is not False, max_model_len, "prompt")

    def known_tokens(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Return token ids that were given as `tokens`, all of them in the vocabulary."""
        return self._known(token_ids, "tokens")

    # --- prompts ---

    def _chat_prompt(self, request: ChatRequest, max_model_len: int, tools: ToolUse | None) -> PromptTokens:
        text = render(self._tokenizer, request, plain_messages(request.messages), tools)
        if request.truncate_prompt_tokens is not None:
            text = self._tail(text, max_model_len)
        ids = self._encode(text, bool(request.add_special_tokens), max_model_len, "messages")
        ids = self._truncated(ids, request, max_model_len)
        return self._checked(ids, "messages", max_model_len)

    def _completion_prompts(self, request: CompletionRequest, max_model_len: int) -> list[PromptTokens]:
        parts = split_prompts(request.prompt)
        if len(parts) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt: at most {MAX_PROMPTS} prompts in one request", "prompt")
        prompts = []
        for part in parts:
            if isinstance(part, str) and request.truncate_prompt_tokens is not None:
                part = self._tail(part, max_model_len)
            if isinstance(part, str):
                ids = self._encode(part, request.add_special_tokens is not False, max_model_len, "prompt")
            else:
                ids = part
            kept = self._truncated(ids, request, max_model_len)
            is_whole, ids = len(kept) == len(ids), kept
            prompt = self._checked(ids, "prompt", max_model_len)
            if request.echo:
                text = part if isinstance(part, str) and is_whole else self._tokenizer.decode(ids, skip_special=False)
                prompt = PromptTokens(prompt.token_ids, text, is_echoed=True)
            prompts.append(prompt)
        return prompts

    def _encode(self, text: str, add_special: bool, max_model_len: int, param: str) -> list[int]:
        # No token is longer than the longest: what cannot fit is refused before it is tokenised.
        if len(text) > max_model_len * self._tokenizer.max_token_chars:
            raise ContextTooLong(f"{param}: {len(text)} characters exceed the context of {max_model_len} tokens", param)
        return self._tokenizer.encode(text, add_special)

    def _tail(self, text: str, max_model_len: int) -> str:
        """Return the end of a text that is going to be truncated: as much as the context can hold, at the most."""
        return text[-max_model_len * self._tokenizer.max_token_chars :]

    @staticmethod
    def _truncated(token_ids: list[int], request: GenerationFields, max_model_len: int) -> list[int]:
        """Return the last `truncate_prompt_tokens` tokens; -1 stands for as many as the context leaves room for."""
        num_kept = request.truncate_prompt_tokens
        if num_kept is None:
            return token_ids
        if num_kept == 0 or num_kept > max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens: must be -1 or from 1 to {max_model_len}", "truncate_prompt_tokens"
            )
        if num_kept == -1:
            asked = getattr(request, "max_completion_tokens", None) or request.max_tokens or 1
            num_kept = max(1, max_model_len - asked)
        return token_ids[-num_kept:]

    def _checked(self, token_ids: list[int], param: str, max_model_len: int) -> PromptTokens:
        if not token_ids:
            raise InvalidRequest(f"{param}: the prompt is empty", param)
        if max(token_ids) >= self._tokenizer.vocab_size:
            raise InvalidRequest(f"{param}: token id {max(token_ids)} is not in the vocabulary", param)
        if len(token_ids) >= max_model_len:
            raise ContextTooLong(
                f"This model's maximum context length is {max_model_len} tokens, but the prompt has {len(token_ids)} "
                f"tokens, which leaves no room for the completion. Please reduce the length of the {param}.",
                param,
            )
        return PromptTokens(tuple(token_ids))

    # --- sampling ---

    def _sampling(
        self, request: GenerationFields, prompt: PromptTokens, seed: int, max_model_len: int
    ) -> SamplingParams:
        max_tokens = self._max_tokens(request, len(prompt.token_ids), max_model_len)
        min_tokens = request.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens ({min_tokens}) must not exceed max_tokens ({max_tokens})", "min_tokens")
        temperature = _or(request.temperature, 1.0)
        return SamplingParams(
            seed=seed,
            temperature=temperature if temperature >= _MIN_TEMPERATURE else 0.0,
            top_k=max(0, _or(request.top_k, 0)),
            top_p=_or(request.top_p, 1.0),
            min_p=_or(request.min_p, 0.0),
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            logit_bias=self._logit_bias(request.logit_bias or {}),
            max_tokens=max(1, max_tokens),
            min_tokens=min_tokens,
            ignore_eos=bool(request.ignore_eos),
            stop_token_ids=self._known(request.stop_token_ids or (), "stop_token_ids"),
            eos_token_ids=self._tokenizer.eos_token_ids,
            num_logprobs=_num_logprobs(request),
        )

    def _max_tokens(self, request: GenerationFields, num_prompt_tokens: int, max_model_len: int) -> int:
        room = max_model_len - num_prompt_tokens
        asked, param, default = request.max_tokens, "max_tokens", DEFAULT_COMPLETION_TOKENS
        if isinstance(request, ChatRequest):
            default = room
            if request.max_completion_tokens is not None:
                asked, param = request.max_completion_tokens, "max_completion_tokens"
        if asked is None:
            return min(default, room)
        if asked > room:
            raise ContextTooLong(
                f"This model's maximum context length is {max_model_len} tokens. However, you requested "
                f"{num_prompt_tokens + asked} tokens ({num_prompt_tokens} in the prompt, {asked} in the completion). "
                f"Please reduce the length of the prompt or {param}.",
                param,
            )
        return asked

    def _logit_bias(self, bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
        found = []
        for key, value in bias.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise InvalidRequest(f"logit_bias: {key[:64]!r} is not a token id", "logit_bias")
            found.append((int(key), value))
        self._known([token_id for token_id, _ in found], "logit_bias")
        return tuple(found)

    def _known(self, token_ids: Sequence[int], param: str) -> tuple[int, ...]:
        for token_id in token_ids:
            if not self._tokenizer.is_known(token_id):
                raise InvalidRequest(f"{param}: token id {token_id} is not in the vocabulary", param)
        return tuple(token_ids)

    @staticmethod
    def _text_options(request: GenerationFields) -> TextOptions:
        return TextOptions(
            stops=request.stop_strings,
            min_tokens=request.min_tokens or 0,
            include_stop=bool(request.include_stop_str_in_output),
            skip_special=request.skip_special_tokens is not False,
            stop_token_ids=frozenset(request.stop_token_ids or ()),
        )


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as chat templates know them: role and content are strings, `developer` is `system`.

    Raises:
        InvalidRequest: an unknown role, a malformed call, or content that is not text.
    """
    plain: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise InvalidRequest(f"messages[{i}].role: {message.role!r} is not one of {', '.join(_ROLES)}", "messages")
        if message.function_call:
            raise InvalidRequest(f"messages[{i}].function_call: not supported, use tool_calls", "messages")
        entry: dict[str, Any] = {"role": role, "content": _content(message, i)}
        if message.tool_calls:
            entry["tool_calls"] = calls_of(message, i)
        for name in ("name", "tool_call_id"):
            if getattr(message, name) is not None:
                entry[name] = getattr(message, name)
        plain.append(entry)
    check_results(plain)
    return plain


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return the prompts of a completion: the four shapes that OpenAI allows become one.

    Raises:
        InvalidRequest: the list is empty, or mixes shapes.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt: the prompt is empty", "prompt")
    if all(isinstance(part, int) for part in prompt):
        return [[part for part in prompt if isinstance(part, int)]]
    parts = [part for part in prompt if not isinstance(part, int)]
    if len(parts) != len(prompt) or len({type(part) for part in parts}) != 1:
        raise InvalidRequest("prompt: must be a string, token ids, or a list of one of these", "prompt")
    return parts


def _content(message: ChatMessage, i: int) -> str:
    if message.content is None:
        if message.role != "assistant":
            raise InvalidRequest(f"messages[{i}].content: this field is required", "messages")
        return ""
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise InvalidRequest(f"messages[{i}].content: only parts of type text are supported", "messages")
    return "\n".join(part.text or "" for part in message.content)


def _num_logprobs(request: GenerationFields) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    assert isinstance(request, ChatRequest)
    if not request.logprobs:
        if request.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        return None
    return request.top_logprobs or 0


def _num_prompt_top(request: GenerationFields, prompts: Sequence[PromptTokens]) -> int | None:
    """Return how many of the likeliest tokens are to be read beside each prompt token, or None to read none."""
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs: not available in a stream", "prompt_logprobs")
    wanted = [] if request.prompt_logprobs is None else [(request.prompt_logprobs, "prompt_logprobs")]
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        wanted.append((request.logprobs, "logprobs"))
    for num_top, param in wanted:
        for prompt in prompts:
            if len(prompt.token_ids) * (1 + num_top) > MAX_PROMPT_VALUES:
                raise InvalidRequest(
                    f"{param}: {len(prompt.token_ids)} prompt tokens with {1 + num_top} log probabilities each are "
                    f"more than {MAX_PROMPT_VALUES}",
                    param,
                )
    return max((num_top for num_top, _ in wanted), default=None)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
