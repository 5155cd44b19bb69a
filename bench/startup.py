"""What safe-sched does once for a large training set: at the start of training, and at its end.

    python bench/startup.py --out startup.md

A set of token rows is written to disk and opened as a memory-mapped `datasets.Dataset`. A real `transformers.Trainer`
with a very small model takes a few steps on it with `SafeSchedCallback`. Shown are the time and the memory that a row
costs: its key, the whole start of the callback, the end of it with the table and the manifest, the fingerprint that
``safe-sched trl`` takes of the rows before they are tokens; and what a step costs in safe-sched's own code, which must
not grow with the set.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from safe_sched import BDS
from safe_sched.training.record import rows_fingerprint
from safe_sched.training.session import Session
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.rows import index_rows

TIME_TARGET, BYTES_TARGET = 10.0, 24.0  # microseconds and bytes a row
VOCABULARY, STEPS, BATCH = 512, 30, 8
_PART = 50_000  # rows that are made at once


def on_disk(folder: Path, rows: int, length: int) -> datasets.Dataset:
    """Random rows of one length, on disk, memory-mapped."""
    random = np.random.default_rng(rows)
    offsets = pa.array(np.arange(0, _PART * length + 1, length, dtype=np.int32))
    parts = []
    for start in range(0, rows, _PART):
        count = min(_PART, rows - start)
        tokens = pa.array(random.integers(5, VOCABULARY, count * length, dtype=np.int32))
        column = pa.ListArray.from_arrays(offsets[: count + 1], tokens)
        parts.append(pa.table({"input_ids": column, "labels": column}))
    datasets.Dataset(pa.concat_tables(parts)).save_to_disk(folder, max_shard_size="2GB")
    return datasets.load_from_disk(folder)  # pyright: ignore[reportReturnType]


class Timed:
    """Adds up the time that passes in some methods."""

    def __init__(self, stack: ExitStack, *methods: tuple[Any, str]) -> None:
        self.took: dict[str, list[float]] = {name: [] for _, name in methods}
        for owner, name in methods:
            stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), name)))

    def _timed(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.took[name].append(time.process_time() - began)

        return timed


def measure(rows: int, length: int, calls: int) -> dict[str, float]:
    """The numbers of one set; times in microseconds a row, but for ``step``, in milliseconds.

    All but ``index`` are processor time, which other load on the machine distorts less.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        dataset = on_disk(folder / "data", rows, length)
        collate = DataCollatorForLanguageModeling(pad_token_id=0)
        times, processor, index = [], [], None
        for _ in range(calls):
            began, busy = time.perf_counter(), time.process_time()
            index = index_rows(dataset, collate)
            times.append(time.perf_counter() - began)
            processor.append(time.process_time() - busy)
        assert index is not None
        assert index.row_slots is not None
        size = index.keys.nbytes + index.row_slots.nbytes
        size += 0 if index.label_tokens is None else index.label_tokens.nbytes
        callback = SafeSchedCallback(BDS(evidence=None))
        begins, ends = ("on_train_begin", "on_train_end")
        steps = ("begin_step", "weigh", "end_step")
        timed = Timed(stack, *[(SafeSchedCallback, x) for x in (begins, ends)], *[(Session, x) for x in steps])
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
        }
        torch.manual_seed(0)
        trainer = Trainer(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes)),
            args=TrainingArguments(
                output_dir=str(folder / "out"),
                use_cpu=True,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=dataset,
            data_collator=collate,
            callbacks=[callback],
        )
        trainer.train()
        state = sum(x.nbytes for x in callback.session.state.tensors().values()) + callback.session.seen.nbytes
        some = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}. " * 20} for i in range(20_000)]
        began = time.process_time()
        rows_fingerprint(some)
        texts = (time.process_time() - began) / len(some)
        per_step = zip(*(timed.took[name] for name in steps), strict=True)
        return {
            "index": 1e6 * statistics.median(times) / rows,
            "processor": 1e6 * statistics.median(processor) / rows,
            "bytes": size / rows,
            "state": state / rows,
            "start": 1e6 * timed.took[begins][0] / rows,
            "end": 1e6 * timed.took[ends][0] / rows,
            "text": 1e6 * texts,
            "step": 1e3 * statistics.median(sum(parts) for parts in per_step),
        }


def page(found: Sequence[tuple[int, int, dict[str, float]]]) -> str:
    """The numbers as a Markdown table."""
    lines = [
        "| rows | tokens each | key: µs/row by the clock | by the processor | target | index: bytes/row | target "
        "| state: bytes/row | whole start: µs/row | table and manifest: µs/row | own ms/step |",
        "|" + " --- |" * 11,
    ]
    for rows, length, one in found:
        met = ["✓" if one["processor"] <= TIME_TARGET else "✗", "✓" if one["bytes"] <= BYTES_TARGET else "✗"]
        lines.append(
            f"| {rows:,} | {length} | {one['index']:.2f} | {one['processor']:.2f} | ≤ {TIME_TARGET:.0f} {met[0]} "
            f"| {one['bytes']:.2f} | ≤ {BYTES_TARGET:.0f} {met[1]} | {one['state']:.2f} | {one['start']:.2f} "
            f"| {one['end']:.2f} | {one['step']:.2f} |"
        )
    text = statistics.median(one["text"] for *_, one in found)
    lines += [
        "",
        f"The fingerprint that `safe-sched trl` takes of rows of text: {text:.1f} µs a row of 300 characters.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--calls", type=int, default=3, help="times that a set is indexed; the median counts")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    text = page([(rows, options.tokens, measure(rows, options.tokens, options.calls)) for rows in options.rows])
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
