"""An ordinary TRL script, and one callback. The two lines that safe-sched adds are marked.

    python examples/trl_sft.py --model MODEL --data examples/data/poisoned.jsonl --out runs/trl

MODEL is a folder or a hub name of a causal language model whose tokenizer has a chat template; DATA is a .jsonl file of
`messages`. After training the weight of every row is in OUT/weights.parquet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from safe_sched_hf import SafeSchedCallback  # <- safe-sched


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a chat model, every row weighed by how much it may teach.")
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="a .jsonl file of `messages` rows")
    parser.add_argument("--safety", default="core", help="safety rows: 'core' or a file (default: core)")
    parser.add_argument("--prior", help="column of DATA with each row's p_harmful, such as safe_sched.p_harmful")
    parser.add_argument("--out", default="runs/trl", help="where to write (default: runs/trl)")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default: 3)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: 1e-4)")
    args = parser.parse_args()

    callback = SafeSchedCallback("bds", safety_data=args.safety, prior=args.prior)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        args=SFTConfig(
            output_dir=args.out,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            assistant_only_loss=True,
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        ),
        callbacks=[callback],  # <- safe-sched
    )
    trainer.train()
    trainer.save_model()

    path = Path(args.out) / "weights.parquet"
    pyarrow.parquet.write_table(callback.table(), path)
    print(f"the weight of every row is in {path}")


if __name__ == "__main__":
    main()
