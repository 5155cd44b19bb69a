"""Real runs of Axolotl on the CPU, in one process: they train as the callback does in a plain trainer."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

pytest.importorskip("axolotl")

from safe_sched.errors import DataError, OptionError
from safe_sched.schedulers import Fixed
from safe_sched.training.manifest import verify
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.rows import keys_of_tokens
from tests.axolotl import runs
from tests.axolotl.runs import LORA, PACKED, Run, config, defended, train, weights_by_tokens
from tests.support import (
    largest_difference,
    make_model,
    make_tokenizer,
    parameters_of,
    single_thread,
)

# Axolotl and what it brings warn of much; none of it is ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")

UNEVEN = {"name": "fixed", "column": "weight"}
EVALUATED = {"val_set_size": 4, "eval_steps": 1}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "LoRA": LORA, "packed": PACKED, "evaluated": EVALUATED}
EQUAL = "equal weights: the untouched run, bit for bit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axolotl")


@pytest.fixture(autouse=True)
def exact() -> Any:
    with single_thread():
        yield


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def by_key(run: Run) -> Fixed:
    """The weights of the file, tied to the rows that Axolotl trains on."""
    weights = weights_by_tokens(run)
    rows = [row for row in run.trainer.train_dataset if tuple(row["input_ids"]) in weights]
    keys, _ = keys_of_tokens(Dataset.from_dict({name: [r[name] for r in rows] for name in ("input_ids", "labels")}))
    return Fixed([weights[tuple(row["input_ids"])] for row in rows], keys=keys)


def in_hf_trainer(run: Run, scheduler: Any, safety: Any, model: Any = None) -> dict[str, torch.Tensor]:
    """The same training by `transformers.Trainer` and the callback, from the same tokens in the same order."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    args = run.trainer.args
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_steps", "seed")
    names += ("lr_scheduler_type", "optim", "max_grad_norm", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    names += ("warmup_steps", "logging_steps", "num_train_epochs")
    settings = {name: getattr(args, name) for name in names}
    tokenizer = make_tokenizer()
    trainer = Trainer(
        model=make_model(attn_implementation="eager") if model is None else model,
        args=TrainingArguments(
            output_dir=f"{args.output_dir}-hf",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=run.trainer.train_dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64),
        processing_class=tokenizer,
        callbacks=[SafeSchedCallback(scheduler, safety_data=safety)],
    )
    # Axolotl 0.19 divides an accumulated step by micro-batches, not by tokens
    trainer.model_accepts_loss_kwargs = run.trainer.model_accepts_loss_kwargs
    trainer.train()
    return parameters_of(trainer.model)


# equal weights --------------------------------------------------------------------------------------------------


@pytest.mark.compat(EQUAL, "axolotl")
@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        pytest.param("LoRA", marks=[pytest.mark.slow, pytest.mark.compat("LoRA", "axolotl")]),
        pytest.param("packed", marks=[pytest.mark.slow, pytest.mark.compat("packing", "axolotl")]),
        pytest.param(
            "evaluated", marks=[pytest.mark.slow, pytest.mark.compat("evaluation during training", "axolotl")]
        ),
    ],
)
def test_equal_weights_leave_axolotl_untouched(folder: Path, kind: str) -> None:
    plain = train(config(folder, **KINDS[kind]))
    ours = train(config(folder, **KINDS[kind], **defended(method="fixed")))
    assert plain.callback is None
    assert ours.callback is not None
    assert equal(ours.parameters, plain.parameters)
    assert ours.losses == plain.losses


def test_uneven_weights_do_not(folder: Path) -> None:
    """The negative control of the law above: without it a plugin that does nothing would pass."""
    even = train(config(folder, **defended(method="fixed")))
    uneven = train(config(folder, **defended(method=UNEVEN)))
    assert largest_difference(uneven.parameters, even.parameters) > 1e-3


# the callback's training ----------------------------------------------------------------------------------------


