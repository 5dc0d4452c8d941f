"""The base model as files: where it is, whether it can be edited, and its fingerprint.

Torch-free. Knows nothing of weights beyond the bytes of their files.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from workers.contract import DType, Record
from workers.errors import IncompleteModel, UnsupportedModel

SUPPORTED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Phi3ForCausalLM",
    "GptOssForCausalLM",
    "Olmo2ForCausalLM",
)

_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.txt"]
_CHUNK_BYTES = 1 << 24
_NEEDED = ("config.json", "tokenizer.json", "*.safetensors")
_SHARD, _INDEX = "*-of-*.safetensors", "model.safetensors.index.json"


class ModelFacts(Record):
    """What the rest of the offline side needs to know of a base model."""

    path: Path
    architecture: str
    model_type: str
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1, le=10_000)
    context: int = Field(ge=1)
    """Longest prompt with its answer, in tokens."""
    dtype: DType
    """In which to keep the weights: the checkpoint's own, float16 as bfloat16."""
    config: dict[str, Any]
    """The whole of `config.json`."""


def resolve(model: str) -> Path:
    """The directory of `model`: a directory, or a hub id, which is downloaded if it is not cached.

    Raises `IncompleteModel` for an absolute path at which there is no directory,
    `UnsupportedModel` for anything else that is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() and not path.exists():
        raise IncompleteModel(f"model {model!r}: no such directory")
    if not _is_hub_id(model):
        raise UnsupportedModel(
            f"model {model!r}: no such directory, and not a hub id of the form owner/name"
        )
    return _from_hub(model, _download)


def _is_hub_id(model: str) -> bool:
    return not model.startswith((".", "~", "/")) and model.count("/") == 1


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=_PATTERNS))


def _download_config(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub_id, "config.json"))


def _from_hub(hub_id: str, download: Callable[[str], Path]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return download(hub_id)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModel(
            f"model {hub_id!r}: neither a directory nor to be had from the hub ({reason})"
        ) from error


def check(path: Path) -> ModelFacts:
    """Whether the model in `path` can be edited; reads what is no weights, looks for those.

    Raises `IncompleteModel` naming what is missing, `UnsupportedModel` naming the architecture and
    the supported ones.
    """
    if not path.is_dir():
        raise IncompleteModel(f"model directory {path} does not exist")
    sharded = any(path.glob(_SHARD))
    for pattern in (*_NEEDED, _INDEX) if sharded else _NEEDED:
        if next(path.glob(pattern), None) is None:
            raise IncompleteModel(f"model directory {path} has no {pattern}")
    shards = _listed(path / _INDEX) if sharded else set()
    if absent := sorted(name for name in shards if not (path / name).is_file()):
        raise IncompleteModel(
            f"model directory {path} lacks {len(absent)} of the {len(shards)} files that {_INDEX} "
            f"lists, {absent[0]} first"
        )
    return read_facts(path / "config.json")


def _listed(index: Path) -> set[str]:
    """Names of the files that hold the weights."""
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"{index} is not an index of weights: {error!r}") from error


def read_facts(config_file: Path) -> ModelFacts:
    """What a `config.json` says, with or without weights beside it.

    Raises `UnsupportedModel` as `check` does.
    """
    path, config = config_file.parent, _read_config(config_file)
    architecture = next(iter(config.get("architectures") or ()), "none")
    if architecture not in SUPPORTED:
        raise UnsupportedModel(
            f"model {path}: architecture {architecture} is not supported; "
            f"supported are {', '.join(SUPPORTED)}"
        )
    if "quantization_config" in config:
        raise UnsupportedModel(
            f"model {path}: quantized weights cannot be trained; use the unquantized checkpoint"
        )
    return _facts(path, architecture, config)


def config_file(model: str) -> Path:
    """The `config.json` of `model`: of a directory, itself, or of a hub id, cached or downloaded.

    Raises `UnsupportedModel` if it is none of them.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        return path.resolve() / "config.json"
    if not _is_hub_id(model):
        raise UnsupportedModel(
            f"model {model!r}: no such directory or file, and not a hub id of the form owner/name"
        )
    return _from_hub(model, _download_config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnsupportedModel(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{path} does not hold a JSON object")
    return config


def _facts(path: Path, architecture: str, config: dict[str, Any]) -> ModelFacts:
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    try:
        return ModelFacts(
            path=path,
            architecture=architecture,
            model_type=config["model_type"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["num_hidden_layers"],
            context=config["max_position_embeddings"],
            dtype="float32" if stored == "float32" else "bfloat16",
            config=config,
        )
    except KeyError as error:
        raise UnsupportedModel(f"{path / 'config.json'} does not state {error}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, entry['loc']))}: {entry['input']!r} is wrong: {entry['msg']}"
            for entry in error.errors()
        )
        raise UnsupportedModel(f"{path / 'config.json'}: {problems}") from error


def fingerprint(path: Path) -> str:
    """`sha256:…` over the names and contents of `config.json` and every `*.safetensors`.

    Reads all of the weights, a few files at a time, in bounded memory.
    """
    files = sorted([path / "config.json", *path.glob("*.safetensors")])
    with ThreadPoolExecutor(max_workers=8) as pool:
        return f"sha256:{_combined(files, pool.map(_sha256, files))}"


def _combined(files: Iterable[Path], digests: Iterable[str]) -> str:
    lines = (f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
