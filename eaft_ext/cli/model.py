"""A model and its tokenizer, from the cache, a folder or a hub; and its logits."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import download
from .batches import Batch
from .errors import CommandError

CHECKSUMS = "checksums.json"
DEFAULT_NAME = "SmolLM2-135M-Instruct"


def shown_name(name: str | None) -> str:
    """What a model is called in a report."""
    return Path(name).name if name else DEFAULT_NAME


def load(name: str | None) -> tuple[Any, Any]:
    """Return (model in float32, tokenizer) for a folder, a hub name or, with None, the default."""
    transformers = _transformers()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    source = str(_default_folder()) if name is None else name
    # Without the question whether code that comes with a model shall run.
    trusted = {"trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **trusted)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, **trusted)
    except Exception as error:  # what is broken in a file comes as whatever its reader met
        raise CommandError(f"cannot load --model {source}: {_reason(error)}") from None
    return model.float(), tokenizer


def _reason(error: Exception) -> str:
    """The first line of an error, and the one that it announces; its type, where that says more."""
    first, *rest = str(error).strip().splitlines() or [""]
    if first.endswith(":") and rest:
        first += f" {rest[0].strip()}"
    if isinstance(error, OSError | ValueError) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@torch.no_grad()
def forward(model: Any, batch: Batch, also_on_cpu: bool = False) -> torch.Tensor:
    """Return the logits [b, s, V] of a batch, without a graph, in :func:`mixed_precision`."""
    with mixed_precision(batch.input_ids.device, also_on_cpu):
        logits: torch.Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    return logits


@contextlib.contextmanager
def mixed_precision(device: torch.device, also_on_cpu: bool = False) -> Iterator[None]:
    """Run the model in bfloat16 where a device multiplies in it; the weights stay in float32."""
    if device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported()
    else:
        enabled = also_on_cpu and cpu_multiplies_bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        yield


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for it; as far as this torch can tell."""
    found = (
        getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")
    )
    return any(has() for has in found if has is not None)


def check_length(length: int, model: Any) -> None:
    """Check that a model can read so many tokens.

    Raises:
        CommandError: it cannot.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise CommandError(f"--sequence-length {length} is above the model's limit of {longest}")


def _transformers() -> Any:
    return importlib.import_module("transformers")


def _default_folder() -> Path:
    """Return the default model as a transformers folder, converting the GGUF the first time.

    Reading a GGUF takes transformers some 20 seconds, the converted folder less than one. The
    folder is tied to the major version of transformers, whose file formats differ.
    """
    major = _transformers().__version__.partition(".")[0]
    folder = download.cache_folder() / f"{DEFAULT_NAME}-transformers-{major}"
    if folder.exists():
        damaged = _damaged_file(folder)
        if damaged is None:
            return folder
        print(f"{damaged} is damaged or missing: making it again", file=sys.stderr)
    gguf = download.cached_gguf()
    missing = [extra for extra in ("gguf", "accelerate") if not importlib.util.find_spec(extra)]
    if missing:
        raise CommandError(
            f"reading {gguf.name} needs {' and '.join(missing)}: pip install 'eaft_ext[demo]'"
        )
    print(f"unpacking {gguf.name} (once, about 30 seconds)", file=sys.stderr)
    with download.scratch_folder(folder.parent, "convert-") as scratch:
        converted = scratch / folder.name
        _convert(gguf, converted)
        _write_checksums(converted)
        if folder.exists():
            if _damaged_file(folder) is None:  # another process was faster
                return folder
            shutil.rmtree(folder)
        converted.rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    transformers = _transformers()
    processors = importlib.import_module("tokenizers.processors")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(**where)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised already
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.float().save_pretrained(folder)
    # Releases of transformers disagree about this file's special tokens: they are set as the
    # file has them, and none is put in front of a text.
    read = transformers.AutoTokenizer.from_pretrained(**where)
    backend = read.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
    ).save_pretrained(folder)


def _write_checksums(folder: Path) -> None:
    checksums = {path.name: download.sha256(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n")


def _damaged_file(folder: Path) -> Path | None:
    """Return the first file of a converted folder that is not as it was written, if any."""
    try:
        checksums: dict[str, str] = json.loads((folder / CHECKSUMS).read_text())
        for name, expected in checksums.items():
            if download.sha256(folder / name) != expected:
                return folder / name
    except FileNotFoundError as error:
        return Path(error.filename)
    except (ValueError, AttributeError, RecursionError):
        return folder / CHECKSUMS
    return None
