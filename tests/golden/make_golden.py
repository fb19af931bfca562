"""Make smollm2.json: what transformers, in float32, answers greedily to 24 prompts. Run by hand, not by the tests.

How to run (an environment of its own, away from the repository: transformers must not see our folder `kernels`):

    python3.11 -m venv golden-env
    golden-env/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate gguf safetensors
    golden-env/bin/python tests/golden/make_golden.py MODEL.gguf tests/golden/smollm2.json

MODEL.gguf is the file of the alias `smollm2` (after a first `baton serve smollm2`: ~/.cache/baton/smollm2/*.gguf).
Weights and tokenizer are read by transformers' own GGUF loader, so that nothing of ours takes part. Attention is
transformers' eager implementation, the loop below is greedy with its KV cache, and an EOS does not stop it.

A prompt enters the file only if the gap between the best two logits stays above MIN_GAP at each of its 64 steps:
between two correct float32 implementations logits differ by about 1e-4, so no golden token hangs on rounding.
The versions used stand in the file under `made_with`.
"""

import importlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_PROMPTS = 24
NUM_STEPS = 64
MIN_GAP = 2e-3
TOP_LOGITS = 16
LOGIT_STEPS = 4
PACKAGES = ("torch", "transformers", "accelerate", "gguf", "safetensors", "numpy")

SKILLS = "Python,Kubernetes,Go,payroll law,nursing,welding,SQL,negotiation,Rust,forklift driving,French,data modelling"
CITIES = "Lyon,Dublin,Osaka,Toronto,Nairobi,Graz,Austin,Lisbon,Pune,Bergen,Leeds,Quito"
ROLES = "backend engineer,ward nurse,site manager,data analyst,recruiter,machine operator,translator,accountant"
VERBS = "led,rebuilt,documented,audited,automated,taught,maintained,measured,designed,negotiated"
THINGS = "the billing service,a night shift rota,the import pipeline,three supplier contracts,a hiring process"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One candidate: its text, whether it is sent as a chat turn, and a length in tokens to cut it to (0: uncut)."""

    name: str
    text: str
    chat: bool = False
    num_tokens: int = 0
    required: bool = False


def profile(seed: int, num_lines: int) -> str:
    """Write an invented candidate's profile, always the same for a seed."""
    pick = random.Random(seed)

    def one(words: str) -> str:
        return pick.choice(words.split(","))

    lines = [f"Candidate {seed}: {one(ROLES)} from {one(CITIES)}, {pick.randint(1, 30)} years of experience."]
    for _ in range(num_lines):
        lines.append(
            f"- {pick.randint(1995, 2024)}, {one(CITIES)}: {one(VERBS)} {one(THINGS)} with a team of "
            f"{pick.randint(2, 40)}, using {one(SKILLS)} and {one(SKILLS)}; result: {pick.randint(3, 90)} % better."
        )
    return "\n".join(lines)


def rubric() -> str:
    """Write the long part that two prompts share (more than 600 tokens)."""
    pick = random.Random(99)
    lines = ["You judge candidates against a hirer's qualifications. Answer each with met, partly met or not met."]
    skills = SKILLS.split(",")
    for number in range(1, 26):
        first, second = pick.sample(skills, 2)
        lines.append(
            f"{number}. The candidate has at least {pick.randint(1, 9)} years of {first}, or has taught {second} "
            f"in {pick.choice(CITIES.split(','))}; name the line of the profile that shows it."
        )
    return "\n".join(lines)


def plain_prompts() -> list[Prompt]:
    """Give the short and middle ones: English, code, JSON, other languages."""
    code = "def merge(left, right):\n    out = []\n    i = j = 0\n    while i < len(left) and j < len(right):\n"
    c_code = "#include <stdio.h>\n\nint main(int argc, char **argv) {\n    for (int i = 1; i < argc; i++) {\n"
    sql = "CREATE TABLE jobs (id INT PRIMARY KEY, title TEXT, city TEXT, salary INT);\nSELECT city, AVG(salary)\n"
    record = '{"title": "Data engineer", "city": "Berlin", "remote": true, "skills": ["Python", "SQL"], "salary":'
    listing = '[{"id": 1, "name": "Ada", "years": 12}, {"id": 2, "name": "Grace", "years": 30}, {"id": 3, "name":'
    several = "Bonjour, je cherche un emploi à Lyon. Guten Tag, ich suche eine Stelle in Graz. "
    several += "こんにちは、仕事を探しています。"
    russian = "Здравствуйте! Меня зовут Анна, я ищу работу переводчика. Мой опыт: "
    spanish = "La capital de Francia es París. La capital de Italia es Roma. La capital de Japón es"
    search = "Turn this search into JSON with the keys role, city and remote: "
    search += "remote Python jobs near Dublin, no agencies"
    story = "The harbour was quiet that morning. Only the old ferryman was awake, and he"
    return [
        Prompt("five tokens", "The capital of France is Paris", num_tokens=5, required=True),
        Prompt("capital", "What is the capital of France?", chat=True),
        Prompt("story", story),
        Prompt("water", "Water boils at a temperature of 100 degrees Celsius because"),
        Prompt("haiku", "Write a haiku about the sea.", chat=True),
        Prompt("python", code),
        Prompt("c", c_code),
        Prompt("sql", sql),
        Prompt("json object", record),
        Prompt("json list", listing),
        Prompt("mixed languages", several),
        Prompt("russian", russian),
        Prompt("spanish", spanish),
        Prompt("search", search, chat=True),
        Prompt("numbers", "1, 1, 2, 3, 5, 8, 13, 21,"),
        Prompt("list", "Give me five tips for a job interview.", chat=True),
        Prompt("letter", "Dear Ms Okafor,\n\nThank you for your application for the post of site manager. We"),
        Prompt("emoji", "🚀🚀🚀 We are hiring! 🎉 Join our team of builders and"),
    ]


