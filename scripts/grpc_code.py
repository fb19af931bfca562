"""Generate the Python code of the gRPC messages from their proto file; with --check, only say whether it is current."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = "router/rpc/baton_v1.proto"


def generated(folder: Path) -> dict[str, str]:
    """Generate into a folder; return the files by their path in this repository."""
    from grpc_tools import protoc

    options = [f"--proto_path={ROOT}", f"--python_out={folder}", f"--pyi_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main(["protoc", *options, PROTO]) != 0:
        raise SystemExit(f"{PROTO} could not be compiled")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.py*"))}


def main(arguments: list[str]) -> int:
    """Write what differs, or name it."""
    with tempfile.TemporaryDirectory() as folder:
        files = generated(Path(folder))
    stale = [name for name, text in files.items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
    for name in stale:
        if "--check" in arguments:
            print(f"{name} is not what {PROTO} gives: run scripts/grpc_code.py", file=sys.stderr)
        else:
            (ROOT / name).write_text(files[name])
            print(f"wrote {name}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
