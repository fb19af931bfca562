"""Load generators and evaluation harnesses against a running server, each in an environment of its own.

    python -m tests.clients.harnesses [--out FILE] [aiperf | guidellm | evalscope | vllm | lm_eval ...]

1. Environments and the model folder are made under `.clients/` where they are missing. No harness may ask a hub.
2. A server as `make serve` starts it takes aiperf, guidellm, evalscope and `vllm bench serve`, one after the other.
3. A server with --dtype float32 takes lm_eval: its log probabilities are held against those of transformers, which
   reads the same weights from the model folder, for the same task. More than TOLERANCE apart is a failure.
4. Each gives a `Run`: version, command, requests, errors and its own figures; they are printed and written to --out.
   A harness that cannot be installed is written down as skipped with the reason. Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.clients.environments import ROOT, Environment, InstallError, ensure, version
from tests.clients.harness_reports import COMPARISON, READERS, Figures, Run, document, largest_difference
from tests.clients.heavy import one_server
from tests.clients.model_folder import HUB_NAME, hub_cache, model_folder
from tests.clients.peek import Peek

TOLERANCE: Final = 1e-3
BUDGET_S: Final = 900.0
LOAD_NAMES: Final = ("aiperf", "guidellm", "evalscope", "vllm")
NAMES: Final = (*LOAD_NAMES, "lm_eval")
TASKS: Final = Path(__file__).with_name("lm_eval_tasks")
# One thread: those of a busy machine wait for each other far longer than they compute.
_OFFLINE: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
}


def load_command(name: str, url: str, tokenizer: Path, out: Path) -> list[str]:
    """Return a load generator's command without its program, with what it reports going to `out`."""
    texts = {
        "aiperf": f"profile -m smollm2 --tokenizer {HUB_NAME} --endpoint-type chat --streaming --url {url} --isl 64"
        " --osl 16 --request-count 20 --concurrency 4 --extra-inputs ignore_eos:true --extra-inputs min_tokens:16"
        " --goodput 'time_to_first_token:100 inter_token_latency:20' --ui simple"
        f" --output-artifact-dir {out}",
        "guidellm": f"run --backend kind=openai_http,target={url},model=smollm2 --profile kind=constant,rate=4"
        f" --constraint kind=max_requests,count=16 --tokenizer kind=huggingface_auto,model={tokenizer}"
        " --data kind=synthetic_text,prompt_tokens=64,output_tokens=16"
        f" --output kind=json,path={out}/guidellm.json --disable-progress",
        "evalscope": f"perf --url {url}/v1/chat/completions --model smollm2 --api openai --tokenizer-path {tokenizer}"
        " --dataset random --min-prompt-length 32 --max-prompt-length 64 --max-tokens 8 --number 6 --parallel 2"
        f" --stream --outputs-dir {out}",
        "vllm": f"bench serve --backend openai-chat --base-url {url} --endpoint /v1/chat/completions --model smollm2"
        f" --tokenizer {tokenizer} --dataset-name random --random-input-len 64 --random-output-len 16 --num-prompts 10"
        " --request-rate 5 --ignore-eos --goodput ttft:100 tpot:20 --save-result"
        f" --result-dir {out} --result-filename vllm.json",
    }
    return shlex.split(texts[name])


def run_load(name: str, server: Peek, out: Path) -> Run:
    """Run one load generator; what it cannot do stands in the Run."""
    try:
        environment = ensure(name)
    except InstallError as error:
        return Run(name, "", "", 0.0, skipped=str(error).splitlines()[0])
    out.mkdir()
    arguments = load_command(name, server.url, model_folder(ROOT / "models"), out)
    env = {"HF_HOME": str(hub_cache(ROOT / "models"))} if name == "aiperf" else {}
    seconds, problem = _run([str(environment.program(name)), *arguments], out, env)
    figures = Figures()
    if not problem:
        try:
            figures = READERS[name](out)
        except (OSError, LookupError, TypeError, ValueError) as error:
            problem = f"its report cannot be read: {error!r}"
    if not problem and (figures.num_errors or not figures.num_requests):
        problem = f"{figures.num_errors} of {figures.num_requests} requests failed"
    return Run(name, version(environment), shlex.join([name, *arguments]), seconds, figures, problem)


def run_lm_eval(server: Peek, out: Path) -> list[Run]:
    """Run lm_eval's tasks against the server and the likelihoods against transformers."""
    try:
        environment = ensure("lm_eval")
    except InstallError as error:
        return [Run("lm_eval", "", "", 0.0, skipped=str(error).splitlines()[0])]
    folder = model_folder(ROOT / "models")
    model = f"model=smollm2,base_url={server.url}/v1/completions,tokenizer={folder}"
    served = (
        f"--model local-completions --model_args {model},tokenizer_backend=huggingface,num_concurrent=2,max_length=512"
    )
    runs = [_evaluate(environment, served, "baton_likelihood,baton_generation", out / "served")]
    runs.append(_evaluate(environment, f"--model hf --model_args pretrained={folder},dtype=float32 --device cpu",
                          "baton_likelihood", out / "transformers"))  # fmt: skip
    if any(run.problem for run in runs):
        return runs
    difference, pairs = largest_difference(out / "served", out / "transformers")
    problem = "" if difference <= TOLERANCE else f"{difference:.2e} apart: more than {TOLERANCE:g}"
    figures = Figures(num_requests=pairs, shown={"largest difference of log probabilities": f"{difference:.2e}"})
    return [*runs, Run(COMPARISON, version(environment), "", 0.0, figures, problem)]


def _evaluate(environment: Environment, model: str, tasks: str, out: Path) -> Run:
    arguments = shlex.split(f"run {model} --include_path . --tasks {tasks} --output_path {out} --log_samples")
    seconds, problem = _run([str(environment.python), "-m", "lm_eval", *arguments], TASKS, {})
    figures = Figures() if problem else READERS["lm_eval"](out)
    return Run("lm_eval", version(environment), shlex.join(["lm_eval", *arguments]), seconds, figures, problem)


def _run(command: list[str], folder: Path, env: dict[str, str]) -> tuple[float, str]:
    """Run a command; returns seconds and what went wrong, empty if nothing did."""
    started_s = time.monotonic()
    print(f"$ {shlex.join(command)}", flush=True)
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | _OFFLINE | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUDGET_S,
        )
    except subprocess.TimeoutExpired:
        return BUDGET_S, f"not within {BUDGET_S:g} s"
    if done.returncode:
        print(done.stdout[-3000:], flush=True)
    return time.monotonic() - started_s, f"exit code {done.returncode}" if done.returncode else ""


def main() -> int:
    """Run the harnesses that are named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--out", type=Path, help="Markdown file for the summary")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no such harness: {', '.join(sorted(unknown))}")
    names, runs = args.names or list(NAMES), []
    with tempfile.TemporaryDirectory() as folder:
        if loads := [name for name in names if name in LOAD_NAMES]:
            with one_server(None) as server:
                runs += [run_load(name, server, Path(folder) / name) for name in loads]
        if "lm_eval" in names:
            with one_server(None, "--dtype", "float32") as server:
                runs += run_lm_eval(server, Path(folder))
        hidden = {folder: "OUT", str(model_folder(ROOT / "models")): "TOK"}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.0f}, Python"
    text = document(runs, f"{datetime.date.today()}, {machine} {platform.python_version()}", hidden)
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    shutil.rmtree(TASKS / "outputs", ignore_errors=True)
    return 1 if any(run.problem for run in runs) else 0


if __name__ == "__main__":
    raise SystemExit(main())
