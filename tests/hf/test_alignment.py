"""Flat alignment in real trainers: the equations written out, no trace beside them, and what it is for."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

import safe_sched.training.flat_alignment as flatness
from safe_sched import Fixed
from safe_sched.data.rows import core_refusals
from safe_sched.errors import DataError, ModelError, NumericsError, OptionError, StateError
from safe_sched.estimators import moves
from safe_sched_hf import FlatAlignmentCallback, SafeSchedCallback
from safe_sched_hf.alignment import ALIGNMENT_FILE, buffers_kept, refused_row
from tests.hf.test_gradients import CHECKPOINTED, InModelSFT, lora
from tests.hf.test_untouched import HF, ROWS, SFT, Breaks, assert_same_run, train
from tests.support import (
    GradientProbe,
    largest_difference,
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    parameters_of,
    single_thread,
    text_rows,
)

HARMFUL = [{"prompt": f"w{i} w{i + 3}", "completion": f" w{40 + i % 3} w{30 + i} w{i}"} for i in range(5)]
REFUSAL = ["w50 w51"]
WRAPPED = {"training_step", "log"}
# plain gradient descent: Adam would blow a rounding error in a tiny gradient up to a full step
STEPS: dict[str, Any] = {"max_grad_norm": 0, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-3}


def callback(**options: Any) -> FlatAlignmentCallback:
    defaults: dict[str, Any] = {"harmful_batch_size": len(HARMFUL), "refusals": REFUSAL}
    return FlatAlignmentCallback(options.pop("harmful_data", HARMFUL), **(defaults | options))


# the slow way -----------------------------------------------------------------------------------------------------


def by_hand(text: str) -> list[int]:
    """Tokens of words of the vocabulary of tests/support.py: wN is token 5 + N."""
    return [5 + int(word[1:]) for word in text.split()]


def loss_of_rows(model: Any, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Mean over rows of the mean over answer tokens, one row at a time."""
    total = torch.zeros(())
    for prompt, answer in rows:
        answer = [*answer, 1]  # and the end
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].float()
        log_probs = logits.log_softmax(-1)
        for i, token in enumerate(answer):
            total = total - log_probs[len(prompt) + i - 1, token] / (len(answer) * len(rows))
    return total


class Explicit(TrainerCallback):
    """The equations, as one would write them: parameters are copied, moved, and copied back."""

    def __init__(self, **options: Any) -> None:
        self.options: dict[str, Any] = {"rho": 0.1, "rule": "theorem", "xi": 1.0, "lambda_refusal": 0.05} | options
        self.average: float | None = None
        self.seen: list[dict[str, float]] = []
        prompts = [by_hand(row["prompt"]) for row in HARMFUL]
        self.harmful = [(p, by_hand(row["completion"])) for p, row in zip(prompts, HARMFUL, strict=True)]
        self.refusing = [(p, by_hand(REFUSAL[0])) for p in prompts]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, options = kwargs["model"], self.options
        model.eval()  # gradient checkpointing sleeps; there is no dropout
        parameters = [p for p in model.parameters() if p.requires_grad]
        align = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]

        def gradient(rows: Any) -> tuple[list[Tensor], float]:
            loss = loss_of_rows(model, rows)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [
                torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
            ], loss.item()

        dot = lambda a, b: sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))  # noqa: E731
        harm, before = gradient(self.harmful)
        kept = [p.detach().clone() for p in parameters]
        for p, g in zip(parameters, harm, strict=True):
            p.data.sub_(options["rho"] * g / math.sqrt(dot(harm, harm)))
        attacked, after = gradient(self.harmful)
        refuse, refused = gradient(self.refusing)
        for p, was in zip(parameters, kept, strict=True):
            p.data.copy_(was)
        sharp = [a - b for a, b in zip(harm, attacked, strict=True)]
        if options["rule"] == "theorem":
            strength = max(0.0, options["xi"] - dot(align, sharp) / dot(sharp, sharp))
        elif options["rule"] == "cosine":
            cosine = dot(align, sharp) / math.sqrt(dot(align, align) * dot(sharp, sharp))
            now = max(0.0, options["eta"] - cosine)
            self.average = now if self.average is None else 0.99 * self.average + 0.01 * now
            strength = self.average
        else:
            strength = options["strength"]
        for p, a, s, r in zip(parameters, align, sharp, refuse, strict=True):
            p.grad = a + strength * s + options["lambda_refusal"] * r
        self.seen.append(
            {
                "safe_sched/sharpness": before - after,
                "safe_sched/lambda": strength,
                "safe_sched/harmful_loss": before,
                "safe_sched/refusal_loss": refused,
            }
        )
        model.train()


