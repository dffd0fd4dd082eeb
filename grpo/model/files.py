"""The files that a model and its tokenizer are read from."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file

from grpo.config import ModelConfig
from grpo.config.find import locate

CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "additional_chat_templates/*"),
)
NOT_WEIGHTS = ("training_args.bin", "optimizer", "scheduler")


def input_files(model: ModelConfig) -> dict[str, Path]:
    """By recipe key and name, the files of ``model.name`` and ``model.tokenizer`` that are here, as folders or a GGUF
    file. A hub's are not: ``hub_commits`` names them."""
    found = {}
    tokenizer = _here(model.tokenizer or model.name)
    if (folder := _here(model.name)) is not None:
        files = [folder] if folder.is_file() else _weights(folder) + _matching(folder, CONFIGS)
        if model.trust_remote_code and folder.is_dir():
            files += folder.glob("*.py")
        found |= {f"model.name: {file.name}": file for file in files}
    if tokenizer is not None and tokenizer.is_dir():
        key = "model.tokenizer" if model.tokenizer else "model.name"
        found |= {f"{key}: {file.relative_to(tokenizer)}": file for file in _matching(tokenizer, TOKENIZER)}
    return found


def hub_commits(model: ModelConfig) -> dict[str, str]:
    """By recipe key, the commit of what was loaded from a hub, as its cache on this machine has it."""
    found = {}
    for key, name in (("model.name", model.name), ("model.tokenizer", model.tokenizer)):
        if name and _here(name) is None:
            file = "config.json" if key == "model.name" else "tokenizer_config.json"
            try:
                path = cached_file(name, file, revision=model.revision, local_files_only=True)
            except (OSError, ValueError):
                continue
            if path and Path(path).parent.parent.name == "snapshots":
                found[f"{key}: commit on the hub"] = Path(path).parent.name
    return found


def _here(name: str) -> Path | None:
    path = Path(locate(name)).expanduser()
    return path if path.exists() else None


def _weights(folder: Path) -> list[Path]:
    """What ``from_pretrained`` prefers: safetensors where there are any."""
    found = _matching(folder, ("*.safetensors",)) or [
        file for file in _matching(folder, ("*.bin",)) if not file.name.startswith(NOT_WEIGHTS)
    ]
    return found + _matching(folder, ("*.index.json",))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
