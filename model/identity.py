"""The identity of a model: one hash that two workers compare before a KV block moves between them.

Equal hashes mean equal config, equal tensor names, shapes and dtypes, and equal weights at every sampled place. The
whole of a large weight file is not read, since a start must not wait for gigabytes: a file is sampled in 256 pieces of
64 KiB at even distances and one at its end, which covers files up to 16 MiB whole. A fine-tune moves nearly every
weight, so two different ones do not collide in practice; a file altered on purpose between the samples would not be
noticed, and the hash is no defence against that.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Protocol

from model.config import read_config
from model.encoder_config import is_encoder, read_encoder_config
from model.errors import WeightError
from model.gguf_file import GgufFile
from model.source import ModelFiles

_SAMPLE_BYTES = 64 * 1024
_NUM_SAMPLES = 256
_MAX_HEADER_BYTES = 256 * 1024 * 1024


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def model_hash(files: ModelFiles, dummy_seed: int = 0) -> str:
    """Hash config, tensor headers, sizes and samples of the weights: 64 hex digits, equal on every machine.

    File and folder names do not enter. `dummy_seed` stands for the weights of a dummy model and is ignored otherwise.
    Reads at most 16 MiB of each weight file. Raises ModelError.
    """
    digest = hashlib.sha256(b"baton model 1\0")
    shape = asdict(read_encoder_config(files) if is_encoder(files) else read_config(files))
    digest.update(json.dumps(shape, sort_keys=True).encode())
    if files.format == "dummy":
        digest.update(f"\0dummy {dummy_seed}".encode())
    for path in files.weight_files:
        try:
            with path.open("rb") as file:
                _add_file(digest, file, path)
        except OSError as error:
            raise WeightError(f"{path.name}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _add_file(digest: _Hash, file: BinaryIO, path: Path) -> None:
    num_bytes = path.stat().st_size
    start = _add_gguf_header(digest, path) if path.suffix == ".gguf" else _add_safetensors_header(digest, file, path)
    digest.update(f"\0{num_bytes} {start}\0".encode())
    last = max(start, num_bytes - _SAMPLE_BYTES)
    stride = max(_SAMPLE_BYTES, (num_bytes - start) // _NUM_SAMPLES)
    for offset in (*range(start, last, stride), last):
        file.seek(offset)
        digest.update(file.read(_SAMPLE_BYTES))


def _add_gguf_header(digest: _Hash, path: Path) -> int:
    gguf = GgufFile(path)
    for tensor in gguf.tensors.values():
        digest.update(f"{tensor.name} {tensor.shape} {tensor.ggml_type} {tensor.offset}\0".encode())
    return gguf.data_offset


def _add_safetensors_header(digest: _Hash, file: BinaryIO, path: Path) -> int:
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(_MAX_HEADER_BYTES, path.stat().st_size):
        raise WeightError(f"{path.name}: damaged safetensors header (it claims {header_bytes} bytes)")
    digest.update(file.read(header_bytes))
    return 8 + header_bytes