@pytest.mark.compat("full fine-tuning", "axolotl")
@pytest.mark.compat("gradient accumulation", "axolotl")
@pytest.mark.parametrize("method", ["fixed", pytest.param("bds", marks=pytest.mark.slow)])
def test_full_training_is_that_of_the_callback(folder: Path, method: str) -> None:
    safety = [{"path": str(folder / "safety.jsonl"), "type": "alpaca"}]
    chosen: Any = UNEVEN if method == "fixed" else "bds"
    run = train(config(folder, gradient_accumulation_steps=2, **defended(method=chosen, safety_data=safety)))
    rows = run.callback.safety_data
    expected = in_hf_trainer(run, by_key(run) if method == "fixed" else "bds", rows)
    assert largest_difference(run.parameters, expected) < 1e-6


@pytest.mark.compat("LoRA", "axolotl")
def test_lora_is_that_of_the_callback(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    run = train(config(folder, **LORA, **defended(method=UNEVEN)))
    model = get_peft_model(
        make_model(attn_implementation="eager"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    model.load_state_dict(run.first)
    expected = in_hf_trainer(run, by_key(run), None, model)
    assert largest_difference(run.parameters, expected) < 1e-6


@pytest.mark.compat("packing", "axolotl")
@pytest.mark.slow
@pytest.mark.slow_sample
def test_packed_gradients_are_those_of_the_slow_loop(folder: Path) -> None:
    """The gradient of an optimiser step is that of sum over tokens of (weight of its row) * nll / label tokens."""
    settings = config(folder, **PACKED, max_steps=1, max_grad_norm=1e9, **defended(method=UNEVEN))
    run = train(settings)
    (batch,) = run.batches
    weights = weights_by_tokens(run)
    nll, tokens, rows = torch.zeros(()), 0, 0
    slow = make_model()
    for line in range(batch["input_ids"].shape[0]):
        starts = (batch["position_ids"][line] == 0).nonzero().flatten().tolist()
        for start, end in itertools.pairwise([*starts, batch["input_ids"].shape[1]]):
            ids, labels = (batch[name][line : line + 1, start:end] for name in ("input_ids", "labels"))
            if not bool((labels != -100).any()):
                continue  # padding
            real = int((labels != -100).nonzero()[-1, 1]) + 1
            ids, labels = ids[:, :real], labels[:, :real]
            logits = slow(input_ids=ids).logits[0, :-1]
            own = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
            nll = nll + weights[tuple(ids[0].tolist())] * own
            tokens, rows = tokens + int((labels[0, 1:] != -100).sum()), rows + 1
    assert rows > batch["input_ids"].shape[0]  # else nothing is packed
    (nll / tokens).backward()
    expected = {name: parameter.grad for name, parameter in slow.named_parameters() if parameter.grad is not None}
    assert largest_difference(run.gradients[0], expected) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="plain"),
        pytest.param(PACKED, id="packed", marks=pytest.mark.slow),
        pytest.param({"excess_length_strategy": "truncate", "sequence_len": 40}, id="cut", marks=pytest.mark.slow),
    ],
)
def test_every_row_has_the_weight_of_its_column(folder: Path, more: dict[str, Any]) -> None:
    run = train(config(folder, max_steps=1, **more, **defended(method=UNEVEN)))
    expected, table = by_key(run), run.callback.table()
    given = {key % 2**64: weight for key, weight in zip(expected.keys.tolist(), expected.values, strict=True)}
    found = dict(zip(table["key"].to_pylist(), table["weight"].to_pylist(), strict=True))
    assert found == {key: pytest.approx(weight) for key, weight in given.items()}
    assert len(set(found.values())) > 8


@pytest.mark.slow
def test_so_it_is_with_chats_in_two_data_sets(folder: Path, tmp_path: Path) -> None:
    rows = [{**chat, "weight": row["weight"]} for chat, row in zip(runs.chats(), runs.weighted_rows(), strict=True)]
    paths = [runs.write_rows(tmp_path / f"{i}.jsonl", part) for i, part in enumerate((rows[:5], rows[5:]))]
    sets = [{"path": path, "type": "chat_template"} for path in paths]
    run = train(config(folder, datasets=sets, max_steps=1, **defended(method=UNEVEN)))
    weights = weights_by_tokens(run)
    assert run.callback.table()["weight"].to_pylist() == pytest.approx(
        [weights[tuple(row["input_ids"])] for row in run.trainer.train_dataset]
    )


