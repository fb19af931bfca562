"""Command line, configuration and launching; and the engine in this process, imported only when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.async_llm import AsyncLLM
    from baton.llm import LLM
    from baton.outputs import CompletionOutput, Logprob, RequestOutput
    from baton.sampling import SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]

_MODULES = {
    "LLM": "baton.llm",
    "AsyncLLM": "baton.async_llm",
    "CompletionOutput": "baton.outputs",
    "Logprob": "baton.outputs",
    "RequestOutput": "baton.outputs",
    "SamplingParams": "baton.sampling",
    "StructuredOutputsParams": "baton.sampling",
}


def __getattr__(name: str) -> Any:
    """Import one of the public names: torch comes with the engine, and the router must start without it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'baton' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