def long_prompts() -> list[Prompt]:
    """Give the long ones: profiles of a few hundred to 3,000 tokens, and two that share a prefix."""
    shared = rubric()
    many = "\n\n".join(profile(seed, 8) for seed in range(30, 45))
    return [
        Prompt("profile 300", "Sum up this candidate.\n" + profile(1, 9), chat=True),
        Prompt("profile 450", profile(2, 20), num_tokens=450),
        Prompt("profile 513", profile(3, 24), num_tokens=513, required=True),
        Prompt("profile 800", profile(4, 40), num_tokens=800),
        Prompt("shared prefix, first", f"{shared}\n\n{profile(5, 4)}\n\nVerdict:", required=True),
        Prompt("shared prefix, second", f"{shared}\n\n{profile(6, 5)}\n\nVerdict:", required=True),
        Prompt("rubric chat", f"{shared}\n\n{profile(7, 6)}", chat=True),
        Prompt("profiles 1024", many, num_tokens=1024),
        Prompt("profiles 1500", many[2000:], num_tokens=1500),
        Prompt("profiles 2300", many[1000:], num_tokens=2300, required=True),
        Prompt("profiles 3000", many, num_tokens=3000, required=True),
    ]


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokenise one prompt, as a chat turn where it is one, cut to its length."""
    text = prompt.text
    if prompt.chat:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if prompt.num_tokens and len(ids) < prompt.num_tokens:
        raise SystemExit(f"prompt {prompt.name!r} has {len(ids)} tokens, {prompt.num_tokens} wanted")
    return ids[: prompt.num_tokens] if prompt.num_tokens else ids


def answer(model: Any, ids: list[int]) -> dict[str, Any]:
    """Continue greedily for NUM_STEPS tokens; keep the smallest top-2 gap and the first steps' best logits."""
    torch = importlib.import_module("torch")
    fed, cache = torch.tensor([ids]), None
    tokens: list[int] = []
    gaps: list[float] = []
    best: list[dict[str, list[Any]]] = []
    with torch.inference_mode():
        for step in range(NUM_STEPS):
            out = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            values, indices = logits.topk(TOP_LOGITS)
            gaps.append(float(values[0] - values[1]))
            tokens.append(int(indices[0]))
            if step < LOGIT_STEPS:
                best.append({"ids": indices.tolist(), "values": [float(f"{value:.9g}") for value in values.tolist()]})
            fed = indices[None, :1]
    return {"tokens": tokens, "min_gap": float(f"{min(gaps):.6g}"), "top_logits": best}


def collect(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Answer the candidates in turn; drop those with a narrow gap, keep the first NUM_PROMPTS of the rest."""
    kept: list[dict[str, Any]] = []
    candidates = sorted([*long_prompts(), *plain_prompts()], key=lambda prompt: not prompt.required)
    for prompt in candidates:
        if len(kept) == NUM_PROMPTS:
            break
        ids = token_ids(tokenizer, prompt)
        entry = {"name": prompt.name, "prompt": ids, **answer(model, ids)}
        wide = entry["min_gap"] > MIN_GAP
        print(f"{prompt.name}: {len(ids)} tokens, gap {entry['min_gap']:.5f}{'' if wide else ', dropped'}", flush=True)
        print("   ", repr(tokenizer.decode(entry["tokens"]))[:110], flush=True)
        if wide:
            kept.append(entry)
        elif prompt.required:
            raise SystemExit(f"required prompt {prompt.name!r} has too narrow a gap: change its text")
    if len(kept) < NUM_PROMPTS:
        raise SystemExit(f"only {len(kept)} prompts keep a gap of {MIN_GAP}")
    kept.sort(key=lambda entry: len(entry["prompt"]))
    for entry in kept:
        if entry["name"] not in ("five tokens", "profile 513", "profiles 3000"):
            del entry["top_logits"]
    return kept


def main(gguf: Path, output: Path) -> None:
    """Load the model with transformers and write the golden file."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.manual_seed(0)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    versions = {name: importlib.import_module("importlib.metadata").version(name) for name in PACKAGES}
    made_with = {**versions, "weights": f"{gguf.name}, dequantised by transformers", "attention": "eager, float32"}
    head = {"made_with": made_with, "min_gap": MIN_GAP, "num_steps": NUM_STEPS}
    lines = [json.dumps(entry, separators=(",", ":")) for entry in collect(model, tokenizer)]
    text = json.dumps(head, indent=0)[:-2] + ',\n"prompts": [\n' + ",\n".join(lines) + "\n]\n}\n"
    json.loads(text)
    output.write_text(text, encoding="utf-8")
    print(f"wrote {output}: {output.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
