"""The same callback with a plain Hugging Face Trainer: rows of prompt and completion, tokenised by the script itself.

python examples/hf_trainer.py --model MODEL --data examples/data/safety.jsonl --out runs/hf
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safe_sched import BDS
from safe_sched_hf import SafeSchedCallback


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune on prompt/completion rows with transformers.Trainer.")
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="a .jsonl file of `prompt` and `completion` rows")
    parser.add_argument("--safety", default="core", help="safety rows: 'core' or a file (default: core)")
    parser.add_argument("--out", default="runs/hf", help="where to write (default: runs/hf)")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default: 3)")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokenize(row: dict[str, str]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"] + " ")["input_ids"]
        answer = tokenizer(row["completion"] + tokenizer.eos_token)["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = load_dataset("json", data_files=args.data, split="train")
    callback = SafeSchedCallback(BDS(), safety_data=args.safety)  # <- safe-sched
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=rows.map(tokenize, remove_columns=rows.column_names),
        args=TrainingArguments(
            output_dir=args.out, num_train_epochs=args.epochs, save_strategy="no", report_to=[], logging_steps=10
        ),
        callbacks=[callback],  # <- safe-sched
    )
    trainer.train()

    table = callback.table().sort_by("weight")
    print(f"lowest weights: rows {table['row'][:5].to_pylist()}, weights {table['weight'][:5].to_pylist()}")


if __name__ == "__main__":
    main()
