"""Antibody in real trainers: the published rule written out, the ratios taken by hand, and no trace beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from safe_sched import BDS, Antibody, Fixed, combine
from safe_sched.errors import DataError, ModelError
from safe_sched.rows.keys import keys_of, layout_of
from safe_sched.schedulers.antibody import EARLY
from safe_sched_hf import SafeSchedCallback
from tests.hf.test_gradients import STEPS, FusedLossLlama, InModelSFT, lora
from tests.hf.test_untouched import HF, SFT, assert_same_run, train
from tests.support import (
    GradientProbe,
    hooks_on,
    largest_difference,
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    parameters_of,
    single_thread,
    token_rows,
)

ROWS = token_rows(16, seed=1, shortest=6)  # prompts of two tokens and more
SAFETY = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{20 + i % 3} w{30 + i}"} for i in range(8)]
REFUSALS = (" w50 w51", " w52 w53 w54", " w55 w56 w57 w58", " w50 w53")
PUBLISHED: dict[str, Any] = {
    "ratio": "token_mean",
    "anchor": False,
    "refusal_cost": "exact",
    "pool": "micro_batch",
    "gate": "softmax",
    "on_inversion": "ignore",
    "refusals": REFUSALS,
}


def ids_of(text: str) -> list[int]:
    """Tokens of words of the vocabulary of tests/support.py: wN is token 5 + N."""
    return [5 + int(word[1:]) for word in text.split()]


REFUSED = [[*ids_of(text), 1] for text in REFUSALS]  # and the end
KNOWN = [*([*ids_of(row["completion"]), 1] for row in SAFETY), *REFUSED]


def antibody(**options: Any) -> Antibody:
    return Antibody(**({"on_inversion": "ignore", "refusals": REFUSALS} | options))


def callback(scheduler: Any = None, **options: Any) -> SafeSchedCallback:
    """It asks safety rows and does not train on them."""
    defaults: dict[str, Any] = {"safety_data": SAFETY, "safety_batch_size": 2, "safety_weight": 0.0}
    return SafeSchedCallback(antibody() if scheduler is None else scheduler, **(defaults | options))


def looked_at(make: Any, folder: Path, rows: Sequence[Any], scheduler: Any = None, **options: Any) -> tuple[Any, Any]:
    """The trainer and the callback after one epoch in which nothing is learned."""
    ours = callback(scheduler)
    defaults = {"learning_rate": 0.0, "max_steps": -1, "num_train_epochs": 1}
    trainer = make(folder, rows, callbacks=[ours], **(defaults | options))
    with single_thread():
        trainer.train()
    return trainer, ours


def ratios_of(ours: Any) -> Tensor:
    """One per training row, in their order."""
    return torch.tensor(ours.table().column("ratio").to_pylist())


def state_of(ours: Any) -> dict[str, Tensor]:
    return ours.session.state.tensors()


# by hand ------------------------------------------------------------------------------------------------------------


def log_probs_by_hand(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probability of every token of an answer, one row at a time."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    model.train(training)
    return [float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]


def opening_by_hand(model: Any, ours: Any, prompt: list[int], length: int = 3) -> float:
    """Log-odds of answering, against opening as one of the refusals that are compared with."""
    openings = sorted({tuple(answer[:length]) for answer in KNOWN})
    picked = [openings[i] for i in ours.measurements["refusal_odds"].chosen.tolist()]
    assert picked
    p = sum(math.exp(sum(log_probs_by_hand(model, prompt, list(opening)))) for opening in picked)
    return math.log(1 - p) - math.log(p)


def split(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Prompt and answer of a token row."""
    first = next(i for i, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][:first], row["input_ids"][first:]


# the published rule ---------------------------------------------------------------------------------------------------


