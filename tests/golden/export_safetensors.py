"""Write a GGUF model as a Hugging Face directory: the same float32 weights, in two safetensors shards and an index.

The tests serve both forms and expect the same tokens. By hand:

    python -m tests.golden.export_safetensors MODEL.gguf FOLDER
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig, from_gguf
from model.gguf_file import GgufFile
from model.gguf_weights import GgufWeights
from tests.model.plain import hf_config, tensor_shapes

NUM_SHARDS = 2


def export_safetensors(gguf_path: Path, folder: Path, tokenizer_json: str | None = None) -> Path:
    """Write config, generation config, index and shards of the model into `folder` (made if missing); returns it.

    `tokenizer_json` becomes tokenizer.json where given. Raises ModelError for a model that Baton cannot read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = GgufFile(gguf_path)
    config = from_gguf(file)
    _write_json(folder / "config.json", hf_config(_tidy(config)) | {"torch_dtype": "float32", "hidden_act": "silu"})
    generation: dict[str, object] = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    _write_json(folder / "generation_config.json", generation)
    if tokenizer_json is not None:
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    source = GgufWeights(file, config)
    shapes = tensor_shapes(config)
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(NUM_SHARDS):
        shard_name = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        part = names[shard * len(names) // NUM_SHARDS : (shard + 1) * len(names) // NUM_SHARDS]
        tensors: dict[str, Tensor] = {name: source.tensor(name, shapes[name]) for name in part}
        save_file(tensors, folder / shard_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard_name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def _tidy(config: ModelConfig) -> ModelConfig:
    # GGUF stores 1e-5 as a float32, whose double is 9.99999974e-06: write what was meant.
    return replace(config, rms_eps=float(f"{config.rms_eps:.6g}"))


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(export_safetensors(Path(sys.argv[1]), Path(sys.argv[2])))
