"""Adapters of every kind: what the weights do to full parameters they do to whatever an adapter trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer
from trl import SFTTrainer

import safe_sched.training.gate
from safe_sched import BDS, Fixed
from safe_sched.errors import ModelError
from safe_sched.training.manifest import verify
from safe_sched_hf import SafeSchedCallback
from tests.hf import test_trl_cli as trl_cli
from tests.hf.test_gradients import (
    ROWS,
    STEPS,
    ExplicitHF,
    ExplicitSFT,
    InModelSFT,
    difference,
    fixed_weights,
    lora,
)
from tests.hf.test_trl_cli import home as home
from tests.hf.test_untouched import assert_same_run, train
from tests.support import (
    GradientProbe,
    hooks_on,
    largest_difference,
    make_hf,
    make_model,
    make_sft,
    single_thread,
    token_rows,
    uneven_weights,
)

# peft 0.20 warns of every norm that LN tuning takes
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

SAFETY = token_rows(4, seed=9)
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ON: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **TASK}
TOKENS = list(range(5, 30))
CLOSE, FAR = 1e-5, 1e-2  # drawn adapters are large, and cost their gradients a digit

# most are drawn, so they are not the identity when training begins
USUAL: dict[str, Callable[[], PeftConfig]] = {
    "LoRA on all linear layers": lambda: lora(target_modules="all-linear"),
    "DoRA": lambda: lora(use_dora=True),
    "rsLoRA": lambda: lora(use_rslora=True),
    "LoRA, output embedding trained": lambda: lora(modules_to_save=["lm_head"]),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "VeRA": lambda: peft.VeraConfig(r=4, init_weights=False, **ON),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, init_lora_weights=False, **ON),
}
RARER: dict[str, Callable[[], PeftConfig]] = {
    "LoRA with biases": lambda: lora(bias="lora_only"),
    "LoRA, some tokens trained": lambda: lora(trainable_token_indices=TOKENS),
    "LoHa": lambda: peft.LoHaConfig(r=4, init_weights=False, **ON),
    "LoKr": lambda: peft.LoKrConfig(r=4, init_weights=False, **ON),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, init_weights=False, **ON),
    "LN tuning": lambda: peft.LNTuningConfig(**TASK),
}
# TRL 1.16 takes none of these, with us or without
HF_ONLY: dict[str, tuple[Callable[[], PeftConfig], bool]] = {
    "LoRA on both embeddings": (lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]), False),
    "LoRA on both embeddings, tied": (
        lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True),
        True,
    ),
    "trained tokens, tied": (lambda: peft.TrainableTokensConfig(token_indices=TOKENS, **TASK), True),
    "prefix tuning": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK), False),
}
KINDS = USUAL | RARER
OFTEN = ["LoRA on all linear layers", "DoRA", "LoRA, output embedding trained"]
PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, **TASK),
}
LONGER = "the model's outputs are longer than its inputs"


def cases(column: str, *names: str, slow: Any = ()) -> list[Any]:
    """Kinds as parameters, each with its line of docs/compatibility.md."""

    def made(name: str, *marks: Any) -> Any:
        plain = name.split(",")[0]
        line = "LoRA" if plain.startswith("LoRA") else plain
        return pytest.param(name, marks=[pytest.mark.compat(line, column), *marks])

    return [made(name) for name in names] + [made(name, pytest.mark.slow) for name in slow if name not in names]


def make_hf_peft(folder: Path, rows: Any, *, model: Any, peft_config: PeftConfig, **changes: Any) -> Trainer:
    """HF Trainer takes a model that has its adapter already."""
    return make_hf(folder, rows, model=peft.get_peft_model(model, peft_config), **changes)


def orthogonality(model: Any) -> torch.Tensor:
    """What AdaLoRA adds to the model's loss: half the mean of |P P^T - I| over its factors."""
    named = list(model.named_parameters())
    factors = [p for name, p in named if "lora_A" in name] + [p.T for name, p in named if "lora_B" in name]
    return 0.5 * torch.stack([(p @ p.T - torch.eye(len(p))).pow(2).sum().sqrt() for p in factors]).mean()