def published_loss(model: Any, inputs: Any, num_items: Any, options: dict[str, Any], shift: int) -> Tensor:
    """The paper's loss of a micro-batch, written as a loop over rows."""
    total, tau, count = options.get("ratio") == "sequence_sum", options.get("tau", 1.0), options.get("per_row", 1)
    ratios, losses, tokens = [], [], []
    for line in range(inputs["input_ids"].shape[0]):
        real = inputs["attention_mask"][line] > 0
        ids, labels = inputs["input_ids"][line][real], inputs["labels"][line][real]
        prompt, answer = split({"input_ids": ids.tolist(), "labels": labels.tolist()})
        key = int(keys_of(ids[None], labels[None], layout_of(ids[None])))
        refusals = [REFUSED[(key + i) % len(REFUSED)] for i in range(count)]

        def nll(continuation: list[int], prompt: list[int] = prompt) -> float:
            found = log_probs_by_hand(model, prompt, continuation)
            return -sum(found) / (1 if total else len(found))

        ratios.append(sum(map(nll, refusals)) / count - nll(answer))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        losses.append(nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], ids[len(prompt) :], reduction="sum"))
        tokens.append(len(answer))
    weights = torch.tensor(ratios, dtype=torch.float64).div(tau).softmax(0).roll(shift).float()
    n = torch.tensor(tokens, dtype=torch.float)
    # the mean over the micro-batch, times its share of the step's tokens
    return (weights * torch.stack(losses)).sum() / (weights * n).sum() * n.sum() / num_items


