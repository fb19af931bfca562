"""Make `minilm.json`: texts with their vectors by transformers, in float32.

Run it in an environment of its own, with transformers and torch and without this repository on the path:

    python tests/golden/make_embeddings.py MODEL_FOLDER tests/golden/minilm.json

MODEL_FOLDER is what `model.source.resolve("minilm", ...)` returns. Pooling (mean) and normalisation are written out
here as sentence-transformers does them, beside transformers' own BertModel.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertModel
from transformers import __version__ as version

NUM_SHOWN = 16
TEXTS = [
    "The candidate has led a team of five engineers for seven years.",
    "Seven years of experience leading a small engineering team.",
    "Bananas are rich in potassium.",
    "a",
    "Senior backend engineer (Rust, Python), remote, from €85,000 — start: 1 March.",
    "人材募集:東京のソフトウェアエンジニア。",
    "naïve café ÅNGSTRÖM straße İstanbul",
    " ".join(["We look for somebody who builds search services and likes to explain them."] * 12),
]


def main(folder: str, out: str) -> None:
    """Write the file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    found = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.inference_mode():
            mean = model(**inputs).last_hidden_state[0].double().mean(0)
        unit = mean / mean.norm()
        entry = {
            "text": text,
            "token_ids": inputs["input_ids"][0].tolist(),
            "norm": mean.norm().item(),
            "first": [round(x, 9) for x in unit[:NUM_SHOWN].tolist()],
            "vector": [round(x, 6) for x in unit.tolist()],
        }
        found.append(entry)
    settings = {"transformers": version, "torch": torch.__version__, "dtype": "float32", "texts": found}
    Path(out).write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