def test_a_weight_that_is_missing_stops_the_run(folder: Path, tmp_path: Path) -> None:
    rows = runs.weighted_rows()
    rows[3] = {**rows[3], "weight": None}
    path = runs.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="datasets.0: row 3 has no number in the column 'weight'"):
        train(config(folder, datasets=[{"path": path, "type": "alpaca"}], max_steps=1, **defended(method=UNEVEN)))


# what is left ---------------------------------------------------------------------------------------------------


def test_the_manifest_vouches_for_the_saved_model(folder: Path) -> None:
    out = folder / "vouched"
    block = defended(method=UNEVEN, safety_data=str(folder / "train.jsonl"))
    run = train(config(folder, output_dir=str(out), save_strategy="steps", save_steps=2, **block))
    verdict = verify(out, data=folder / "train.jsonl")
    assert verdict.defended, verdict
    answers = {check.name: check.ok for check in verdict.checks}
    assert answers["model files"]
    assert answers["data"]
    assert answers["checkpoints"]
    assert verify(out, data=folder / "safety.jsonl").defended is False
    assert run.callback.table().num_rows == 16
    # an undefended run into the same folder is seen
    train(config(folder, output_dir=str(out), max_steps=1))
    assert not verify(out).defended


@pytest.mark.compat("save and resume, bit for bit", "axolotl")
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    settings = config(folder, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "out"))
    settings |= defended(method="bds", safety_data=str(folder / "train.jsonl"))
    whole = train(settings)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    half = train({**settings, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")})
    assert equal(half.parameters, whole.parameters)
    assert half.callback.table().equals(whole.callback.table())
    assert verify(tmp_path / "out").defended


# data -----------------------------------------------------------------------------------------------------------


def test_safety_rows_take_the_format_of_the_training_set(folder: Path) -> None:
    """Safety rows with the texts of training rows become the tokens of these rows, prompts masked."""
    rows = [
        {"prompt": row["instruction"], "completion": row["output"]} for row in runs.alpaca_rows()
    ]  # of no schema of Axolotl's
    path = runs.write_rows(folder / "as-prompts.jsonl", rows)
    run = train(config(folder, max_steps=1, train_on_inputs=True, **defended(safety_data=path)))
    found = sorted((row["input_ids"], row["labels"]) for row in run.callback.safety_data)
    plain = train(config(folder, max_steps=1))
    assert found == sorted((row["input_ids"], row["labels"]) for row in plain.trainer.train_dataset)


@pytest.mark.compat("conversations", "axolotl")
@pytest.mark.slow
def test_chats_are_written_by_the_template(folder: Path) -> None:
    turns = [
        [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}]
        for row in runs.alpaca_rows()
    ]
    path = runs.write_rows(folder / "chats.jsonl", [{"conversations": one} for one in turns])
    chat = {
        "path": path,
        "type": "chat_template",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    }
    prompts = [{"prompt": row["instruction"], "completion": row["output"]} for row in runs.alpaca_rows()]
    safety = runs.write_rows(folder / "prompts.jsonl", prompts)
    run = train(config(folder, datasets=[chat], max_steps=1, **defended(safety_data=safety)))
    found = sorted((row["input_ids"], row["labels"]) for row in run.callback.safety_data)
    assert found == sorted((row["input_ids"], row["labels"]) for row in run.trainer.train_dataset)


@pytest.mark.compat("rows mixed in", "axolotl")
def test_safety_rows_are_mixed_into_the_training_set(folder: Path) -> None:
    plain = train(config(folder, max_steps=1))
    block = defended(method="fixed", safety_data=str(folder / "train.jsonl"), mix={"share": 0.2, "mimic": False})
    run = train(config(folder, max_steps=1, **block))
    rows = [row["input_ids"] for row in run.trainer.train_dataset]
    assert len(rows) == 20  # 4 of 20 are a fifth
    for row in plain.trainer.train_dataset:
        rows.remove(row["input_ids"])
    assert len(rows) == 4
    manifest = verify(folder / "out", data=folder / "train.jsonl")
    assert manifest.defended, manifest


@pytest.mark.slow
def test_another_plugin_may_stand_beside(folder: Path) -> None:
    block = defended(method=UNEVEN)
    alone = train(config(folder, **block))
    block["plugins"] = ["tests.axolotl.other.Other", *block["plugins"]]
    beside = train(config(folder, **block))
    assert equal(beside.parameters, alone.parameters)
    assert any(type(c).__name__ == "Seen" for c in beside.trainer.callback_handler.callbacks)


@pytest.mark.slow
def test_the_configuration_of_the_page_trains(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("train.jsonl", 0), ("refusals.jsonl", 9)):
        runs.write_rows(tmp_path / name, runs.chats(36, seed))
    small = config(folder, **LORA) | {"sequence_len": 128}  # longer rows are left out by Axolotl
    kept = ("base_model", "sequence_len", "dataset_num_proc", "attn_implementation", "bf16", "tf32", "max_steps")
    kept += tuple(name for name in LORA if name.endswith("_kernel"))
    run = train(runs.page_config() | {name: small[name] for name in kept})
    assert len(run.trainer.train_dataset) == 40  # 4 of 40 are mixed in
    assert len(run.callback.safety_data) == 36
    verdict = verify(tmp_path / "out")
    assert verdict.defended, verdict


ANTIBODY = {"name": "antibody", "on_inversion": "fallback"}  # the tiny model refuses nothing
METHODS: dict[str, dict[str, Any]] = {
    "neural_bds": {"method": "neural_bds"},
    "antibody": {"method": ANTIBODY},
    "lisa": {"method": {"name": "lisa", "user_steps": 2, "safe_steps": 1, "scheduler": "bds"}},
    "combined": {"method": {"name": "combined", "parts": ["bds", ANTIBODY]}},
    "sampled": {"method": "bds", "act": "sample"},
    "by row": {"method": "bds", "normalizer": "row", "model_temperature": 0.01, "safety_batch_size": 2, "seed": 5},
}


LINES = {"lisa": "`Lisa`", "sampled": '`act="sample"`', "neural_bds": "`NeuralBDS`: features from hidden states"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.compat(LINES[kind], "axolotl")] if kind in LINES else [])
        for kind in METHODS
    ],
)
def test_every_method_trains_here_too(folder: Path, tmp_path: Path, kind: str) -> None:
    block = defended(**METHODS[kind], safety_data=str(folder / "safety.jsonl"))
    run = train(config(folder, output_dir=str(tmp_path / "out"), **block))
    assert run.callback.table().num_rows == 16
    verdict = verify(tmp_path / "out")
    assert verdict.defended, verdict


@pytest.mark.slow
@pytest.mark.compat("streamed training sets", "axolotl")
def test_a_stream_is_defended(folder: Path, tmp_path: Path) -> None:
    block = defended(method="bds", safety_data=str(folder / "safety.jsonl"))
    run = train(config(folder, output_dir=str(tmp_path / "out"), streaming=True, **block))
    assert run.trainer.state.global_step == 4
    verdict = verify(tmp_path / "out")
    assert verdict.defended, verdict


@pytest.mark.parametrize("block", [{"plugins": [runs.PLUGIN]}, defended(method="bsd"), defended(method="bds")])
def test_axolotl_stops_where_a_block_is_missing_or_not_allowed(folder: Path, block: dict[str, Any]) -> None:
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    with pytest.raises(OptionError, match="safe_sched"):
        load_cfg(DictDefault(config(folder, **block)))
    load_cfg(DictDefault(config(folder)))  # the plugin is loaded still, and lets others alone
