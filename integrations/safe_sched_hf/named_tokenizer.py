"""A tokenizer by its name, for rows that are tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from safe_sched.errors import ModelError


def tokenizer(name: str) -> Any:
    """The tokenizer of a folder, or of the hub where there is no such folder.

    Raises:
        ModelError: There is none, or its files are damaged.
    """
    local = Path(name).expanduser().is_dir()
    source = str(Path(name).expanduser()) if local else name
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{name} cannot be loaded as a tokenizer: {reason}. Give the folder, or the hub name, of the model whose "
            "tokenizer made the tokens"
        ) from error
