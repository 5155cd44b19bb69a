"""The loss of every row of a training file under a model that is not being trained.

Rows are prepared and collated by TRL's own SFTTrainer, which is built for this and never trains, so a row has the key
here that it has in training. Packing needs nothing: a packed row has the key that it has alone, unless the packing
strategy cuts rows in two (``bfd_split``, ``wrapped``).

Cost: one forward of every row; with TRL's fused head, where there is one, logits are never built.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from safe_sched.errors import DataError, ModelError, OptionError, PluginError, UnscoredError, some_of
from safe_sched.hooks import RowLosses, RowLossesRequest
from safe_sched.rows.keys import batch_fields, keys_of
from safe_sched.rows.nll import label_counts, nll_from_log_probs, nll_from_logits
from safe_sched_hf.safety import has_fused_head

_NUMBER = "safe_sched_row"  # a column that TRL carries along: it drops rows that max_length leaves without a label
_SCHEMAS = (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), ("text",))
_ASSISTANTS = ("assistant", "gpt", "model")


def row_losses(request: RowLossesRequest) -> RowLosses:
    """Run the model once over the rows; see `safe_sched.hooks.safe_sched_row_losses`.

    Raises:
        OptionError: The device is not there, or the model or the adapter is no folder.
        ModelError: The model or the adapter cannot be loaded or run.
        DataError: TRL cannot prepare the rows.
        UnscoredError: Rows have no assistant turn, and ``assistant_only_loss`` trains on nothing else.
    """
    _require_one_schema(request.rows)
    device = _device(request.device)
    local = Path(request.model).expanduser().is_dir()
    with _quiet(offline=local), tempfile.TemporaryDirectory(prefix="safe-sched-") as folder:
        request.progress("loading the model", 0, None)
        model, processor = _load(request, local)
        request.progress("preparing the rows", 0, None)
        trainer = _prepare(request, model, processor, folder)
    prepared: Any = trainer.train_dataset
    if "input_ids" not in prepared.column_names:
        raise DataError("TRL makes no tokens of these rows beforehand, as with images; only text can be measured")
    model.to(device).eval()

    count = len(request.rows)
    found = RowLosses(torch.zeros(count, dtype=torch.long), torch.zeros(count), torch.zeros(count, dtype=torch.long))
    for start in range(0, len(prepared), request.batch_size):
        request.progress("running the model", start, len(prepared))
        items = [prepared[i] for i in range(start, min(start + request.batch_size, len(prepared)))]
        numbers = torch.tensor([item.pop(_NUMBER) for item in items])
        inputs = {name: _on(value, device) for name, value in trainer.data_collator(items).items()}
        for column, values in zip((found.keys, found.nll, found.label_tokens), _measure(model, inputs), strict=True):
            column[numbers] = values.cpu()
    request.progress("running the model", len(prepared), len(prepared))
    return found


@torch.no_grad()
def _measure(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, losses and label tokens of a batch."""
    input_ids, labels, layout = batch_fields(inputs)
    try:
        if has_fused_head(model):
            nll = nll_from_log_probs(model(**inputs, fused_lm_head=True).log_probs, labels, layout)
        else:
            asked = {name: value for name, value in inputs.items() if name != "labels"}
            nll = nll_from_logits(model(**asked, use_cache=False).logits, labels, layout)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"out of memory on a batch of {tuple(labels.shape)} tokens: lower batch_size or max_length, or use bfloat16"
        ) from error
    except IndexError as error:
        raise ModelError(
            f"the model cannot take a batch of {tuple(labels.shape)} tokens with ids up to {int(input_ids.max())} "
            f"({error}): its vocabulary or its longest input is smaller. Lower max_length, or use the model that the "
            "tokens were made for."
        ) from error
    return keys_of(input_ids, labels, layout), nll, label_counts(labels, layout)


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device='cuda', and torch finds no GPU; use device='cpu', or install a torch that has CUDA")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


# the model --------------------------------------------------------------------------------------------------------


