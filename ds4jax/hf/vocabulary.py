"""The vocabulary of a checkpoint's `tokenizer.json`."""

from __future__ import annotations

import json
from pathlib import Path

from ds4jax.errors import FileError


def vocabulary(root: Path, size: int) -> tuple[list[str], list[str]] | None:
    """Return (tokens in the order of their ids, merges) of the checkpoint in `root`.

    Args:
      root: the checkpoint's directory.
      size: V; ids below it that name no token become `[PAD id]`.

    Returns:
      None if there is no `tokenizer.json`.

    Raises:
      FileError: if the file is not a byte-pair encoding of at most `size` tokens.
    """
    path = root / "tokenizer.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        kind = model.get("type")
        if kind != "BPE":
            raise FileError(f"{path}: model.type: expected 'BPE', found {kind!r}")
        ids = {index: token for token, index in model["vocab"].items()}
        ids |= {added["id"]: added["content"] for added in content["added_tokens"]}
        # Pairs since tokenizers 0.20, "left right" before.
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    except FileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: expected a tokenizer.json: {error!r}") from error
    surplus = [index for index in ids if index not in range(size)]
    if surplus:
        raise FileError(
            f"{path}: {ids[surplus[0]]!r}: expected an id below vocab_size = {size},"
            f" found {surplus[0]}"
        )
    return [ids.get(index, f"[PAD {index}]") for index in range(size)], merges
