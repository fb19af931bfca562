"""Where the peers and the models that all servers share lie: one folder, outside version control.

.peers/
  llama/         venv (cmake, ninja), src (llama.cpp's sources), build
  vllm/          venv, wheel, allocator
  transformers/  venv
  models/        the model in every format
  logs/          what servers print
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Weights = Literal["Q4_0", "Q4_1", "Q8_0", "F32"]
PeerName = Literal["llama", "vllm", "transformers"]

CHECKOUT: Final = Path(__file__).resolve().parents[2]
GGUF_WEIGHTS: Final[tuple[Weights, ...]] = ("Q4_0", "Q4_1", "Q8_0", "F32")


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths under one root; nothing here looks whether they exist."""

    root: Path = CHECKOUT / ".peers"

    def folder(self, peer: PeerName) -> Path:
        """Return a peer's own folder."""
        return self.root / peer

    def venv(self, peer: PeerName) -> Path:
        """Return a peer's own virtual environment."""
        return self.folder(peer) / "venv"

    def program(self, peer: PeerName, name: str) -> Path:
        """Return a program of a peer's virtual environment."""
        return self.venv(peer) / "bin" / name

    @property
    def llama_build(self) -> Path:
        """Folder that llama.cpp is built in."""
        return self.folder("llama") / "build"

    def llama_program(self, name: str) -> Path:
        """Return a program of llama.cpp's."""
        return self.llama_build / "bin" / name

    @property
    def models(self) -> Path:
        """Folder of the models."""
        return self.root / "models"

    def gguf(self, weights: Weights) -> Path:
        """Return the model in one GGUF format."""
        return self.models / f"SmolLM2-135M-Instruct.{weights}.gguf"

    @property
    def hugging_face(self) -> Path:
        """Model in float32 as a Hugging Face folder."""
        return self.models / "smollm2-hf"

    @property
    def allocator(self) -> Path:
        """The tcmalloc that vLLM asks for, unpacked from Debian's package; need not exist."""
        return self.folder("vllm") / "tcmalloc" / "libtcmalloc_minimal.so.4"

    @property
    def openmp(self) -> Path:
        """Intel's OpenMP, which vLLM's requirements bring."""
        return self.venv("vllm") / "lib" / "libiomp5.so"

    @property
    def logs(self) -> Path:
        """Folder of the servers' logs."""
        return self.root / "logs"
