"""A plain PyTorch loop, without a trainer: the lines that safe-sched adds are marked.

    python examples/pytorch_loop.py --method bds --steps 40
    python examples/pytorch_loop.py --method antibody --steps 20 --out runs/loop
    python examples/pytorch_loop.py --method antibody --steps 40 --out runs/loop --resume

Model and rows are made here, so nothing is loaded: a Llama of two small layers, and rows of random tokens of which a
quarter answers a harmful prompt. The safety rows answer such prompts with a refusal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from safe_sched.schedulers import build
from safe_sched.training.loop import TrainingLoop
from safe_sched_hf.safety import SafetyBatch, SafetySet, pad_rows, safety_loss

Row = dict[str, list[int]]
HARMFUL, REFUSAL, END = 5, [6, 7, 8], 1


def row(generator: torch.Generator, *, harmful: bool, refused: bool = False) -> Row:
    """A prompt of five tokens and an answer of three to six, or a refusal."""
    words = torch.randint(10, 64, (int(torch.randint(7, 11, (), generator=generator)),), generator=generator).tolist()
    prompt = [HARMFUL if harmful else 9, *words[:4]]
    answer = [*REFUSAL, END] if refused else [*words[4:], END]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def micro_batch(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows side by side, padded on the right."""
    ids, mask = pad_rows([torch.tensor(row["input_ids"]) for row in rows], 0)
    labels, _ = pad_rows([torch.tensor(row["labels"]) for row in rows], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def aligned_model(safety: SafetySet, steps: int = 100) -> LlamaForCausalLM:
    """A model that refuses harmful prompts and answers others, as a user would load one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    others = micro_batch([row(generator, harmful=False) for _ in range(16)])
    for step in range(steps):
        (safety_loss(model, safety.batch(step)) + model(**others).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny model in a plain PyTorch loop, every row weighed.")
    parser.add_argument("--method", default="bds", help="name of a scheduler (default: bds)")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps (default: 40)")
    parser.add_argument("--out", default="runs/loop", help="where to save (default: runs/loop)")
    parser.add_argument("--save-every", type=int, default=20, help="optimiser steps between saves (default: 20)")
    parser.add_argument("--resume", action="store_true", help="go on from what was saved")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    generator = torch.Generator().manual_seed(0)
    refusals = [row(generator, harmful=True, refused=True) for _ in range(16)]
    rows = [row(generator, harmful=i % 4 == 0) for i in range(64)]
    batches = [micro_batch(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    safety = SafetySet(refusals, None, max_length=None, batch_size=2, seed=0)  # <- safe-sched
    model = aligned_model(safety)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    loop = TrainingLoop(model, build(args.method), batches, optimizer, parts=[SafetyBatch()], safety=safety)  # <-
    if args.resume:
        saved = torch.load(out / "model.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loop.load(out / "safe_sched.safetensors")  # <-

    model.train()
    for step in range(loop.session.steps, args.steps):
        micro_batches = [batches[(2 * step + i) % len(batches)] for i in range(2)]
        with loop.step(micro_batches) as metrics:  # <-
            for inputs in micro_batches:
                with loop.forward(inputs):  # <-
                    loss = model(**inputs).loss / len(micro_batches)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in sorted(metrics.items())))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "model.pt")
            loop.save(out / "safe_sched.safetensors")  # <-
    loop.close()  # <-
    weights = loop.session.row_weights()
    harmful = torch.arange(len(rows)) % 4 == 0
    print(f"mean weight of harmful rows {weights[harmful].mean():.2f}, of the others {weights[~harmful].mean():.2f}")


if __name__ == "__main__":
    main()
