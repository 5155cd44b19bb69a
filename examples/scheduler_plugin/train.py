"""An ordinary TRL script with a second adapter, and the scheduler by its name.

python train.py --model MODEL --safe ADAPTER --data DATA --out OUT

ADAPTER is a folder with a LoRA adapter of MODEL that was trained on safety data; DATA is a .jsonl file in a schema of
SFTTrainer. Afterwards the weight and the loss of every row are in OUT/weights.parquet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from safe_sched_hf import SafeSchedCallback


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune on the rows that a safety-tuned adapter finds easiest.")
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--safe", required=True, help="folder of a LoRA adapter that was trained on safety data")
    parser.add_argument("--data", required=True, help="a .jsonl file of rows")
    parser.add_argument("--out", default="runs/seal", help="where to write (default: runs/seal)")
    parser.add_argument("--steps", type=int, default=-1, help="optimiser steps (default: three epochs)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    model.load_adapter(args.safe, adapter_name="safe")
    callback = SafeSchedCallback("seal")
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        args=SFTConfig(
            output_dir=args.out, max_steps=args.steps, save_steps=2, bf16=torch.cuda.is_available(), report_to=[]
        ),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    pyarrow.parquet.write_table(callback.table(), Path(args.out) / "weights.parquet")


if __name__ == "__main__":
    main()