class Orthogonal:
    """A term that no row owns is nobody's to weigh: it counts once, whatever the weights."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, *args, **kwargs) + orthogonality(model)  # pyright: ignore[reportAttributeAccessIssue]


class AdaLoRAinHF(Orthogonal, ExplicitHF):
    pass


class AdaLoRAinSFT(Orthogonal, ExplicitSFT):
    pass


def close(kind: str) -> float:
    """AdaLoRA has a gradient of 4 numbers in which large terms cancel."""
    return 1e-4 if kind == "AdaLoRA" else CLOSE


def options(kind: str) -> dict[str, Any]:
    made, tied = HF_ONLY.get(kind) or (KINDS[kind], False)
    return {"peft_config": made(), "tied": tied}


# gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases("sft", *OFTEN, "IA3", slow=KINDS))
def test_sft_gradients_are_those_of_the_weighted_loss(kind: str, tmp_path: Path) -> None:
    changes, explicit = options(kind), ExplicitSFT
    if kind == "AdaLoRA":  # only the model's own loss has its term, and TRL's fused head passes that by
        changes, explicit = changes | {"cls": InModelSFT}, AdaLoRAinSFT
    assert difference(make_sft, explicit, SFTTrainer, tmp_path, changes) < close(kind)


@pytest.mark.parametrize("kind", cases("hf", *OFTEN, "VeRA", "AdaLoRA", slow=[*KINDS, *HF_ONLY]))
def test_hf_gradients_are_those_of_the_weighted_loss(kind: str, tmp_path: Path) -> None:
    explicit = AdaLoRAinHF if kind == "AdaLoRA" else ExplicitHF
    assert difference(make_hf_peft, explicit, Trainer, tmp_path, options(kind)) < close(kind)


@pytest.mark.parametrize("kind", ["IA3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OFTEN)])
def test_a_gate_that_does_nothing_is_caught(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    right = safe_sched.training.gate.token_weights
    monkeypatch.setattr(
        "safe_sched.training.forward.token_weights", lambda w, layout: torch.ones_like(right(w, layout))
    )
    assert difference(make_hf_peft, ExplicitHF, Trainer, tmp_path, options(kind)) > FAR


# equal weights, and the probe -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases("sft", "DoRA", slow=KINDS))
def test_equal_weights_leave_sft_training_untouched(kind: str, tmp_path: Path) -> None:
    def run(callbacks: list[Any]) -> Any:
        return train(make_sft, SFTTrainer, tmp_path, callbacks, options(kind) | {"max_steps": 6})

    assert_same_run(run([SafeSchedCallback(Fixed())]), run([]))


@pytest.mark.parametrize("kind", cases("hf", "IA3", slow=[*KINDS, *HF_ONLY]))
def test_equal_weights_leave_hf_training_untouched(kind: str, tmp_path: Path) -> None:
    def run(callbacks: list[Any]) -> Any:
        return train(make_hf_peft, Trainer, tmp_path, callbacks, options(kind) | {"max_steps": 6})

    assert_same_run(run([SafeSchedCallback(Fixed())]), run([]))


@pytest.mark.parametrize("kind", cases("hf", "DoRA", slow=[*KINDS, *HF_ONLY]))
def test_measuring_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    """The probe of BDS moves what the adapter trains, and brings it back bit for bit."""
    learned: list[torch.Tensor] = []

    class Silent(BDS):
        """Measures like BDS and learns nothing, so every weight stays 1."""

        def learn(self, state: Any, need: str, slots: torch.Tensor, values: torch.Tensor) -> dict[str, float]:
            learned.append(values.clone())
            return {}

    def run(scheduler: Any) -> Any:
        ours = SafeSchedCallback(scheduler, safety_data=SAFETY, safety_batch_size=2)
        return train(make_hf_peft, Trainer, tmp_path, [ours], options(kind) | {"max_steps": 6})

    assert_same_run(run(Silent()), run(Fixed()))
    assert float(torch.cat(learned).abs().max()) > 0  # else nothing was moved


# refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_sft, make_hf_peft], ids=["sft", "hf"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.compat(kind, "refused", reason=LONGER)) for kind in PROMPTS]
)
def test_tokens_put_before_the_rows_are_refused_by_name(kind: str, make: Any, tmp_path: Path) -> None:
    """Before the first optimiser step, and nothing of ours is left on the model."""
    model = make_model()
    trainer = make(
        tmp_path, ROWS, model=model, callbacks=[SafeSchedCallback(Fixed())], peft_config=PROMPTS[kind](), max_steps=2
    )
    with pytest.raises(ModelError, match="Prompt tuning"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert hooks_on(trainer.model) == 0


# on a quantized model ---------------------------------------------------------------------------------------------

BITS: dict[str, dict[str, Any]] = {
    "QLoRA (4 bits)": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "LoRA on 8 bits": {"load_in_8bit": True},
}
ON_BITS = [
    pytest.param(bits, *trainer, marks=[pytest.mark.compat(bits, column), pytest.mark.slow], id=f"{column}, {bits}")
    for bits in BITS
    for column, trainer in {
        "sft": (make_sft, SFTTrainer, ExplicitSFT),
        "hf": (make_hf_peft, Trainer, ExplicitHF),
    }.items()
]


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[[str], Any]:
    """The tiny model with its linear layers quantized by bitsandbytes, where that is installed."""
    pytest.importorskip("bitsandbytes")

    def load(bits: str) -> Any:
        make_model().save_pretrained(tmp_path / "model")
        settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **BITS[bits])
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
        )
        assert type(model.get_submodule("model.layers.0.mlp.up_proj")).__module__.startswith("bitsandbytes")
        return model

    return load


@pytest.mark.filterwarnings("ignore")  # bitsandbytes tells of the machine
@pytest.mark.parametrize(("bits", "make", "plain", "explicit"), ON_BITS)
def test_gradients_on_a_quantized_model_are_those_of_the_weighted_loss(
    bits: str, make: Any, plain: type, explicit: type, quantized: Any, tmp_path: Path
) -> None:
    def run(cls: type, callbacks: list[Any]) -> list[Any]:
        probe = GradientProbe()
        torch.manual_seed(5)
        model, callbacks = quantized(bits), [*callbacks, probe]
        trainer = make(tmp_path, ROWS, model=model, callbacks=callbacks, peft_config=lora(), **STEPS)
        trainer.__class__ = cls
        with single_thread():
            trainer.train()
        return probe.gradients

    found, wanted = run(plain, [SafeSchedCallback(fixed_weights())]), run(explicit, [])
    even = run(plain, [SafeSchedCallback(Fixed())])
    assert len(found) == len(wanted) == 2
    assert max(largest_difference(a, b) for a, b in zip(found, wanted, strict=True)) < CLOSE
    assert min(largest_difference(a, b) for a, b in zip(even, wanted, strict=True)) > FAR  # negative control


@pytest.mark.slow
@pytest.mark.compat("QLoRA (4 bits)", "trl")
@pytest.mark.filterwarnings("ignore")
def test_qlora_from_a_yaml_is_that_of_a_script(home: Path, tmp_path: Path) -> None:
    """Bit for bit. Controls: neither the run with equal weights nor that on the model as it was."""
    pytest.importorskip("bitsandbytes")
    block = {"method": {"name": "fixed", "values": uneven_weights(20)}}
    found = trl_cli.run(home, tmp_path / "ours", block, **trl_cli.LORA, load_in_4bit=True)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    bits = {"quantization_config": settings}

    def script(name: str, weights: Any, **more: Any) -> dict[str, torch.Tensor]:
        adapter = peft.LoraConfig(lora_dropout=0.05, **trl_cli.PEFT)
        return trl_cli.script(home, tmp_path / name, SafeSchedCallback(Fixed(weights)), peft=adapter, **more)

    assert trl_cli.same(found, script("script", uneven_weights(20), model_init_kwargs=bits))
    assert not trl_cli.same(found, script("even", None, model_init_kwargs=bits))
    assert not trl_cli.same(found, script("whole", uneven_weights(20)))
    assert verify(tmp_path / "ours", data=home / "data" / "train.jsonl").defended
