"""The safety set of a run: Axolotl's own dataset syntax, or any rows in the format of the training set.

A safety row only defends the format it is written in. So prompts and refusals are given the columns that the training
set's own ``type`` reads, and Axolotl's own prompt strategy writes them out. Only answers are labels, whatever the
configuration says of ``train_on_inputs``: nobody wants a model that learns to ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from safe_sched.data.rows import read_rows
from safe_sched.data.schemas.renamed import RenamedColumns, RenamedTurns
from safe_sched.data.trainer_files.axolotl import row_format
from safe_sched.errors import DataError
from safe_sched_axolotl.block import KEY, plain
from safe_sched_axolotl.data import WHERE, checked_entry, is_dataset_syntax, load, tokenised
from safe_sched_hf.safety import prompt_and_completion

_PROMPTED = ("alpaca", "gpteacher", "oasst", "metharme")  # types whose first column holds the request
TokenRow = dict[str, list[int]]


def safety_rows(safety_data: Any, cfg: Any, tokenizer: Any) -> Any:
    """The safety set, as the callback takes it.

    Args:
        safety_data: What the block says: ``"core"``, a path, rows, or data sets in Axolotl's syntax.
        cfg: Axolotl's configuration, checked.
        tokenizer: The run's.

    Returns:
        Token rows; or ``safety_data`` itself where the callback's own reading is right: for training sets that are
        tokens or plain texts.

    Raises:
        OptionError: A data set has a key that Axolotl does not read.
        DataError: It cannot be loaded, or rows would be lost.
    """
    if safety_data is None:
        return None
    if is_dataset_syntax(safety_data):
        entries = [safety_data] if isinstance(safety_data, Mapping) else safety_data
        return [
            row
            for number, entry in enumerate(entries)
            for row in _of_entry(entry, cfg, tokenizer, f"{KEY}.safety_data.{number}")
        ]
    rows = read_rows(safety_data)
    written: list[TokenRow] = []
    for entry in _formats(cfg):
        dressed = [new for number, row in enumerate(rows) if (new := _dressed(row, number, entry)) is not None]
        if len(dressed) < len(rows):
            return rows
        where = f"{KEY}.safety_data, in the format of {entry['path']}"
        written += _tokenised(Dataset.from_list(dressed), entry, cfg, tokenizer, where)
    return written or rows


def _of_entry(entry: Any, cfg: Any, tokenizer: Any, where: str) -> list[TokenRow]:
    entry = checked_entry(entry, where)
    return [row for table in load(entry, cfg, where) for row in _tokenised(table, entry, cfg, tokenizer, where)]


def _tokenised(rows: Dataset, entry: Mapping[str, Any], cfg: Any, tokenizer: Any, where: str) -> list[TokenRow]:
    """What Axolotl's prompt strategy makes of rows, with the answers as labels."""
    answers = {"roles_to_train": ["assistant"], "message_field_training": None, "message_field_training_detail": None}
    own = plain(cfg) | {"train_on_inputs": False, "sample_packing": False}
    return tokenised(rows, plain(entry) | answers, own, tokenizer, where).to_list()


def _formats(cfg: Any) -> Iterator[dict[str, Any]]:
    """The training data sets, one of each format that a prompt and an answer can be written in."""
    seen: list[Any] = []
    for entry in map(plain, cfg.datasets or []):
        look = {name: value for name, value in entry.items() if name not in WHERE}
        if look not in seen:
            seen.append(look)
            yield entry


def _dressed(row: Mapping[str, Any], number: int, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """A safety row in the columns that a training data set's type reads; None where it has no place for it."""
    if "input_ids" in row or "text" in row:
        return None
    if "instruction" in row and "output" in row:
        texts = {name: row.get(name) or "" for name in ("instruction", "input", "system", "output")}
        prompt: Any = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
        answer: Any = texts["output"]
    else:
        prompt, answer = prompt_and_completion(row, number)
        texts = {"instruction": prompt, "output": answer}
    kind = entry.get("type")
    base = kind.partition(":")[0] if isinstance(kind, str) else ""
    try:
        columns = row_format(entry, "datasets")
    except DataError:  # a prompt strategy of the user's own
        return None
    if base == "chat_template" and isinstance(columns, RenamedTurns):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answered = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        return columns.written((turn["role"], turn["content"]) for turn in (*asked, *answered))
    if not isinstance(columns, RenamedColumns) or not (isinstance(kind, Mapping) or base.startswith(_PROMPTED)):
        return None
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return None
    optional = {name for name in ("input", "system") if isinstance(kind, Mapping) and not kind.get(f"field_{name}")}
    return {own: texts.get(name, "") for name, own in columns.names.items() if name not in optional}
