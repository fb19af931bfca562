"""Build a tokenizer from the vocabulary that a GGUF file carries.

Two kinds exist in the models served here (`tokenizer.ggml.model`):

    gpt2    byte-level BPE; the way text is split first is named by `tokenizer.ggml.pre`
    llama   SentencePiece BPE with byte fallback; merges follow from the scores of the pieces

Anything else is refused by name: a tokenizer that is nearly right makes a model that is quietly wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from protocol.errors import ConfigError

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6

_SHARED: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3_SPLIT: Final = _WORDS + r"|\p{N}{1,3}" + _SHARED
QWEN2_SPLIT: Final = _WORDS + r"|\p{N}" + _SHARED

# What `tokenizer.ggml.pre` calls them, by how they split.
_DIGITS: Final = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_GPT2: Final = ("gpt-2", "default", "phi-2", "olmo", "jina-es", "jina-de", "exaone")
_LLAMA3: Final = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
_QWEN2: Final = ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez")


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer described by a GGUF file's metadata.

    Raises:
        ConfigError: there is no vocabulary, or it is of a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ConfigError("the GGUF file carries no vocabulary (tokenizer.ggml.tokens)")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentence_piece(metadata, tokens)
    else:
        raise ConfigError(f"GGUF tokenizer model {kind!r} is not supported (gpt2 and llama are)")
    types = metadata.get("tokenizer.ggml.token_type") or []
    added = [AddedToken(t, special=k == _CONTROL, normalized=False)
             for t, k in zip(tokens, types, strict=False) if k in (_CONTROL, _USER_DEFINED)]  # fmt: skip
    tokenizer.add_tokens(added)
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        _prepend_bos(tokenizer, metadata, tokens)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise ConfigError("the GGUF file carries no usable merges (tokenizer.ggml.merges)")
    # Llama 3 takes a whole word that is in the vocabulary before it looks at merges.
    model = models.BPE(vocab=_ids(tokens), merges=merges, ignore_merges=pre in _LLAMA3)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _DIGITS:
        splits = [pre_tokenizers.Digits(individual_digits=True), _bytes(use_regex=True)]
    elif pre in _GPT2:
        splits = [_bytes(use_regex=True)]
    elif pre in _LLAMA3:
        splits = [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), _bytes(use_regex=False)]
    elif pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), _bytes(use_regex=False)]
    else:
        known = ", ".join(sorted(_DIGITS + _GPT2 + _LLAMA3 + _QWEN2))
        raise ConfigError(f"GGUF pre-tokenizer {pre!r} is not supported (these are: {known})")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _sentence_piece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    scores, types = metadata.get("tokenizer.ggml.scores"), metadata.get("tokenizer.ggml.token_type")
    if not scores or not types or len(scores) != len(tokens) or len(types) != len(tokens):
        raise ConfigError("the GGUF file carries no scores or types of its vocabulary (tokenizer.ggml.scores)")
    unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", 0))
    if not 0 <= unknown < len(tokens):
        raise ConfigError(f"tokenizer.ggml.unknown_token_id {unknown} is not in the vocabulary")
    pieces = {t: s for t, s, k in zip(tokens, scores, types, strict=True) if k not in (_CONTROL, _BYTE)}
    model = models.BPE(
        vocab=_ids(tokens),
        merges=merges_of_scores(pieces),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def merges_of_scores(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece BPE vocabulary: the likelier the merged piece, the earlier."""
    found: list[tuple[float, float, float, str, str]] = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-score, -pieces[left], -pieces[right], left, right))
    found.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in found]


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        ids.setdefault(token, index)
    return ids


def _prepend_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]) -> None:
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(bos_id, int) and 0 <= bos_id < len(tokens):
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
        )
