"""From a validated body to sequences that workers can run.

1. The model must be one that is served here. 2. Messages become text by the chat template; text becomes token ids.
3. Prompt and max_tokens must fit the context; token ids must be in the vocabulary. 4. Every choice of every prompt is a
sequence of its own, with its own seed.

Pure but for drawing seeds, and possibly slow (a megabyte of text takes half a second): long bodies go to a thread.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from protocol.errors import ContextTooLong, InvalidRequest, RequestRejected, UnknownModel
from protocol.request import MAX_SEED, Grammar, SamplingParams
from router.answer_bounds import MAX_ANSWER_VALUES, AnswerBound, num_logprobs, num_prompt_top
from router.api import (
    MAX_CHOICES,
    MAX_PROMPTS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    TokenizeRequest,
)
from router.conversation import calls_of, check_results, render, rendered, told
from router.request_ids import check as check_request_id
from router.response_request import RENAMED, ResponsesRequest, renamed
from router.structured import Structured, structured_output
from router.text import TextOptions
from router.text_threads import TextBudget
from router.tokenizer import Tokenizer
from router.tools import ToolUse, tool_use

DEFAULT_COMPLETION_TOKENS = 16
_MIN_TEMPERATURE = 1e-5
Named = TypeVar("Named", bound=msgspec.Struct)
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

    def __init__(
        self, tokenizer: Tokenizer, served_model_names: Sequence[str], max_answer_values: int = MAX_ANSWER_VALUES
    ) -> None:
        self._tokenizer = tokenizer
        self._bound = AnswerBound(max_answer_values)
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
        request = self.named(request)
        if request.stream_options is not None and not request.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
            )
        tools = None
        if isinstance(request, ChatRequest):
            tools = tool_use(request.tools, request.tool_choice, request.parallel_tool_calls)
            prompts = [self._chat_prompt(request, max_model_len, tools)]
        else:
            prompts = self._completion_prompts(request, max_model_len)
        if len(prompts) * (request.n or 1) > MAX_CHOICES:
            raise InvalidRequest(f"n: prompts times n may be at most {MAX_CHOICES}", "n")
        choices = self._choices(request, prompts, max_model_len)
        structured = structured_output(request)
        if tools is not None and (grammar := tools.grammar()) is not None:
            if structured is not None:
                raise InvalidRequest(f"tool_choice: {structured.field} asks for something else", "tool_choice")
            structured = Structured(grammar, "tools")
        options = request.stream_options
        job = Job(
            is_chat=isinstance(request, ChatRequest),
            model=request.model or "",
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
            num_prompt_top=num_prompt_top(request, [len(prompt.token_ids) for prompt in prompts]),
            num_shown_top=request.prompt_logprobs,
            is_prompt_only=_is_prompt_only(request),
        )
        return job if structured is None else job.with_grammar(structured.grammar)

    def _response_job(self, request: ResponsesRequest, max_model_len: int) -> Job:
        request = self.named(request)
        chat = request.to_chat()
        try:
            job = self.job(chat, max_model_len)
        except RequestRejected as error:
            raise renamed(error) from error
        return replace(job, response=request, grammar_field=RENAMED.get(job.grammar_field, job.grammar_field))

    def check_model(self, model: str | None) -> None:
        """Raise UnknownModel unless the name is served here; none, or an empty one, is whatever is served."""
        if model and model not in self._names:
            by_lower = {name.lower(): name for name in self._names}
            close = difflib.get_close_matches(model[:200].lower(), by_lower, n=1)
            meant = f"; did you mean {by_lower[close[0]]!r}?" if close else ""
            served = ", ".join(self._names)
            raise UnknownModel(f"the model {model[:200]!r} does not exist here; served: {served}{meant}", "model")

    def named(self, request: Named) -> Named:
        """Return a request with the name that answers repeat: the one that it asks for, or the reported one.

        Raises:
            UnknownModel: it asks for another one.
        """
        given: str | None = getattr(request, "model")  # noqa: B009  every body has one
        self.check_model(given)
        return request if given else msgspec.structs.replace(request, model=self._names[0])

    def tokenize(self, request: TokenizeRequest, max_model_len: int) -> list[int]:
        """Return the token ids of a prompt or conversation."""
        self.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("give either prompt or messages", "prompt")
        if request.messages is not None:
            plain = plain_messages(request.messages)
            messages = told(self._tokenizer, plain, None)[0]
            text = rendered(self._tokenizer, messages, request.add_generation_prompt is not False)
            return self._encode(text, bool(request.add_special_tokens), max_model_len, "messages")
        assert request.prompt is not None
        return self._encode(request.prompt, request.add_special_tokens is not False, max_model_len, "prompt")

    def known_tokens(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Return token ids that were given as `tokens`, all of them in the vocabulary."""
        return self._known(token_ids, "tokens")

    # --- prompts ---

    def _chat_prompt(self, request: ChatRequest, max_model_len: int, tools: ToolUse | None) -> PromptTokens:
        messages = plain_messages(request.messages)
        if request.truncate_prompt_tokens is None:
            # Before a template walks through it.
            self._refuse_long(sum(len(message["content"]) for message in messages), max_model_len, "messages")
        text = render(self._tokenizer, request, messages, tools)
        if request.truncate_prompt_tokens is not None:
            text = self._tail(text, max_model_len)
        ids = self._encode(text, bool(request.add_special_tokens), max_model_len, "messages")
        ids = self._truncated(ids, request, max_model_len)
        return self._checked(ids, "messages", max_model_len)

    def _completion_prompts(self, request: CompletionRequest, max_model_len: int) -> list[PromptTokens]:
        parts = split_prompts(request.prompt)
        if len(parts) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt: at most {MAX_PROMPTS} prompts in one request", "prompt")
        if request.truncate_prompt_tokens is not None:
            parts = [self._tail(part, max_model_len) if isinstance(part, str) else part for part in parts]
        for part in parts:
            if isinstance(part, str):
                self._refuse_long(len(part), max_model_len, "prompt")
        TextBudget().spend(sum(len(part) for part in parts if isinstance(part, str)), "prompt")
        prompts = []
        for part in parts:
            if isinstance(part, str):
                ids = self._encode(part, request.add_special_tokens is not False, max_model_len, "prompt")
            else:
                ids = part
            kept = self._truncated(ids, request, max_model_len)
            is_whole, ids = len(kept) == len(ids), kept
            prompt = self._checked(ids, "prompt", max_model_len, num_following=0 if _is_prompt_only(request) else 1)
            if request.echo:
                text = part if isinstance(part, str) and is_whole else self._tokenizer.decode(ids, skip_special=False)
                prompt = PromptTokens(prompt.token_ids, text, is_echoed=True)
            prompts.append(prompt)
        return prompts

    def _encode(self, text: str, add_special: bool, max_model_len: int, param: str) -> list[int]:
        self._refuse_long(len(text), max_model_len, param)
        return self._tokenizer.encode(text, add_special)

    def _refuse_long(self, num_chars: int, max_model_len: int, param: str) -> None:
        # No token is longer than the longest: what cannot fit is refused before it is tokenised.
        if num_chars > max_model_len * self._tokenizer.max_token_chars:
            raise ContextTooLong(f"{param}: {num_chars} characters exceed the context of {max_model_len} tokens", param)

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
            num_kept = max_model_len if _is_prompt_only(request) else max(1, max_model_len - asked)
        return token_ids[-num_kept:]

    def _checked(self, token_ids: list[int], param: str, max_model_len: int, num_following: int = 1) -> PromptTokens:
        """Return a prompt that fits the context together with so many tokens at least. Raises RequestRejected."""
        if not token_ids:
            raise InvalidRequest(f"{param}: the prompt is empty", param)
        if max(token_ids) >= self._tokenizer.vocab_size:
            raise InvalidRequest(f"{param}: token id {max(token_ids)} is not in the vocabulary", param)
        if len(token_ids) + num_following > max_model_len:
            raise ContextTooLong(
                f"This model's maximum context length is {max_model_len} tokens, but the prompt has {len(token_ids)} "
                f"tokens, which leaves no room for the completion. Please reduce the length of the {param}.",
                param,
            )
        return PromptTokens(tuple(token_ids))

    # --- sampling ---

    def _choices(self, request: GenerationFields, prompts: Sequence[PromptTokens], max_model_len: int) -> list[Choice]:
        base_seed = secrets.randbits(63) if request.seed is None else request.seed & MAX_SEED
        # What names tokens may be long: it is looked at once, whatever the number of prompts.
        stop_token_ids = self._known(request.stop_token_ids or (), "stop_token_ids")
        logit_bias = self._logit_bias(request.logit_bias or {})
        choices: list[Choice] = []
        num_choices = len(prompts) * (request.n or 1)
        self._bound.check_prompts(request, [len(p.token_ids) for p in prompts])
        for number, prompt in enumerate(prompts):
            sampling = msgspec.structs.replace(
                self._sampling(request, prompt, num_choices, max_model_len),
                stop_token_ids=stop_token_ids,
                logit_bias=logit_bias,
            )
            for i in range(request.n or 1):
                # Unseeded prompts draw independently; a seed gives every prompt the same numbers, as if asked alone.
                seed = (base_seed + i + (number << 32 if request.seed is None else 0)) & MAX_SEED
                choices.append(Choice(len(choices), prompt, msgspec.structs.replace(sampling, seed=seed)))
        return choices

    def _sampling(
        self, request: GenerationFields, prompt: PromptTokens, num_choices: int, max_model_len: int
    ) -> SamplingParams:
        max_tokens = self._max_tokens(request, len(prompt.token_ids), max_model_len)
        if (most := self._bound.most_tokens(request, num_choices)) is not None:
            # Where nothing was asked for, an answer ends where it is full.
            max_tokens = min(max_tokens, most)
        min_tokens = request.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens ({min_tokens}) must not exceed max_tokens ({max_tokens})", "min_tokens")
        temperature = _or(request.temperature, 1.0)
        return SamplingParams(
            seed=0,
            temperature=temperature if temperature >= _MIN_TEMPERATURE else 0.0,
            top_k=max(0, _or(request.top_k, 0)),
            top_p=_or(request.top_p, 1.0),
            min_p=_or(request.min_p, 0.0),
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            max_tokens=max(1, max_tokens),
            min_tokens=min_tokens,
            ignore_eos=bool(request.ignore_eos),
            eos_token_ids=self._tokenizer.eos_token_ids,
            num_logprobs=num_logprobs(request),
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


def _is_prompt_only(request: GenerationFields) -> bool:
    return request.max_tokens == 0 and isinstance(request, CompletionRequest)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
