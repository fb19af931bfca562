"""Texts per second through a running `baton serve MODEL`, beside plain torch in this process.

    baton serve minilm --port 8000
    python -m bench.embeddings --url http://127.0.0.1:8000 --model minilm [--plain FOLDER]

1. Texts are lists of random token ids of one length, so that nobody's tokenizer is measured. 2. `--concurrency`
requests of `--inputs` texts each are kept open until the time is over, and each is waited for. 3. With
`--plain`, the encoder in FOLDER then computes such texts in this process, without HTTP, router or worker: what the
server could reach with so many threads, while it is idle.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

LENGTHS = (64, 256)
FIRST_ID, LAST_ID = 1000, 30_000


@dataclass(frozen=True, slots=True)
class Rate:
    """Texts answered in so many seconds, with the processor time of whoever computed them."""

    num_texts: int
    elapsed_s: float
    cpu_s: float = 0.0

    @property
    def cpu_ms_per_text(self) -> float:
        """Processor time of the workers, or of this process, for one text: it says something on a busy machine, too."""
        return 1000 * self.cpu_s / max(1, self.num_texts)

    @property
    def texts_per_s(self) -> float:
        """Texts per second."""
        return self.num_texts / self.elapsed_s


def texts(rng: random.Random, num_texts: int, num_tokens: int) -> list[list[int]]:
    """Return texts as token ids."""
    return [[rng.randrange(FIRST_ID, LAST_ID) for _ in range(num_tokens)] for _ in range(num_texts)]


async def served(url: str, model: str, num_tokens: int, arguments: argparse.Namespace) -> Rate:
    """Measure a server; raises RuntimeError for an answer that is not 200."""
    end_s = 0.0
    num_done = 0

    async def client(http: aiohttp.ClientSession, seed: int) -> None:
        nonlocal num_done
        rng = random.Random(seed)
        while time.monotonic() < end_s:
            body = {"model": model, "input": texts(rng, arguments.inputs, num_tokens), "encoding_format": "base64"}
            async with http.post(f"{url}/v1/embeddings", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {answer}")
            num_done += len(answer["data"])

    async with aiohttp.ClientSession() as http:
        end_s = time.monotonic() + arguments.warm_up_s
        await asyncio.gather(*(client(http, seed) for seed in range(arguments.concurrency)))
        cpu_s, num_done, begin_s = await workers_cpu_s(http, url), 0, time.monotonic()
        end_s = begin_s + arguments.seconds
        await asyncio.gather(*(client(http, 1000 + seed) for seed in range(arguments.concurrency)))
        cpu_s = await workers_cpu_s(http, url) - cpu_s
    return Rate(num_done, time.monotonic() - begin_s, cpu_s)


async def workers_cpu_s(http: aiohttp.ClientSession, url: str) -> float:
    """Return the processor time that the workers of a server on this machine have used."""
    async with http.get(f"{url}/census") as response:
        pids = {worker["pid"] for worker in (await response.json())["workers"]}
    return sum(map(_cpu_s, pids))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def plain(folder: str, num_tokens: int, arguments: argparse.Namespace) -> Rate:
    """Measure the same operations in this process, written out here so that nothing of ours takes part."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    torch.set_num_threads(arguments.threads)
    weights = load_file(f"{folder}/model.safetensors")
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    size = weights["embeddings.word_embeddings.weight"].shape[1]

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (size,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], arguments.heads, -1).transpose(1, 2)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        embedded = [weights["embeddings.word_embeddings.weight"][ids]]
        embedded.append(weights["embeddings.position_embeddings.weight"][: ids.shape[1]])
        embedded.append(weights["embeddings.token_type_embeddings.weight"][0])
        x = norm(embedded[0] + embedded[1] + embedded[2], "embeddings.LayerNorm")
        for index in range(layers):
            prefix = f"encoder.layer.{index}"
            q, k, v = (heads(dense(x, f"{prefix}.attention.self.{name}")) for name in ("query", "key", "value"))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = norm(dense(attended, f"{prefix}.attention.output.dense") + x, f"{prefix}.attention.output.LayerNorm")
            wide = F.gelu(dense(x, f"{prefix}.intermediate.dense"))
            x = norm(dense(wide, f"{prefix}.output.dense") + x, f"{prefix}.output.LayerNorm")
        return F.normalize(x.mean(1), dim=-1)

    rng, num_done = random.Random(1), 0
    with torch.inference_mode():
        forward(torch.tensor(texts(rng, arguments.batch, num_tokens)))
        begin_s, cpu_s = time.monotonic(), time.process_time()
        while (elapsed_s := time.monotonic() - begin_s) < arguments.seconds:
            forward(torch.tensor(texts(rng, arguments.batch, num_tokens)))
            num_done += arguments.batch
    return Rate(num_done, elapsed_s, time.process_time() - cpu_s)


def say(num_tokens: int, what: str, rate: Rate) -> None:
    """Print one line."""
    figures = f"{rate.texts_per_s:8.1f} texts/s  {rate.cpu_ms_per_text:8.2f} ms of processor time a text"
    print(f"{num_tokens:>4} tokens  {what:<34} {figures}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.embeddings", description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="of a running server; without one only --plain is measured")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up-s", type=float, default=2.0)
    parser.add_argument("--concurrency", type=int, default=8, help="requests open at once")
    parser.add_argument("--inputs", type=int, default=16, help="texts of a request")
    parser.add_argument("--plain", metavar="FOLDER", help="measure plain torch with the encoder there")
    parser.add_argument("--threads", type=int, default=1, help="of plain torch")
    parser.add_argument("--batch", type=int, default=1, help="texts of a forward of plain torch")
    parser.add_argument("--heads", type=int, default=12, help="attention heads of the encoder in FOLDER")
    arguments = parser.parse_args()
    for num_tokens in LENGTHS:
        if arguments.url:
            rate = asyncio.run(served(arguments.url, arguments.model, num_tokens, arguments))
            say(num_tokens, "served", rate)
        if arguments.plain:
            rate = plain(arguments.plain, num_tokens, arguments)
            name = f"plain torch, {arguments.threads} threads, batch {arguments.batch}"
            say(num_tokens, name, rate)


if __name__ == "__main__":
    main()
