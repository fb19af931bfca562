"""From a placement on the wire to a sequence, and what a worker refuses whoever asks."""

from __future__ import annotations

from engine.loading import LoadedModel
from engine.sequence import Sequence
from protocol.block_hash import block_hashes, root_hash
from protocol.readout import Pooling, ReadEmbedding, ReadLabels
from protocol.wire import Prefill, Reserve


def refusal_of(message: Prefill | Reserve, model: LoadedModel) -> str | None:
    """Return why this model cannot take a placement, or None.

    The router checks the same against the tokenizer; a worker must not index out of its tables all the same.
    """
    num_tokens = len(message.prompt) + len(message.emitted)
    if not message.prompt or num_tokens >= model.max_model_len:
        return f"{num_tokens} tokens; this worker takes 1 to {model.max_model_len - 1}"
    sampling, readout = message.sampling, message.readout if isinstance(message, Prefill) else None
    if isinstance(readout, ReadEmbedding) and readout.pooling is Pooling.CLS:
        return "the first token of a decoder has seen nothing: cls pooling is for encoders"
    if readout is not None and isinstance(message, Prefill) and message.decode_worker_id is not None:
        return "a readout has no decode worker"
    largest = max(
        *message.prompt,
        *message.emitted,
        *sampling.stop_token_ids,
        *sampling.eos_token_ids,
        *(token_id for token_id, _ in sampling.logit_bias),
        *(readout.token_ids if isinstance(readout, ReadLabels) else ()),
        0,
    )
    return f"token id {largest} is not in the vocabulary of {model.vocab_size}" if largest >= model.vocab_size else None


def sequence_of(message: Prefill | Reserve, model: LoadedModel) -> Sequence:
    """Return the sequence of a placement, its full blocks named; tokens emitted before follow the prompt.

    Costs about a microsecond per block: called on the event loop, so that the compute thread need not hash.
    """
    tokens = [*message.prompt, *message.emitted]
    is_replayed = isinstance(message, Reserve) and message.is_replayed
    root = root_hash(model.fingerprint.model_hash, message.cache_salt)
    return Sequence(
        request_id=message.request_id,
        transfer_id=message.transfer_id,
        epoch=message.epoch,
        tokens=tokens,
        num_prompt_tokens=len(message.prompt),
        num_prefill_tokens=len(message.prompt) if is_replayed else len(tokens),
        sampling=message.sampling,
        readout=message.readout if isinstance(message, Prefill) else None,
        root=root,
        names=block_hashes(tokens, model.fingerprint.block_size, root),
    )