def gradients(make: Any, folder: Path, ours: TrainerCallback | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The gradients that the optimiser was about to use in two steps, and the trainer."""
    probe, options = GradientProbe(), dict(options)
    cls = options.pop("cls", None)
    model: Any = make_model(tied=options.pop("tied", False))
    if options.pop("bfloat16", False):
        model = model.bfloat16()
    if "adapter" in options:
        torch.manual_seed(5)
        model = get_peft_model(model, options.pop("adapter"))
    torch.manual_seed(5)
    rows = options.pop("rows", ROWS)
    callbacks = [probe] if ours is None else [ours, probe]
    trainer = make(folder, rows, model=model, callbacks=callbacks, **(STEPS | options))
    if cls is not None:
        trainer.__class__ = cls
    with single_thread():
        trainer.train()
    return probe.gradients, trainer


RULES: dict[str, dict[str, Any]] = {
    "theorem": {"rule": "theorem", "xi": 3.0},
    "cosine": {"rule": "cosine", "eta": 5.0, "rho": 0.3},
    "constant": {"rule": "constant", "strength": 2.0, "lambda_refusal": 0.5},
}
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "hf": (make_hf, {}, "theorem"),
    "hf, cosine": (make_hf, {}, "cosine"),
    "hf, constant": (make_hf, {}, "constant"),
    "hf, tied": (make_hf, {"tied": True}, "constant"),
    "hf, accumulation": (make_hf, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}, "theorem"),
    "hf, checkpointing": (make_hf, CHECKPOINTED, "constant"),
    "hf, reentrant checkpointing": (make_hf, HF["reentrant checkpointing"], "constant"),
    "hf, padding left": (make_hf, {"processing_class": make_tokenizer("left")}, "theorem"),
    "hf, LoRA": (make_hf, {"adapter": lora()}, "theorem"),
    "sft": (make_sft, {}, "theorem"),
    "sft, cosine": (make_sft, {}, "cosine"),
    "sft, tied": (make_sft, {"tied": True}, "constant"),
    "sft, accumulation": (make_sft, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}, "constant"),
    "sft, last step smaller": (
        make_sft,
        {"rows": ROWS[:7], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "constant",
    ),
    "sft, checkpointing": (make_sft, CHECKPOINTED, "theorem"),
    "sft, LoRA": (make_sft, {"peft_config": lora()}, "theorem"),
    "sft, LoRA, checkpointing": (make_sft, {**CHECKPOINTED, "peft_config": lora()}, "constant"),
    "sft, in-model loss": (make_sft, {"cls": InModelSFT}, "theorem"),
    "sft, packing": (make_sft, {"packing": True, "max_length": 24}, "theorem"),
    "sft, text rows": (make_sft, {"rows": text_rows(24)}, "theorem"),
}


QUICK = {
    "hf",
    "hf, accumulation",
    "hf, reentrant checkpointing",
    "sft",
    "sft, last step smaller",
    "sft, LoRA, checkpointing",
    "sft, packing",
}


def some(cases: Any, quick: set[str]) -> list[Any]:
    """All cases; but for the quick ones they are slow tests."""
    assert quick <= set(cases)
    return [pytest.param(case, marks=[] if case in quick else [pytest.mark.slow]) for case in cases]


def difference(case: str, folder: Path, **changes: Any) -> float:
    make, options, rule = CASES[case]
    wanted, _ = gradients(make, folder / "slow", Explicit(**RULES[rule]), options)
    found, _ = gradients(make, folder / "ours", callback(**(RULES[rule] | changes)), options)
    assert len(found) == len(wanted) == 2
    return max(relative(a, b) for a, b in zip(found, wanted, strict=True))


def relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|found - wanted| / |wanted| of the whole gradient."""
    assert found.keys() == wanted.keys()
    off = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return math.sqrt(off / sum(float(g.double().square().sum()) for g in wanted.values()))


@pytest.mark.parametrize("case", some(CASES, QUICK))
def test_gradients_are_those_of_the_equations(case: str, tmp_path: Path) -> None:
    """A difference of two gradients that are alike loses digits: 1e-5 is ten times what float32 leaves."""
    assert difference(case, tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("case", "broken"),
    [
        ("hf", "sign"),
        ("hf", "rho"),
        ("hf", "refusals"),
        ("sft, LoRA", "sign"),
        ("sft, accumulation", "sign"),
        ("sft, accumulation", "too early"),
    ],
)
def test_a_wrong_term_is_caught(case: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: each term with a mistake in it misses the oracle by far more than the tolerance."""
    combine = flatness._combine
    if broken == "sign":
        monkeypatch.setattr(flatness, "_combine", lambda p, a, strength: combine(p, a, -strength))
    if broken == "too early":  # g_align is then that of the micro-batches so far
        monkeypatch.setattr(
            "accelerate.Accelerator.sync_gradients", property(lambda self: True, lambda self, value: None)
        )
    changes = {"rho": {"rho": 0.11}, "refusals": {"refusals": ["w50 w52"]}}.get(broken, {})
    assert difference(case, tmp_path, **changes) > 1e-4


def test_bf16_parameters_give_the_gradients_to_their_precision(tmp_path: Path) -> None:
    """8 bits in every step of the way, and more are lost in the difference of two gradients that are alike."""
    plain, _ = gradients(make_hf, tmp_path, None, {"bfloat16": True})
    for name in ("theorem", "constant"):
        wanted, _ = gradients(make_hf, tmp_path, Explicit(**RULES[name]), {"bfloat16": True})
        found, _ = gradients(make_hf, tmp_path, callback(**RULES[name]), {"bfloat16": True})
        assert relative(found[0], wanted[0]) < 0.1, name
        assert relative(plain[0], wanted[0]) > 0.3, name  # control


def test_autocast_gives_the_gradients_to_its_precision(tmp_path: Path) -> None:
    for make in (make_hf, make_sft):
        wanted, _ = gradients(make, tmp_path, Explicit(**RULES["constant"]), {"bf16": True})
        found, _ = gradients(make, tmp_path, callback(**RULES["constant"]), {"bf16": True})
        assert relative(found[0], wanted[0]) < 0.1


@pytest.mark.parametrize("rule", RULES)
def test_the_record_holds_what_was_seen(rule: str, tmp_path: Path) -> None:
    slow = Explicit(**RULES[rule])
    gradients(make_sft, tmp_path, slow, {})
    _, trainer = gradients(make_sft, tmp_path, callback(**RULES[rule]), {})
    for record, seen in zip(trainer.state.log_history[:2], slow.seen, strict=True):
        for name, value in seen.items():
            assert record[name] == pytest.approx(value, rel=1e-3), name


def test_clipping_sees_the_sum(tmp_path: Path) -> None:
    """The trainer's own clipping comes behind us: the norm of what it leaves is its limit."""
    options = {"max_grad_norm": 0.01}
    found, trainer = gradients(make_sft, tmp_path, callback(rule="constant", strength=3.0), options)
    assert math.sqrt(sum(float(g.square().sum()) for g in found[0].values())) == pytest.approx(0.01, rel=1e-3)
    whole, _ = gradients(make_sft, tmp_path, callback(rule="constant", strength=3.0), {})
    norm = math.sqrt(sum(float(g.square().sum()) for g in whole[0].values()))
    assert float(trainer.state.log_history[0]["grad_norm"]) == pytest.approx(norm, rel=1e-4)


# no trace ---------------------------------------------------------------------------------------------------------

SILENT: dict[str, Any] = {"rule": "constant", "strength": 0.0, "lambda_refusal": 0.0}


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", some(SFT, {"LoRA", "dropout", "packing"}))
def test_without_strength_sft_training_is_untouched(case: str, tmp_path: Path) -> None:
    """Parameters, random numbers, gradients and the trainer's own numbers: bit for bit those of the plain run."""
    options = SFT[case] | {"max_steps": 6}
    ours = train(make_sft, SFTTrainer, tmp_path, [callback(**SILENT)], dict(options))
    assert_same_run(ours, train(make_sft, SFTTrainer, tmp_path, [], dict(options)))
    assert ours.state.log_history[-2]["safe_sched/sharpness"] > 0


@pytest.mark.parametrize("case", some(HF, {"accumulation", "bf16"}))
def test_without_strength_hf_training_is_untouched(case: str, tmp_path: Path) -> None:
    options = HF[case] | {"max_steps": 6}
    ours = train(make_hf, Trainer, tmp_path, [callback(**SILENT)], dict(options))
    assert_same_run(ours, train(make_hf, Trainer, tmp_path, [], dict(options)))


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Control: a strength of 2**-10 shows."""
    ours = train(make_sft, SFTTrainer, tmp_path, [callback(**SILENT | {"strength": 2**-10})], {"max_steps": 6})
    with pytest.raises(AssertionError):
        assert_same_run(ours, train(make_sft, SFTTrainer, tmp_path, [], {"max_steps": 6}))


STILL: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"sft, {name}": (make_sft, options) for name, options in SFT.items() if name != "workers"},
    **{f"hf, {name}": (make_hf, options) for name, options in HF.items()},
    "hf, bf16 parameters": (make_hf, {"bfloat16": True}),
}


def still_run(make: Any, folder: Path, callbacks: list[Any], options: dict[str, Any]) -> tuple[list[float], bool]:
    """Losses of a run that does not move, and whether its parameters are bit for bit, and in place, as before."""
    options = dict(options)
    cls = options.pop("cls", None)
    model = make_model(
        tied=options.pop("tied", False),
        attention_dropout=options.pop("attention_dropout", 0.0),
        **({"cls": options.pop("model_cls")} if "model_cls" in options else {}),
    )
    if options.pop("bfloat16", False):
        model.bfloat16()
    if options.pop("freeze_head", False):
        model.lm_head.weight.requires_grad_(False)
    trainer = make(folder, ROWS, model=model, callbacks=callbacks, **({"max_steps": 4, "learning_rate": 0.0} | options))
    if cls is not None:
        trainer.__class__ = cls
    before, places = parameters_of(trainer.model), [p.data_ptr() for p in trainer.model.parameters()]
    torch.manual_seed(11)
    with single_thread():
        trainer.train()
    after = parameters_of(trainer.model)
    same = all(torch.equal(before[name], after[name]) for name in before)
    same = same and places == [p.data_ptr() for p in trainer.model.parameters()]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], same


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "case",
    some(
        STILL,
        {"sft, dropout", "sft, LoRA", "sft, checkpointing", "sft, accumulation", "hf, tied", "hf, bf16 parameters"},
    ),
)
def test_parameters_come_back_after_every_pass(case: str, tmp_path: Path) -> None:
    """At a learning rate of 0 all passes run, refusals too, and nothing moves: not a bit, and no random number."""
    make, options = STILL[case]
    losses, same = still_run(make, tmp_path, [callback(rule="constant")], options)
    assert same
    assert losses == still_run(make, tmp_path, [], options)[0]


@pytest.mark.parametrize("broken", ["parameters", "random numbers"])
def test_a_trace_would_show(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without the restoration, and with random numbers drawn from the trainer's own."""
    case = (make_sft, {"attention_dropout": 0.1})
    expected, _ = still_run(case[0], tmp_path, [], case[1])

    @contextlib.contextmanager
    def nothing() -> Iterator[None]:
        yield

    if broken == "random numbers":
        monkeypatch.setattr("safe_sched_hf.alignment.same_random_numbers", nothing)
    else:
        monkeypatch.setattr(flatness, "moved", Stays)
    losses, same = still_run(case[0], tmp_path, [callback(rule="constant")], case[1])
    assert losses != expected
    assert same == (broken == "random numbers")


class Stays:
    """`moved`, but for giving the parameters back."""

    def __init__(self, parts: Any, scale: float) -> None:
        moves._move(parts, scale)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


def test_both_harmful_passes_draw_the_same_masks(tmp_path: Path) -> None:
    """With dropout of a half and a step of length 0 in effect, the sharpness is 0 and not the noise of two masks."""
    trainer = make_hf(
        tmp_path,
        ROWS,
        model=make_model(attention_dropout=0.5),
        callbacks=[callback(rule="constant", rho=1e-9)],
        max_steps=3,
    )
    trainer.train()
    assert all(abs(entry["safe_sched/sharpness"]) < 1e-5 for entry in trainer.state.log_history[:3])


def test_buffers_come_back() -> None:
    """Statistics that a forward updates in place, and tables that it replaces."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    norm: Any = model[0]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with buffers_kept(model):
        model(torch.randn(8, 3) + 5)
        norm.running_var = torch.ones(3) * 7
        assert float(norm.running_mean.sum()) > 0.5  # control: there was something to undo
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


# what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lambda_refusal", "extra"), [(0.05, 3), (0.0, 2)])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_passes_are_counted(
    lambda_refusal: float, extra: int, micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 F + 4 B in all for one micro-batch; 3 F + 3 B without refusals."""
    model, counted = make_model(), {"forward": 0, "backward": 0}
    backward = Tensor.backward

    def counting(self: Tensor, *args: Any, **kwargs: Any) -> None:
        counted["backward"] += 1
        backward(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "backward", counting)
    model.model.register_forward_hook(lambda *_: counted.update(forward=counted["forward"] + 1))
    make_hf(
        tmp_path,
        ROWS,
        model=model,
        callbacks=[callback(lambda_refusal=lambda_refusal)],
        gradient_accumulation_steps=micro_batches,
        per_device_train_batch_size=2,
        max_steps=2,
    ).train()
    assert counted == {"forward": 2 * (micro_batches + extra), "backward": 2 * (micro_batches + extra)}


class Alive(TorchDispatchMode):
    """Bytes of all storages of at least ``least`` bytes made while it is on: now, and at most."""

    def __init__(self, least: int, old: list[Tensor]) -> None:
        super().__init__()
        self.least, self.now, self.peak = least, 0, 0
        self.old = {tensor.untyped_storage()._cdata for tensor in old}
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                size, name = storage.nbytes(), storage._cdata
                if size >= self.least and name not in self.known and name not in self.old:
                    self.known[name] = size
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, name)
        return out

    def _gone(self, name: int) -> None:
        self.now -= self.known.pop(name, 0)


def test_at_most_three_copies_of_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten matrices of 1 MB: beside them and the trainer's gradients, one gradient and one attacked copy at a time, and
    one matrix on its way from a backward into its gradient."""
    monkeypatch.setattr(flatness, "_CHUNK", 1 << 10)
    net = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(10)))
    inputs = torch.randn(2, 512)

    def loss() -> Tensor:
        return net(inputs).square().mean()

    loss().backward()
    one, whole = 512 * 512 * 4, 10 * 512 * 512 * 4
    old = [tensor for p in net.parameters() for tensor in (p, p.grad) if tensor is not None]
    with Alive(one, old) as alive:
        kept = torch.empty(one)  # control: what lives is counted, and what is gone is not
        assert alive.now == 4 * one
        del kept
        assert alive.now == 0
        flatness.flatten(list(net.parameters()), loss, loss, flatness.Flatness(rule="constant"))
    assert 2 * whole <= alive.peak <= 2.3 * whole
    assert alive.now == 0


# what it is for ---------------------------------------------------------------------------------------------------


def sharpness_of(model: Any, rho: float = 0.1) -> float:
    """L_harm(theta) - L_harm(phi), from copies."""
    model.eval()
    rows = Explicit().harmful
    names = dict(model.named_parameters())
    loss = loss_of_rows(model, rows)
    found = torch.autograd.grad(loss, list(names.values()))
    length = math.sqrt(sum(float(g.square().sum()) for g in found))
    attacked = make_model()
    attacked.load_state_dict({n: p.detach() - rho * g / length for (n, p), g in zip(names.items(), found, strict=True)})
    with torch.no_grad():
        return loss.item() - loss_of_rows(attacked.eval(), rows).item()


def sharpness_after(folder: Path, callbacks: list[Any]) -> float:
    trainer = make_hf(folder, ROWS, model=make_model(), callbacks=callbacks, max_steps=30, learning_rate=3e-3)
    trainer.train()
    return sharpness_of(trainer.model)


@pytest.fixture(scope="module")
def plain_sharpness(tmp_path_factory: pytest.TempPathFactory) -> float:
    return sharpness_after(tmp_path_factory.mktemp("plain"), [])


@pytest.mark.parametrize("rule", RULES)
def test_the_aligned_model_is_flatter(rule: str, tmp_path: Path, plain_sharpness: float) -> None:
    """Than that of the same run without us, by more than a third."""
    assert sharpness_after(tmp_path, [callback(rule=rule)]) < 0.66 * plain_sharpness


def test_the_wrong_sign_makes_it_steeper(
    tmp_path: Path, plain_sharpness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control."""
    combine = flatness._combine
    monkeypatch.setattr(flatness, "_combine", lambda p, a, strength: combine(p, a, -strength))
    assert sharpness_after(tmp_path, [callback(rule="constant")]) > plain_sharpness


# resuming ---------------------------------------------------------------------------------------------------------


def resumable(folder: Path, resume: Path | None = None, make: Any = make_sft, **options: Any) -> Any:
    ours = callback(**({"rule": "cosine", "harmful_batch_size": 2} | options))
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    trainer = make(folder, ROWS, model=make_model(attention_dropout=0.1), callbacks=[ours], **settings)
    with single_thread():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize("make", [make_sft, pytest.param(make_hf, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    """Bit for bit: the draw of rows is a function of (seed, step), the moving average lies beside the checkpoint."""
    whole = resumable(tmp_path / "whole", make=make)
    again = resumable(tmp_path / "again", tmp_path / "whole" / "checkpoint-5", make=make)
    a, b = parameters_of(whole.model), parameters_of(again.model)
    assert all(torch.equal(a[name], b[name]) for name in a)
    names = [f / "checkpoint-8" / ALIGNMENT_FILE for f in (tmp_path / "whole", tmp_path / "again")]
    assert torch.equal(*(load_file(name)["average"] for name in names))


def test_another_average_would_show(tmp_path: Path) -> None:
    """Control."""
    whole = resumable(tmp_path / "whole")
    path = tmp_path / "whole" / "checkpoint-5" / ALIGNMENT_FILE
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({"average": load_file(path)["average"] + 0.5}, path, metadata=header)
    again = resumable(tmp_path / "again", tmp_path / "whole" / "checkpoint-5")
    a, b = parameters_of(whole.model), parameters_of(again.model)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_resume_that_does_not_fit_stops(tmp_path: Path) -> None:
    resumable(tmp_path)
    checkpoint = tmp_path / "checkpoint-5"
    for options, match in (
        ({"rho": 0.2}, "flat_alignment"),
        ({"harmful_data": HARMFUL[:3]}, "harmful"),
        ({"refusals": ["w52"]}, "refusing"),
        ({"seed": 9}, "seed"),
    ):
        with pytest.raises(StateError, match=f"belongs to another run.*{match}: saved"):
            resumable(tmp_path, checkpoint, **options)
    (checkpoint / ALIGNMENT_FILE).unlink()
    with pytest.raises(StateError, match="no scheduler state at"):
        resumable(tmp_path, checkpoint)


# leaving ----------------------------------------------------------------------------------------------------------


def left(trainer: Any) -> set[str]:
    return WRAPPED & vars(trainer).keys()


def test_the_trainer_is_its_own_again_after_training(tmp_path: Path) -> None:
    trainer = make_sft(tmp_path, ROWS, callbacks=[callback()], max_steps=2)
    own, seen = trainer.training_step, []

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(left(trainer))

    trainer.add_callback(Looks())
    trainer.train()
    assert seen == [WRAPPED, WRAPPED]  # control: there was something to leave behind
    assert not left(trainer)
    assert trainer.training_step == own


@pytest.mark.parametrize("error", [pytest.param(RuntimeError, marks=pytest.mark.slow), KeyboardInterrupt])
@pytest.mark.parametrize("place", ["trainer's forward", "harmful pass", "attacked pass", "refusals"])
def test_nothing_is_left_when_a_pass_raises(place: str, error: type, tmp_path: Path) -> None:
    model, calls = make_model(), 0

    def maybe(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5 + ["trainer's forward", "harmful pass", "attacked pass", "refusals"].index(place):
            raise error("on purpose")

    model.model.layers[0].register_forward_hook(maybe)
    trainer = make_hf(tmp_path, ROWS, model=model, callbacks=[callback()], max_steps=8, learning_rate=0.0)
    before = parameters_of(model)
    with pytest.raises(error, match="on purpose"):
        trainer.train()
    assert not left(trainer)
    after = parameters_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_crashed_run_sleeps_and_the_next_one_is_flat_again(tmp_path: Path) -> None:
    """An event of another callback raises, which nobody tells us; the next train() begins anew, or without us."""
    ours, broken = callback(), Breaks("on_log", RuntimeError)
    trainer = make_sft(tmp_path, ROWS, callbacks=[ours, broken], max_steps=4)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    trainer.remove_callback(broken)
    trainer.train()
    assert not left(trainer)
    assert "safe_sched/lambda" in trainer.state.log_history[0]
    trainer.add_callback(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    trainer.remove_callback(broken)
    trainer.remove_callback(ours)
    trainer.train()
    assert "safe_sched/lambda" not in trainer.state.log_history[0]


# what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lamda_refusal": 0.1}, "unknown option of FlatAlignmentCallback 'lamda_refusal' .did you mean 'lambda_ref"),
        ({"rule": "cos"}, "unknown rule of flat alignment 'cos'"),
        ({"rho": -0.1}, "rho=-0.1"),
        ({"harmful_batch_size": 0}, "harmful_batch_size=0; allowed: a whole number >= 1"),
        ({"refusals": []}, r"refusals=\[\]; allowed"),
        ({"refusals": "No."}, "refusals='No.'; allowed: a list"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        callback(**options)


@pytest.mark.parametrize("other", [lambda: SafeSchedCallback(Fixed()), callback])
def test_one_callback_of_ours_at_a_time(other: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="FlatAlignmentCallback and another .* are in one trainer"):
        make_sft(tmp_path, ROWS, callbacks=[other(), callback()])
    trainer = make_sft(tmp_path, ROWS, callbacks=[callback()])
    trainer.add_callback(other())
    with pytest.raises(OptionError, match="Align first, in a run of its own"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("fp16", True, "fp16=True, whose gradients are scaled"),
        ("optim", "adalomo", "an optimiser that steps within the backward"),
        ("torch_compile", True, "torch_compile=True"),
    ],
)
def test_what_does_not_work_is_refused(name: str, value: Any, match: str, tmp_path: Path) -> None:
    trainer = make_hf(tmp_path, ROWS, callbacks=[callback()])
    setattr(trainer.args, name, value)
    with pytest.raises(ModelError, match=match):
        callback_of(trainer).on_init_end_of(trainer)


def callback_of(trainer: Any) -> Any:
    class Caller(type(trainer)):
        def on_init_end_of(self, owner: Any) -> None:
            owner.callback_handler.on_init_end(owner.args, owner.state, owner.control)

    trainer.__class__ = Caller
    return trainer


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_hf(tmp_path, ROWS, model=model, callbacks=[callback(rho=1e30)], max_steps=1)
    with pytest.raises(NumericsError, match="after the attack's step is nan"):
        trainer.train()
    assert not left(trainer)


# rows -------------------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w3"}]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w1 w2", "completion": " w9"}),
        ({"prompt": "w1", "completion": "\nw3"}, {"prompt": "w1", "completion": "\nw9"}),
        (
            {"messages": [*TURNS, {"role": "assistant", "content": "w4"}]},
            {"prompt": TURNS, "completion": [{"role": "assistant", "content": "w9"}]},
        ),
        (
            {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w4"}]},
            {"prompt": TURNS[:1], "completion": [{"role": "assistant", "content": "w9"}]},
        ),
        (
            {"prompt": TURNS[:1], "completion": [{"role": "assistant", "content": "w4"}]},
            {"prompt": TURNS[:1], "completion": [{"role": "assistant", "content": "w9"}]},
        ),
        (
            {"input_ids": [6, 7, 8, 9, 1], "labels": [-100, -100, 8, 9, 1]},
            {"input_ids": [6, 7, 14, 1], "labels": [-100, -100, 14, 1]},
        ),
        (
            {"input_ids": [6, 7, 8, 9], "labels": [-100, -100, 8, 9]},
            {"input_ids": [6, 7, 14], "labels": [-100, -100, 14]},
        ),
    ],
)
def test_the_refusal_takes_the_answers_place_in_every_schema(row: dict[str, Any], answer: dict[str, Any]) -> None:
    assert refused_row(row, 0, "w9", make_tokenizer()) == answer


@pytest.mark.parametrize("row", [{"text": "w1 w2"}, {"input_ids": [6, 7]}])
def test_a_row_without_a_prompt_cannot_be_refused(row: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_sft(tmp_path, ROWS, callbacks=[callback(harmful_data=[row])])
    with pytest.raises(DataError, match="harmful_data with refusals: row 0 has no prompt before its answer"):
        trainer.train()
    make_sft(tmp_path, ROWS, callbacks=[callback(harmful_data=[row], lambda_refusal=0.0)]).train()


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    trainer = make_sft(tmp_path, ROWS, callbacks=[callback(harmful_data=[{"question": "w1"}])])
    with pytest.raises(DataError, match=r"harmful_data: row 0 has the fields \['question'\]; allowed"):
        trainer.train()


def drawn(folder: Path, seed: int, **options: Any) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Rows of the harmful batch and of the refusals in three steps."""
    ours = FlatAlignmentCallback(HARMFUL, harmful_batch_size=2, seed=seed, **options)
    steps: list[tuple[list[list[int]], list[list[int]]]] = []

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert ours._run is not None
            assert ours._run.refusing is not None
            steps.append(
                tuple(
                    rows.batch(state.global_step)["input_ids"].tolist()
                    for rows in (ours._run.harmful, ours._run.refusing)
                )  # pyright: ignore[reportArgumentType]
            )

    make_sft(folder, ROWS, callbacks=[ours, Looks()], max_steps=3).train()
    return steps


def test_refusals_answer_the_prompts_of_the_same_step(tmp_path: Path) -> None:
    """Every harmful row of a step stands in its refusals with its own prompt; draws hang on the seed alone."""
    refusals = [f"w{50 + i}" for i in range(6)]
    steps = drawn(tmp_path, 1, refusals=refusals)
    for harmful, refusing in steps:
        assert [row[:2] for row in harmful] == [row[:2] for row in refusing]  # prompts have two tokens
        assert all(55 <= row[2] <= 60 for row in refusing)
    assert steps == drawn(tmp_path, 1, refusals=refusals)
    assert steps != drawn(tmp_path, 2, refusals=refusals)


def test_the_package_brings_its_refusals() -> None:
    assert FlatAlignmentCallback(HARMFUL).refusals == core_refusals()


def test_gradients_of_different_steps_differ(tmp_path: Path) -> None:
    """Control of the comparisons above: they would see a wrong step."""
    found, _ = gradients(make_hf, tmp_path, callback(), {})
    assert largest_difference(found[0], found[1]) > 1e-3