def _load(request: RowLossesRequest, local: bool) -> tuple[Any, Any]:
    name, folder = request.model, Path(request.model).expanduser()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise OptionError(f"no folder {name}; give the folder of a model, or a hub name such as owner/model")
    if local and not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise OptionError(f"{name} is a PEFT adapter; give the model that it belongs to, and this folder as adapter")
    source: Any = str(folder) if local else name
    how: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    dtype = "auto" if request.dtype == "auto" else getattr(torch, request.dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **how)
        processor: Any = AutoProcessor.from_pretrained(source, **how)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"{name} cannot be loaded as a causal language model with a tokenizer: {error}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # only a warning in transformers, which makes them up
        raise ModelError(
            f"{name} lacks {len(missing)} of the parameters of {type(model).__name__} ({missing[0]}, ...), so it is no "
            "causal language model, or its files are damaged. Give the folder that the whole model was saved in."
        )
    if request.chat_template is not None:
        processor.chat_template = request.chat_template
    return model if request.adapter is None else _with_adapter(model, request.adapter), processor


def _with_adapter(model: Any, adapter: str) -> Any:
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():  # peft would ask the hub
        raise OptionError(f"{adapter} is not the folder of a PEFT adapter: there is no adapter_config.json in it")
    if importlib.util.find_spec("peft") is None:
        raise PluginError("an adapter needs peft: pip install 'safe-sched[trl]'")
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # only a warning in peft: the adapter of another model would leave the model as it is
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, UserWarning) as error:
        raise ModelError(f"the adapter {adapter} does not fit the model: {error}") from error


# the rows ---------------------------------------------------------------------------------------------------------


def _prepare(request: RowLossesRequest, model: Any, processor: Any, folder: str) -> SFTTrainer:
    known = {field.name for field in fields(SFTConfig)}
    # TRL switches it on by default; the option has an old and a new name
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_length": request.max_length,
        "assistant_only_loss": request.assistant_only_loss,
        "completion_only_loss": request.completion_only_loss,
        "loss_type": "nll",  # TRL before its fused head has a default that hides the logits
        "use_cpu": True,  # the trainer only prepares rows; with several GPUs it would refuse to be built
        "bf16": False,
        checkpointing: False,
        "report_to": [],
        "disable_tqdm": True,
    }
    try:
        return SFTTrainer(
            model=model,
            args=SFTConfig(**options),
            train_dataset=_table(request.rows),
            processing_class=processor,
        )
    except Exception as error:  # templates, TRL, datasets and arrow all raise their own
        silent = [number for number, row in enumerate(request.rows) if not _has_answer(row)]
        if request.assistant_only_loss and 0 < len(silent) < len(request.rows):
            raise UnscoredError(
                f"{len(silent)} of {len(request.rows)} rows have no assistant turn, and with assistant_only_loss "
                f"nothing else is trained on (rows {some_of(silent)}, counted from 0): remove these rows, or switch "
                "assistant_only_loss off"
            ) from error
        raise DataError(
            f"TRL's SFTTrainer cannot prepare these rows: {type(error).__name__}: {error} It would stop the training "
            "as well: change the rows, the chat template, or the options."
        ) from error


def _table(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    # a column for every field of any row: from_list looks at the first row only
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names} | {_NUMBER: range(len(rows))})


def _require_one_schema(rows: Sequence[Mapping[str, Any]]) -> None:
    """TRL reads the schema off the first row; another one further down would fail without naming the row.

    Raises:
        DataError: Naming the first row that is different.
    """
    needed = next((names for names in _SCHEMAS if rows and rows[0].keys() >= set(names)), None)
    if needed is None:
        allowed = "; ".join(" and ".join(names) for names in _SCHEMAS)
        raise DataError(f"row 0 has the fields {sorted(rows[0]) if rows else []}; allowed: {allowed}")
    if needed == ("input_ids",) and "labels" in rows[0]:
        needed = ("input_ids", "labels")
    for number, row in enumerate(rows):
        for name in needed:
            kind, first = type(row.get(name)).__name__, type(rows[0][name]).__name__
            if kind != first:
                raise DataError(
                    f"row {number} has {name} of type {kind}, and row 0 of type {first} (rows are counted from 0); "
                    "all rows of a file need one schema"
                )


def _has_answer(row: Mapping[str, Any]) -> bool:
    turns = row.get("messages") or row.get("conversations") or row.get("completion") or []
    return any(isinstance(turn, Mapping) and (turn.get("role") or turn.get("from")) in _ASSISTANTS for turn in turns)


@contextlib.contextmanager
def _quiet(*, offline: bool) -> Iterator[None]:
    """No progress bars but ours, and no network that nobody asked for: TRL reports every trainer that is built."""
    constants: Any = huggingface_hub.constants
    before = constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_OFFLINE
    bars, dataset_bars = logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_OFFLINE = True, before[1] or offline
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_OFFLINE = before
        if bars:
            logging.enable_progress_bar()
        if dataset_bars:
            datasets.enable_progress_bars()