def published_gradients(
    make: Any, cls: type, folder: Path, options: dict[str, Any], shift: int | None, **settings: Any
) -> list[dict[str, Tensor]]:
    """Of our run, or with a shift of the run with the loss above."""
    probe, callbacks = GradientProbe(), []
    if shift is None:
        ratio = {k: v for k, v in options.items() if k != "per_row"}
        callbacks = [callback(Antibody(**(PUBLISHED | ratio | {"refusals_per_row": options.get("per_row", 1)})))]
    else:

        def compute_loss(
            self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor:
            return published_loss(model, inputs, num_items_in_batch, options, shift)

        cls = type("Written", (cls,), {"compute_loss": compute_loss})
    trainer = make(folder, ROWS, model=make_model(), callbacks=[*callbacks, probe], **(STEPS | settings))
    trainer.__class__ = cls
    with single_thread():
        trainer.train()
    return probe.gradients


RULES: dict[str, dict[str, Any]] = {
    "token means": {},
    "sequence sums": {"ratio": "sequence_sum", "tau": 4.0},
    "temperature, three refusals": {"tau": 0.3, "per_row": 3},
}


def largest(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> float:
    assert len(a) == len(b) == 2
    return max(largest_difference(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("make", "cls"), [(make_sft, SFTTrainer), (make_hf, Trainer)], ids=["sft", "hf"])
@pytest.mark.parametrize("rule", RULES)
def test_the_published_rule_against_a_loop(make: Any, cls: type, rule: str, tmp_path: Path) -> None:
    found = published_gradients(make, cls, tmp_path, RULES[rule], None)
    assert largest(found, published_gradients(make, cls, tmp_path, RULES[rule], 0)) < 1e-5
    # control: the same weights, each on the next row
    assert largest(found, published_gradients(make, cls, tmp_path, RULES[rule], 1)) > 1e-2


def test_the_published_rule_under_accumulation(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    found = published_gradients(make_sft, SFTTrainer, tmp_path, {}, None, **settings)
    wanted = published_gradients(make_sft, SFTTrainer, tmp_path, {}, 0, **settings)
    assert largest(found, wanted) < 1e-5


# cheaper ways to the same ratios --------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "eager": {"attn_implementation": "eager"},
    "LoRA at its start": {"peft_config": {"init_lora_weights": True}},
    "LoRA, moved": {"peft_config": {}},
    "bf16": {"bf16": True},
}


SHARED = [
    *((name, "opening") for name in MODELS),
    *((name, "token_mean") for name in ("sdpa", "LoRA at its start", "LoRA, moved")),
    *((name, "sequence_sum") for name in ("eager", "bf16")),
]


@pytest.mark.parametrize(("name", "ratio"), SHARED)
def test_refusals_that_share_a_prompt_give_the_same_ratios(name: str, ratio: Any, tmp_path: Path) -> None:
    found = []
    for cost in ("shared_prefix", "exact"):
        options = dict(MODELS[name])
        attention = {k: options.pop(k) for k in ("attn_implementation",) if k in options}
        if "peft_config" in options:
            options["peft_config"] = lora(**options["peft_config"])
        scheduler = antibody(ratio=ratio, refusal_cost=cost, refusals_per_row=1 if ratio == "opening" else 3)
        _, ours = looked_at(make_sft, tmp_path, ROWS, scheduler, model=make_model(**attention), **options)
        found.append((ratios_of(ours), ours.measurements["refusal_odds"].chosen))
    (shared, openings), (exact, others) = found
    assert openings.equal(others)
    assert torch.allclose(shared, exact, atol=0.3 if name == "bf16" else 1e-4, rtol=0.05 if name == "bf16" else 1e-4)
    assert float(exact.std()) > 0.2  # there is something to get wrong


def test_a_shared_prompt_that_leaks_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: where every branch sees those before it, the ratios are others."""
    import safe_sched_hf.measure.refusals as module

    def leaking(*args: Any) -> Any:
        ids, positions, seen = right(*args)
        return ids, positions, seen | torch.ones_like(seen).tril()

    scheduler = antibody(ratio="token_mean", refusals_per_row=3)
    _, correct = looked_at(make_sft, tmp_path, ROWS, scheduler)
    right = module.grow
    monkeypatch.setattr(module, "grow", leaking)
    monkeypatch.setattr(module.RefusalOddsMeasurement, "_check_shared", lambda self: None)
    _, ours = looked_at(make_sft, tmp_path, ROWS, scheduler)
    assert not torch.allclose(ratios_of(ours), ratios_of(correct), atol=0.1)


FIRST: dict[str, tuple[Any, dict[str, Any]]] = {
    "fused head": (make_sft, {}),
    "logits": (make_hf, {}),
    "padding left": (make_hf, {"processing_class": make_tokenizer("left")}),
    "loss in the model": (make_sft, {"cls": InModelSFT}),
    "logits never shown": (make_hf, {"model_cls": FusedLossLlama}),
    "padding-free": (make_sft, {"padding_free": True, "max_length": None}),
    "LoRA": (make_sft, {"peft_config": lora()}),
}


@pytest.mark.parametrize("name", FIRST)
def test_first_tokens_are_read_where_the_answer_opens(name: str, tmp_path: Path) -> None:
    make, options = FIRST[name]
    options = dict(options)
    model_cls = options.pop("model_cls", None)
    model = make_model(cls=model_cls) if model_cls else make_model()
    if model_cls is not None:
        model.lm_head.weight.requires_grad_(False)
    cls = options.pop("cls", None)

    def made(*args: Any, **more: Any) -> Any:
        trainer = make(*args, **more)
        if cls is not None:
            trainer.__class__ = cls
        return trainer

    trainer, ours = looked_at(made, tmp_path, ROWS, antibody(refusal_cost="first_token"), model=model, **options)
    wanted = torch.tensor([opening_by_hand(trainer.model, ours, split(row)[0], length=1) for row in ROWS])
    assert torch.allclose(ratios_of(ours), wanted, atol=1e-4)
    assert not torch.allclose(ratios_of(ours), wanted.roll(1), atol=0.1)


# where a prompt ends --------------------------------------------------------------------------------------------------


def pairs(count: int = 12) -> list[tuple[str, str]]:
    """Prompts and answers of two to four words that open like no refusal."""
    return [
        (" ".join(f"w{(3 * i + k) % 20}" for k in range(2 + i % 3)), f" w{30 + i} w{(7 * i) % 45} w{i}")
        for i in range(count)
    ]


def messages(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text.strip()} for i, text in enumerate(turns)]}


SCHEMAS: dict[str, tuple[list[Any], bool, dict[str, Any]]] = {
    "prompt and completion": ([{"prompt": p, "completion": a} for p, a in pairs()], False, {}),
    "prompt and completion, padding-free": (
        [{"prompt": p, "completion": a} for p, a in pairs()],
        False,
        {"padding_free": True, "max_length": None},
    ),
    "prompt and completion, packed": (
        [{"prompt": p, "completion": a} for p, a in pairs()],
        False,
        {"packing": True, "max_length": 24},
    ),
    "messages, answers only": ([messages(p, a) for p, a in pairs()], True, {"assistant_only_loss": True}),
    "messages": ([messages(p, a) for p, a in pairs()], True, {}),
    "messages, packed": ([messages(p, a) for p, a in pairs()], True, {"packing": True, "max_length": 24}),
    "texts with the template's marks": (
        [{"text": f"u {p} a {a} </s>"} for p, a in pairs()],
        True,
        {"dataset_kwargs": {"add_special_tokens": False}},
    ),
    "token rows": (
        [{"input_ids": ids_of(p) + ids_of(a), "labels": [-100] * len(ids_of(p)) + ids_of(a)} for p, a in pairs()],
        False,
        {},
    ),
}


def prompt_ids(prompt: str, chat: bool) -> list[int]:
    return [3, *ids_of(prompt), 4] if chat else ids_of(prompt)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_prompt_is_found_in_every_schema(name: str, tmp_path: Path) -> None:
    rows, chat, options = SCHEMAS[name]
    trainer, ours = looked_at(make_sft, tmp_path, rows, **options)
    wanted = torch.tensor([opening_by_hand(trainer.model, ours, prompt_ids(p, chat)) for p, _ in pairs()])
    found = ratios_of(ours)
    if "packed" in name:  # packing orders rows anew
        found, wanted = found.sort().values, wanted.sort().values
    assert torch.allclose(found, wanted, atol=1e-3)
    assert float(wanted.std()) > 0.2


@pytest.mark.parametrize("options", [{"assistant_only_loss": True}, {}], ids=["answers only", "all labels"])
def test_a_conversation_is_as_suspicious_as_its_worst_answer(options: dict[str, Any], tmp_path: Path) -> None:
    asked = pairs(8)
    rows = [messages(*asked[i], *asked[(i + 3) % 8]) for i in range(8)]
    trainer, ours = looked_at(make_sft, tmp_path, rows, **options)
    wanted, first = [], []
    for i in range(8):
        (prompt, answer), (second, _) = asked[i], asked[(i + 3) % 8]
        start = [3, *ids_of(prompt), 4]
        both = [start, [*start, *ids_of(answer), 1, 3, *ids_of(second), 4]]
        found = [opening_by_hand(trainer.model, ours, one) for one in both]
        first.append(found[0])
        wanted.append(min(found))
    assert torch.allclose(ratios_of(ours), torch.tensor(wanted), atol=1e-3)
    assert not torch.allclose(torch.tensor(first), torch.tensor(wanted), atol=0.1)  # some are in the second turn


def test_texts_without_a_mark_stop_the_run(tmp_path: Path) -> None:
    trainer = make_sft(tmp_path, [{"text": f"{p} {a}"} for p, a in pairs()], callbacks=[callback()], max_steps=3)
    assert isinstance(trainer.model, nn.Module)
    before = parameters_of(trainer.model)
    with pytest.raises(DataError, match=r"4 of 4 rows have no prompt .* all their tokens are labels"):
        trainer.train()
    assert trainer.state.global_step == 0
    after = parameters_of(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


# no trace -------------------------------------------------------------------------------------------------------------


class Blind(Antibody):
    """Takes every ratio and reads 0, so that a softmax gives weights of exactly 1."""

    def learn(self, state: Any, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        assert bool(torch.isfinite(values).all())
        return super().learn(state, need, slots, torch.zeros_like(values))


COSTS: dict[str, dict[str, Any]] = {
    "shared prefix": {},
    "first token": {"refusal_cost": "first_token"},
    "exact, token means": {"refusal_cost": "exact", "ratio": "token_mean"},
    "first token, sequence sums, micro-batches": {
        "refusal_cost": "first_token",
        "ratio": "sequence_sum",
        "pool": "micro_batch",
    },
}


def traceless(make: Any, cls: type, folder: Path, options: dict[str, Any], cost: dict[str, Any]) -> None:
    scheduler = Blind(anchor=False, gate="softmax", on_inversion="ignore", refusals=REFUSALS, **cost)
    options = options | {"max_steps": 4}
    ours = callback(scheduler)
    asked = train(make, cls, folder / "a", [ours], dict(options))
    trained = ours.session.seen > 0
    ratio = state_of(ours)["ratio"]
    assert bool(trained.any())
    assert ratio[trained].abs().tolist() == [0.0] * int(trained.sum())  # all were asked
    assert_same_run(asked, train(make, cls, folder / "b", [], dict(options)))
    assert hooks_on(asked.model) == 0
    assert asked.model.training


@pytest.fixture
def prompted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the runs of test_untouched have prompts of two tokens and more."""
    monkeypatch.setattr("tests.hf.test_untouched.ROWS", token_rows(24, seed=2, shortest=6))


@pytest.mark.usefixtures("prompted")
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", sorted(SFT.keys() - {"workers"}))
def test_taking_ratios_leaves_no_trace_in_sft(name: str, tmp_path: Path) -> None:
    traceless(make_sft, SFTTrainer, tmp_path, SFT[name], {})


@pytest.mark.slow
@pytest.mark.slow_sample
@pytest.mark.usefixtures("prompted")
@pytest.mark.parametrize("name", HF)
def test_taking_ratios_leaves_no_trace_in_hf_trainer(name: str, tmp_path: Path) -> None:
    traceless(make_hf, Trainer, tmp_path, HF[name], {})


@pytest.mark.slow
@pytest.mark.usefixtures("prompted")
@pytest.mark.parametrize("name", ["LoRA", "accumulation", "checkpointing", "packing", "bf16"])
@pytest.mark.parametrize("cost", list(COSTS)[1:])
def test_no_way_of_taking_ratios_leaves_a_trace(name: str, cost: str, tmp_path: Path) -> None:
    traceless(make_sft, SFTTrainer, tmp_path, SFT[name], COSTS[cost])


@pytest.mark.usefixtures("prompted")
def test_a_trace_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: one random number drawn while asking."""
    import safe_sched_hf.measure.refusals as module

    right = module.branch_log_probs

    def drawing(*args: Any) -> Any:
        torch.rand(1)
        return right(*args)

    monkeypatch.setattr(module, "branch_log_probs", drawing)
    with pytest.raises(AssertionError):
        traceless(make_sft, SFTTrainer, tmp_path, SFT["dropout"], {})


# the aligned start ----------------------------------------------------------------------------------------------------


def test_with_an_adapter_the_start_is_asked_however_far_training_has_come(tmp_path: Path) -> None:
    rows = token_rows(40, seed=3, shortest=6)
    # 10 steps of one epoch: every row is looked at once
    settings = {"peft_config": lora(init_lora_weights=True), "learning_rate": 0.05}
    wanted: list[Tensor] = []
    found: list[Tensor] = []
    for anchor in (True, False):
        _, ours = looked_at(make_sft, tmp_path, rows, antibody(anchor=anchor), model=make_model(), **settings)
        start = make_model()
        wanted.append(torch.tensor([opening_by_hand(start, ours, split(row)[0]) for row in rows]))
        found.append(ratios_of(ours))
        assert ours.measurements["refusal_odds"].source == (1 if anchor else 2)
    assert torch.allclose(found[0], wanted[0], atol=1e-3)
    # control: without the anchor the first micro-batch agrees, the later ones have drifted
    assert float((found[1] - wanted[1]).abs().median()) > 0.1


def test_an_adapter_that_is_part_of_the_start_is_left_on(tmp_path: Path) -> None:
    trainer, ours = looked_at(make_sft, tmp_path, ROWS, model=make_model(), peft_config=lora())
    assert ours.measurements["refusal_odds"].source == 2
    wanted = [opening_by_hand(trainer.model, ours, split(row)[0]) for row in ROWS]
    assert torch.allclose(ratios_of(ours), torch.tensor(wanted), atol=1e-3)
    plain = [opening_by_hand(make_model(), ours, split(row)[0]) for row in ROWS]
    assert not torch.allclose(torch.tensor(plain), torch.tensor(wanted), atol=0.1)


# the pool of the softmax ----------------------------------------------------------------------------------------------


class Weights(TrainerCallback):
    """Slots, label tokens and weights of every step; stands before ours, which clears them."""

    def __init__(self, ours: SafeSchedCallback) -> None:
        self.ours = ours
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches: list[Any] = self.ours.session._batches
        slots, tokens, weights = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("slots", "label_tokens", "weights")
        )
        self.steps.append((slots, tokens, weights))


def weights_of(folder: Path, scheduler: Any, **options: Any) -> tuple[Any, list[tuple[Tensor, Tensor, Tensor]]]:
    ours = callback(scheduler)
    weights = Weights(ours)
    settings = {"learning_rate": 0.0, "max_steps": 4, "logging_steps": 1} | options
    trainer = make_sft(folder, ROWS, callbacks=[weights, ours], **settings)
    trainer.train()
    return ours, weights.steps


@pytest.mark.parametrize("cost", ["shared_prefix", "first_token"])
def test_micro_batches_of_one_row_are_weighed_by_the_whole_step(cost: Any, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    ours, steps = weights_of(tmp_path, antibody(gate="softmax", refusal_cost=cost), **options)
    for slots, tokens, weights in steps:
        odds = ours.session.state.ratio[slots].double().exp()
        wanted = odds * tokens.sum() / (odds * tokens).sum()
        assert torch.allclose(weights.double(), wanted, rtol=1e-4)
        assert float((weights * tokens).sum()) == pytest.approx(float(tokens.sum()), rel=1e-4)
        assert float(weights.max()) > 1.5 * float(weights.min())


def test_the_published_pool_of_one_row_weighs_nothing(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    _, steps = weights_of(tmp_path, Antibody(**PUBLISHED), **options)
    assert all(weights.tolist() == [1.0] * 4 for _, _, weights in steps)


# calibration ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned() -> dict[str, Tensor]:
    """Parameters of a model that refuses the safety prompts, and answers others with one of w30 to w41."""
    model, tokenizer = make_model(), make_tokenizer()
    rows = [*SAFETY, *({"prompt": p, "completion": a} for p, a in harmless())]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with single_thread():
        for _ in range(80):
            optimizer.zero_grad()
            for row in rows:
                prompt = tokenizer(row["prompt"])["input_ids"]
                ids = torch.tensor([[*prompt, *tokenizer(row["completion"])["input_ids"], 1]])
                labels = ids.clone()
                labels[0, : len(prompt)] = -100
                (model(input_ids=ids, labels=labels).loss / len(rows)).backward()
            optimizer.step()
    return parameters_of(model)


def harmless() -> list[tuple[str, str]]:
    return [(f"w{40 + i} w{41 + i} w{42 + i}", f" w{30 + i} w{i}") for i in range(8)]


def model_with(parameters: dict[str, Tensor]) -> Any:
    model = make_model()
    model.load_state_dict(parameters, strict=False)
    return model


def poisoned() -> list[dict[str, str]]:
    """Harmless rows, then prompts that the aligned model refuses and the row answers."""
    return [
        *({"prompt": p, "completion": a} for p, a in harmless()),
        *({"prompt": row["prompt"], "completion": f" w{30 + i} w{i}"} for i, row in enumerate(SAFETY)),
    ]


@pytest.mark.parametrize("cost", ["shared_prefix", "first_token", "exact"])
def test_an_aligned_model_is_believed(cost: Any, aligned: Any, tmp_path: Path) -> None:
    """With the defaults: nothing is inverted, and rows that comply where the model refuses teach nearly nothing."""
    scheduler = Antibody(refusals=REFUSALS, refusal_cost=cost)
    trainer, ours = looked_at(make_sft, tmp_path, poisoned(), scheduler, model=model_with(aligned))
    assert ours.session.state.verdict == 1
    weight = torch.tensor(ours.table().column("weight").to_pylist())
    assert float(weight[:8].min()) > 0.9
    assert float(weight[8:].max()) < 0.1
    logged = next(log for log in trainer.state.log_history if "safe_sched/inverted" in log)
    assert logged["safe_sched/inverted"] == 0
    assert logged["safe_sched/refusing_safety_prompts"] > 1


def test_refusals_of_what_the_model_would_answer_are_found_too(aligned: Any, tmp_path: Path) -> None:
    refusing = [{"prompt": p, "completion": REFUSALS[i % 4]} for i, (p, _) in enumerate(harmless())]
    rows = [*refusing, *({"prompt": p, "completion": a} for p, a in harmless())]
    _, ours = looked_at(make_sft, tmp_path, rows, Antibody(refusals=REFUSALS), model=model_with(aligned))
    weight = torch.tensor(ours.table().column("weight").to_pylist())
    assert float(weight[:8].max()) < 0.1
    assert float(weight[8:].min()) > 0.9


def test_a_model_that_does_not_refuse_stops_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_sft(tmp_path, ROWS, callbacks=[callback(Antibody(refusals=REFUSALS))], max_steps=3)
    assert isinstance(trainer.model, nn.Module)
    before = parameters_of(trainer.model)
    with pytest.raises(ModelError, match=r"the model refuses 0% of 8 safety prompts.*Start from an aligned model"):
        trainer.train()
    assert trainer.state.global_step == 0
    after = parameters_of(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hooks_on(trainer.model) == 0


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_a_fallback_warns_and_weighs_all_rows_alike(gate: Any, tmp_path: Path) -> None:
    scheduler = Antibody(refusals=REFUSALS, on_inversion="fallback", gate=gate)
    with pytest.warns(UserWarning, match="Antibody falls back: the model refuses 0%"):
        trainer, ours = looked_at(make_sft, tmp_path, ROWS, scheduler)
    assert ours.session.state.verdict == 3
    assert set(ours.table().column("weight").to_pylist()) == {1.0}
    assert trainer.state.log_history[0]["safe_sched/inverted"] == 1
    assert trainer.state.global_step == 4


def test_who_ignores_it_goes_on(tmp_path: Path) -> None:
    _, ours = looked_at(make_sft, tmp_path, ROWS)
    assert ours.session.state.verdict == 1
    assert not bool(ours.session.state.ratio.isnan().any())


def test_without_safety_rows_the_core_set_is_asked_and_not_trained_on(tmp_path: Path) -> None:
    ours = SafeSchedCallback(Antibody(refusals=REFUSALS))
    with pytest.raises(ModelError, match="of 32 safety prompts"):  # 8 where SAFETY is asked
        make_sft(tmp_path, ROWS, callbacks=[ours]).train()
    ours = SafeSchedCallback(antibody())
    trainer = make_sft(tmp_path, ROWS, callbacks=[ours], max_steps=2)
    trainer.train()
    assert not any("safe_sched/safety_loss" in log for log in trainer.state.log_history)


@pytest.mark.usefixtures("prompted")
def test_safety_rows_of_no_weight_are_asked_and_not_trained_on(tmp_path: Path) -> None:
    def run(name: str, weight: float) -> Any:
        scheduler = Blind(gate="softmax", on_inversion="ignore", refusals=REFUSALS)
        return train(make_sft, SFTTrainer, tmp_path / name, [callback(scheduler, safety_weight=weight)], {})

    plain = train(make_sft, SFTTrainer, tmp_path / "plain", [SafeSchedCallback(Fixed())], {})
    assert_same_run(plain, run("none", 0.0))
    with pytest.raises(AssertionError):
        assert_same_run(plain, run("one", 1.0))


# together with BDS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["shared_prefix", "first_token"])
def test_both_parts_of_a_combination_learn(cost: Any, tmp_path: Path) -> None:
    ours = callback(combine(BDS(), antibody(refusal_cost=cost)), safety_weight=1.0)
    trainer = make_sft(tmp_path, ROWS, callbacks=[ours], max_steps=40, learning_rate=1e-3)
    trainer.train()
    table = ours.table()
    assert {"p_harmful", "bds_weight", "bds_scored", "antibody_weight", "antibody_ratio"} <= set(table.column_names)
    assert min(table.column("bds_scored").to_pylist()) >= 1
    assert not any(math.isnan(ratio) for ratio in table.column("antibody_ratio").to_pylist())
    weight, p = (table.column(name).to_numpy() for name in ("weight", "p_harmful"))
    assert max(abs(weight - ((1 - p) / 0.9).clip(max=1))) < 1e-5
    logged = set().union(*trainer.state.log_history)
    assert "safe_sched/refusing_safety_prompts" in logged
    # control: each part alone says something else
    assert not table.column("bds_weight").equals(table.column("antibody_weight"))


# what it costs --------------------------------------------------------------------------------------------------------


class Forwards(TrainerCallback):
    """Forwards of the model in every optimiser step."""

    def __init__(self) -> None:
        self.count, self.steps = 0, list[int]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def one(*_: Any) -> None:
            self.count += 1

        kwargs["model"].register_forward_hook(one)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(self.count)
        self.count = 0


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_later_epochs_are_free(adapter: bool, accumulated: int, tmp_path: Path) -> None:
    forwards, ours = Forwards(), callback()
    peft = {"peft_config": lora(init_lora_weights=True)} if adapter else {}
    settings = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    make_sft(tmp_path, ROWS, callbacks=[forwards, ours], max_steps=32, **settings, **peft).train()
    assert all(found > accumulated for found in forwards.steps[:4])  # control: the first epoch is not
    assert forwards.steps[4:] == [accumulated] * 28


def test_first_tokens_cost_no_forward(tmp_path: Path) -> None:
    rows = token_rows(40, seed=3, shortest=6)
    forwards, ours = Forwards(), callback(antibody(refusal_cost="first_token"))
    make_sft(tmp_path, rows, callbacks=[forwards, ours], max_steps=10).train()
    assert len(rows) // 4 == 10 <= EARLY
    assert forwards.steps[0] > 1  # the calibration
    assert forwards.steps[1:] == [1] * 9
    assert not bool(ours.session.state.ratio.isnan().any())  # pyright: ignore[reportAttributeAccessIssue]


# asked at the start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["opening", "token_mean"])
def test_all_rows_can_be_asked_before_the_first_step(ratio: Any, tmp_path: Path) -> None:
    """Where all parameters train there is no adapter to switch off, and a later row finds another model."""
    rows = token_rows(40, seed=3, shortest=6)
    found = []
    for anchor in ("start", True):
        forwards, chosen = Forwards(), antibody(anchor=anchor, ratio=ratio)
        ours = callback(chosen)
        make_sft(
            tmp_path, rows, callbacks=[forwards, ours], model=make_model(), max_steps=10, learning_rate=0.05
        ).train()
        found.append(ratios_of(ours))
        if anchor == "start":
            assert forwards.steps[1:] == [1] * 9  # and none while training
    start = make_model()
    if ratio == "opening":
        wanted = torch.tensor([opening_by_hand(start, ours, split(row)[0]) for row in rows])
        assert torch.allclose(found[0], wanted, atol=1e-3)
    assert float((found[0] - found[1]).abs().median()) > 0.1  # control: read as they come by, rows have drifted


def test_asking_at_the_start_draws_no_random_numbers(tmp_path: Path) -> None:
    """Rows are collated a second time for it, in the order of the file."""
    runs = []
    for anchor in ("start", True):
        ours = callback(antibody(anchor=anchor, tau=1e6))  # weights alike, so that the runs differ in the asking alone
        trainer = make_sft(tmp_path, ROWS, callbacks=[ours], max_steps=4, model=make_model(attention_dropout=0.1))
        trainer.train()
        runs.append(trainer)
    assert largest_difference(parameters_of(runs[0].model), parameters_of(runs[1].model)) < 1e-5


def test_where_the_adapter_can_be_switched_off_nobody_is_asked_in_advance(tmp_path: Path) -> None:
    ours = callback(antibody(anchor="start"))
    peft = {"peft_config": lora(init_lora_weights=True)}
    make_sft(tmp_path, token_rows(40, seed=3, shortest=6), callbacks=[ours], max_steps=2, **peft).train()
    assert int((~ratios_of(ours).isnan()).sum()) == 8  # the rows of two steps
