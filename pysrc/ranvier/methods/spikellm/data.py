"""Text to calibrate and evaluate on without a download: CPython's own help texts, WikiText-2 where it is found."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CALIBRATION_TOKENS = 16384  # of a text file: 32 windows of 512
WIKITEXT2 = Path("wikitext2-test") / "wikitext2-raw-test.txt"


def topics_text(half: int) -> str:
    """Half 0 (calibration) or 1 (evaluation) of CPython's ``pydoc_data.topics``; no topic is in both.

    The topics stand in the order of their names and are cut where half of the characters are passed.
    Raises ValueError for another half.
    """
    if half not in (0, 1):
        raise ValueError(f"topics_text: half is {half!r}; allowed are 0 and 1")
    from pydoc_data.topics import topics

    names = sorted(topics)
    total, seen, first = sum(map(len, topics.values())), 0, 0
    while 2 * seen < total:
        seen += len(topics[names[first]])
        first += 1
    return "\n\n".join(topics[name] for name in (names[:first] if half == 0 else names[first:]))


def wikitext2_path() -> Path | None:
    """The raw test split of WikiText-2 as one text file, or None where it is not found.

    Looked for as wikitext2-test/wikitext2-raw-test.txt under the folder that RANVIER_DATA names, else under
    ../shared/data beside the current folder or the checkout.
    """
    if given := os.environ.get("RANVIER_DATA"):
        roots = [Path(given)]
    else:
        checkout = Path(__file__).resolve().parents[4]
        roots = [place.parent / "shared" / "data" for place in (Path.cwd(), checkout)]
    return next((root / WIKITEXT2 for root in roots if (root / WIKITEXT2).is_file()), None)


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """The text's tokens as one row: int64 [L]."""
    encoded = tokenizer(text, verbose=False)  # not a word about the length: it is cut into windows
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def check_ids(model: Any, ids: Tensor) -> None:
    """Raises ValueError for ids that the model's embedding does not have: they came from another model's tokenizer."""
    rows = _embedding_rows(model)
    if rows is None or ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= rows:
        raise ValueError(
            f"the tokenizer does not match the model: it gives the id {low if low < 0 else high},"
            f" and the embedding has {rows} rows; use the tokenizer that the model was trained with"
        )


def _embedding_rows(model: Any) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # no language model, or one that does not say
        return None


def check_batch(model: Any, batch: Any) -> None:
    """Raises TypeError or ValueError for a calibration batch that is no token ids [B, L], where the model reads those."""
    name = getattr(model, "main_input_name", "input_ids")
    ids = batch.get(name) if isinstance(batch, Mapping) else batch
    if name != "input_ids" or not isinstance(ids, Tensor) or _embedding_rows(model) is None:
        return
    wanted = "calibration batches of a language model are token ids, whole numbers [B, L]"
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{wanted}, and one is {ids.dtype}")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"{wanted}, at least one, and one has shape {list(ids.shape)}")
    check_ids(model, ids)


def calibration_batches(tokenizer: Any, text: str, tokens: int = 2048, window: int = 512) -> Iterator[Tensor]:
    """The text's first tokens in windows: int64 [1, up to window] each, ``tokens`` in all or as many as the text has.

    Raises ValueError for a text without tokens.
    """
    if tokens < 1 or window < 1:
        raise ValueError(f"calibration_batches: tokens={tokens}, window={window}; both must be at least 1")
    ids = token_ids(tokenizer, text)[:tokens]
    if ids.numel() == 0:
        raise ValueError("calibration_batches: the text has no tokens; pass a longer one")
    return iter(ids[None].split(window, dim=1))


def own_calibration(model: Any, calibration: Any) -> Any:
    """``SpikeConfig.calibration`` as batches for this model: batches stay, the path of a text file is read.

    The text is cut into windows by the tokenizer in the folder that the model came from (``model.name_or_path``).
    Raises ValueError for a model without one, OSError for an unreadable file.
    """
    if not isinstance(calibration, (str, os.PathLike)):
        return calibration
    folder, library = getattr(model, "name_or_path", "") or "", sys.modules.get("transformers")
    text = Path(calibration).read_text(encoding="utf-8")
    try:
        if library is None or not folder:
            raise ValueError("the model says of no folder that it came from")
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"spike_: calibration is the text file {calibration}, and the model's tokenizer cannot be found ({reason});"
            " pass batches of token ids, as calibration_batches makes them"
        ) from error
    batches = list(calibration_batches(tokenizer, text, CALIBRATION_TOKENS))
    for batch in batches:
        check_ids(model, batch)
    return batches
