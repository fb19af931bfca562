"""Which multiprocessors a stream's programs run on, as they say themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NUM_PROGRAMS = 20_000
_NUM_SPINS = 200


@triton.jit
def _note_place(places, num_spins):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    place = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    for spin in range(num_spins):  # long enough that all multiprocessors get some programs
        tl.store(places + program, spin)
    tl.store(places + program, place)


def multiprocessors_used(stream: torch.cuda.Stream, *, in_graph: bool = False) -> set[int]:
    """Run many small programs on a stream, launched or recorded and replayed there, and return where they ran."""
    with torch.cuda.stream(stream):
        places = torch.full((_NUM_PROGRAMS,), -1, dtype=torch.int32, device="cuda")
        _note_place[(_NUM_PROGRAMS,)](places, _NUM_SPINS)
    stream.synchronize()
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            _note_place[(_NUM_PROGRAMS,)](places, _NUM_SPINS)
        with torch.cuda.stream(stream):
            places.fill_(-1)
            graph.replay()
        stream.synchronize()
    return set(places.tolist())
