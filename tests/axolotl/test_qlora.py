"""QLoRA through Axolotl on the CPU: the weights reach an adapter of a model of 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl")
pytest.importorskip("bitsandbytes")

from tests.axolotl.runs import LORA, config, defended, train, weights_by_tokens
from tests.support import largest_difference, single_thread

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow, pytest.mark.compat("QLoRA (4 bits)", "axolotl")]

QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}
UNEVEN = {"name": "fixed", "column": "weight"}


@pytest.fixture(autouse=True)
def exact() -> Any:
    with single_thread():
        yield


def slow_gradients(run: Any, weights: dict[tuple[int, ...], float]) -> dict[str, torch.Tensor]:
    """Row by row: sum over tokens of (weight of its row) * nll / label tokens, at the parameters before training."""
    model = run.trainer.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(run.first[name])
    model.zero_grad()
    (batch,) = run.batches
    total, tokens = torch.zeros(()), 0
    for line in range(batch["input_ids"].shape[0]):
        real = batch["attention_mask"][line].bool()
        ids, labels = (batch[name][line][real] for name in ("input_ids", "labels"))
        log_probs = torch.log_softmax(model(input_ids=ids[None]).logits[0].float(), dim=-1)
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total = total - weights[tuple(ids.tolist())] * log_probs[t - 1, labels[t]]
                tokens += 1
    (total / tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow_sample
def test_qlora_gradients_are_those_of_the_slow_loop(tmp_path: Path) -> None:
    run = train(config(tmp_path, **QLORA, max_steps=1, max_grad_norm=1e9, **defended(method=UNEVEN)))
    layers = run.trainer.model.base_model.model.model.layers
    assert type(layers[0].mlp.up_proj).__name__ == "Linear4bit"
    weights = weights_by_tokens(run)
    found = slow_gradients(run, weights)
    assert largest_difference(run.gradients[0], found) < 1e-5
    even = slow_gradients(run, dict.fromkeys(weights, 1.0))
    assert largest_difference(run.gradients[0], even) > 1e-2  # negative control


def test_equal_weights_leave_qlora_untouched(tmp_path: Path) -> None:
    plain = train(config(tmp_path, **QLORA))
    ours = train(config(tmp_path, **QLORA, **defended(method="fixed")))
    assert ours.callback is not None
    assert ours.parameters.keys() == plain.parameters.keys()
    # as bytes: four-bit codes lie in tensors of bfloat16, where some of them read as NaN
    for name, tensor in plain.parameters.items():
        assert torch.equal(ours.parameters[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert ours.losses == plain.losses
