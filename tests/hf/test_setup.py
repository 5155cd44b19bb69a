"""What is found at the start of training: the rows, and everything that cannot be defended."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from safe_sched import BDSReleased, Fixed
from safe_sched.errors import CoverageError, DataError, ModelError, NumericsError, OptionError
from safe_sched.rows.index import RowIndex
from safe_sched.training.checkpoint import MANIFEST_FILE
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf import rows as rows_module
from safe_sched_hf.rows import index_rows
from tests.hf.test_gradients import FusedLossLlama, InModelSFT
from tests.support import make_hf, make_model, make_sft, make_tokenizer, text_rows, token_rows, uneven_weights

ROWS = token_rows(24, seed=2)
TOKENIZER = make_tokenizer()


# the key table ------------------------------------------------------------------------------------------------------


def both_ways(dataset: Any, collate: Any) -> tuple[RowIndex, RowIndex]:
    """The index by columns, and the index by the collator alone."""
    fast = index_rows(dataset, collate)
    found = rows_module._from_columns
    try:
        rows_module._from_columns = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
        return fast, index_rows(dataset, collate)
    finally:
        rows_module._from_columns = found


@pytest.mark.parametrize(
    "options", [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 24}], ids=str
)
def test_columns_and_collator_give_the_same_keys(options: Any, tmp_path: Any, monkeypatch: Any) -> None:
    trainer = make_sft(tmp_path, ROWS, **options)
    monkeypatch.setattr(rows_module, "_CHUNK", 50)
    fast, slow = both_ways(trainer.train_dataset, trainer.data_collator)
    assert fast.row_slots is not None
    assert fast.keys.equal(slow.keys)
    assert fast.row_slots.equal(slow.row_slots)  # pyright: ignore[reportArgumentType]
    assert fast.rows == 24


def test_a_collator_that_makes_its_own_labels_is_asked_for_every_row() -> None:
    """The collator labels every token but the padding's, the columns say otherwise: the collator is right."""
    dataset = Dataset.from_list(ROWS)
    collate = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    unlabelled = dataset.remove_columns("labels")
    found = index_rows(dataset.remove_columns("labels"), collate)
    assert found.keys.equal(
        index_rows(unlabelled.map(lambda row: {"labels": row["input_ids"]}), DataCollatorForSeq2Seq(TOKENIZER)).keys
    )
    assert not found.keys.equal(index_rows(dataset, DataCollatorForSeq2Seq(TOKENIZER)).keys)


def test_a_plain_list_of_rows_is_a_training_set() -> None:
    assert index_rows(ROWS, DataCollatorForSeq2Seq(TOKENIZER)).keys.equal(
        index_rows(Dataset.from_list(ROWS), DataCollatorForSeq2Seq(TOKENIZER)).keys
    )


def test_a_collator_that_cannot_pad_gets_one_row_at_a_time() -> None:
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ROWS]
    assert index_rows(rows, default_data_collator).keys.equal(index_rows(ROWS, DataCollatorForSeq2Seq(TOKENIZER)).keys)


# what is refused ----------------------------------------------------------------------------------------------------


def test_an_empty_training_set_is_an_error(tmp_path: Any) -> None:
    with pytest.raises(DataError, match="the training set has no rows"):
        index_rows([], None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="the training set has no rows"):
        make_hf(tmp_path, [], callbacks=[SafeSchedCallback(Fixed())])


@pytest.mark.parametrize("make", [make_hf])
def test_rows_without_label_tokens_are_named_before_the_first_step(make: Any, tmp_path: Any) -> None:
    rows = [dict(row) for row in ROWS]
    for i in (3, 17):
        rows[i]["labels"] = [-100] * len(rows[i]["input_ids"])
    trainer = make(tmp_path, rows, callbacks=[SafeSchedCallback(Fixed())])
    with pytest.raises(
        DataError, match=r"2 of 24 training rows have no label token.*\(rows \[3, 17\]\).*raise max_length"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_row_that_changes_at_run_time_stops_the_run(tmp_path: Any) -> None:
    class Masking(DataCollatorForSeq2Seq):
        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            batch = super().__call__(features, return_tensors)
            if torch.rand(()) < 0.5:
                batch["input_ids"][0, 1] = 5 + int(torch.randint(50, ()))
            return batch

    trainer = make_hf(
        tmp_path, ROWS, callbacks=[SafeSchedCallback(Fixed())], data_collator=Masking(TOKENIZER), max_steps=20
    )
    with pytest.raises(CoverageError, match="rows in a batch of step .* are not among the 24 rows .* at run time"):
        trainer.train()


def test_batches_without_labels_are_an_error(tmp_path: Any) -> None:
    from transformers import DataCollatorWithPadding

    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    trainer = make_hf(
        tmp_path, rows, callbacks=[SafeSchedCallback(Fixed())], data_collator=DataCollatorWithPadding(TOKENIZER)
    )
    with pytest.raises(DataError, match="needed: input_ids and labels.*DataCollatorForLanguageModeling"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("scheduler", [BDSReleased(), Fixed()], ids=["bds", "fixed"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_rows(scheduler: Any, tmp_path: Any) -> None:
    model = make_model()
    trainer = make_sft(tmp_path, ROWS, model=model, callbacks=[SafeSchedCallback(scheduler)], max_steps=4)
    with torch.no_grad():
        model.model.embed_tokens.weight[5 : 5 + 40] = float("nan")
    with pytest.raises(
        NumericsError, match=r"the loss of \d+ rows is not finite at step 0 \(training rows \[.*Lower the learning rate"
    ):
        trainer.train()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_safety_loss_that_is_not_finite_stops_the_run(tmp_path: Any) -> None:
    model = make_model()
    trainer = make_sft(
        tmp_path,
        ROWS,
        model=model,
        callbacks=[SafeSchedCallback(BDSReleased(), safety_data=token_rows(4, seed=9))],
    )
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="the safety loss is nan at step 0"):
        trainer.train()


def test_a_fused_loss_with_a_trainable_head_is_refused(tmp_path: Any) -> None:
    trainer = make_hf(tmp_path, ROWS, model=make_model(cls=FusedLossLlama), callbacks=[SafeSchedCallback(Fixed())])
    with pytest.raises(ModelError, match="fused with its output embedding .* being trained.*loss_type='nll'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_fused_loss_is_refused_where_row_losses_are_needed(tmp_path: Any) -> None:
    model = make_model(cls=FusedLossLlama)
    model.lm_head.weight.requires_grad_(False)
    trainer = make_hf(tmp_path, ROWS, model=model, callbacks=[SafeSchedCallback(BDSReleased())])
    with pytest.raises(ModelError, match="row is never computed, and 'bds_released' needs it"):
        trainer.train()


@pytest.mark.skipif(SFTConfig(use_cpu=True, bf16=False).loss_type != "chunked_nll", reason="TRL has its fused head")
def test_the_default_loss_of_older_trl_is_refused_with_its_name(tmp_path: Any) -> None:
    """TRL 1.9's default never shows logits; the remedy in the message is one word in SFTConfig."""
    trainer = make_sft(tmp_path, ROWS, callbacks=[SafeSchedCallback(Fixed())], loss_type="chunked_nll")
    with pytest.raises(ModelError, match="loss_type='nll' in SFTConfig"):
        trainer.train()


def test_an_unknown_output_is_refused(tmp_path: Any) -> None:
    class Odd(type(make_model())):
        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            return {"loss": self.model.embed_tokens(input_ids).sum()}

    trainer = make_hf(tmp_path, ROWS, model=make_model(cls=Odd), callbacks=[SafeSchedCallback(Fixed())])
    with pytest.raises(ModelError, match=r"Odd returned \['loss'\], from which the loss of a row cannot be told"):
        trainer.train()


def test_a_loss_that_bypasses_the_gate_stops_the_run(tmp_path: Any) -> None:
    """The trainer takes its loss from another tensor than the one the gate is on: found when the step ends."""

    class Bypassing(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            model(**inputs, fused_lm_head=True)
            return model.model.norm.weight.sum()

    trainer = make_sft(tmp_path, ROWS, callbacks=[SafeSchedCallback(Fixed())])
    trainer.__class__ = Bypassing
    with pytest.raises(
        CoverageError, match=r"micro-batches \[0\] of 1 in step 0 were trained on without passing the gate"
    ):
        trainer.train()


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Any) -> None:
    model = make_model(cls=FusedLossLlama)
    trainer = make_hf(tmp_path, ROWS, model=model, callbacks=[SafeSchedCallback(Fixed())])
    model.requires_grad_(False)
    with pytest.raises((ModelError, RuntimeError)):
        trainer.train()


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"safety_date": "core"}, "unknown option of SafeSchedCallback 'safety_date' .did you mean 'safety_data'"),
        (
            {"scheduler": "bsd"},
            "unknown scheduler 'bsd' .did you mean 'bds'.*allowed: 'antibody', 'bds', 'bds_released', 'fixed'",
        ),
        ({"scheduler": 3}, "3 is not a scheduler"),
        ({"safety_batch_size": 0}, "safety_batch_size=0; allowed"),
        ({"safety_weight": -1.0}, "safety_weight=-1.0; allowed"),
        ({"safety_weight": float("nan")}, "safety_weight=nan; allowed"),
        ({"normalizer": "rows"}, "normalizer='rows'; allowed: 'token', 'row'"),
    ],
)
def test_a_bad_option_is_refused_when_the_callback_is_made(option: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        SafeSchedCallback(**option)


def test_the_wrong_number_of_weights_is_an_error(tmp_path: Any) -> None:
    trainer = make_sft(tmp_path, ROWS, callbacks=[SafeSchedCallback(Fixed([1.0] * 23))])
    with pytest.raises(DataError, match="23 weights for a training set of 24 rows"):
        trainer.train()


def test_torch_compile_is_refused_while_the_script_sets_up(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="does not support torch_compile=True yet"):
        make_hf(tmp_path, ROWS, callbacks=[SafeSchedCallback(Fixed())], torch_compile=True)


def test_the_callback_without_a_trainer_says_so() -> None:
    with pytest.raises(ModelError, match="not a transformers.Trainer with this callback"):
        SafeSchedCallback(Fixed()).on_init_end(None, None, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="call trainer.train"):
        SafeSchedCallback(Fixed()).table()


# what comes out -----------------------------------------------------------------------------------------------------


class Tracker(TrainerCallback):
    """Stands for a tracker: comes before user callbacks in the trainer's list, and keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.records.append(dict(logs))


@pytest.mark.parametrize("make", [make_sft, make_hf])
def test_our_numbers_reach_the_history_and_the_trackers(make: Any, tmp_path: Any) -> None:
    """Averages since the last record: after steps 1-2 and 3-4, with weights known beforehand."""
    tracker = Tracker()
    weights = uneven_weights(24)
    trainer = make(
        tmp_path,
        ROWS,
        callbacks=[tracker, SafeSchedCallback(Fixed(weights), safety_data=ROWS[:4])],
        max_steps=4,
        logging_steps=2,
    )
    trainer.train()
    names = {f"safe_sched/{name}" for name in ("weight_mean", "weight_min", "weight_max", "ess", "safety_loss")}
    for record, log in zip(tracker.records[:2], trainer.state.log_history[:2], strict=True):
        assert names <= record.keys()
        assert all(record[name] == log[name] for name in names)
        assert log["safe_sched/ess"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights), rel=1e-5)
    assert not names & trainer.state.log_history[-1].keys()  # the closing summary is the trainer's own


def test_the_table_and_the_manifest_say_what_happened(tmp_path: Any) -> None:
    ours = SafeSchedCallback(Fixed(uneven_weights(24)), safety_data="core", safety_batch_size=2)
    trainer = make_sft(tmp_path, ROWS, callbacks=[ours], num_train_epochs=2, max_steps=-1)
    trainer.train()
    table = ours.table()
    assert table.column_names == ["row", "key", "weight", "seen"]
    assert table["row"].to_pylist() == list(range(24))
    assert table["weight"].to_pylist() == pytest.approx(uneven_weights(24))
    assert table["seen"].to_pylist() == [2] * 24
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert manifest["defended"] is True
    assert manifest["coverage"] == {"steps": 12, "rows_trained_on": 48, "rows_weighed": 48, "trainer_steps": 12}
    assert manifest["data"]["rows"] == manifest["data"]["distinct_rows_trained_on"] == 24
    assert manifest["scheduler"]["name"] == "fixed"
    assert manifest["safety"]["batch_size"] == 2


def test_a_run_that_fails_leaves_a_manifest_that_says_so(tmp_path: Any) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("on purpose")

    trainer = make_sft(tmp_path, ROWS, callbacks=[SafeSchedCallback(Fixed()), Stops()])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert (manifest["status"], manifest["defended"]) == ("running", False)


def test_a_stream_is_defended_row_by_row(tmp_path: Any) -> None:
    """A streamed set: rows get their places as they come; the table lists those seen."""
    ours = SafeSchedCallback(BDSReleased(learning_rate=0.1))
    trainer = make_sft(tmp_path, ROWS, callbacks=[ours], max_steps=9)
    trainer.train_dataset = IterableDataset.from_generator(lambda: iter(ROWS))
    trainer.train()
    assert ours.session.index.streaming
    assert ours.table().num_rows == 24
    assert sum(ours.table()["seen"].to_pylist()) == 36
    assert float(ours.session.row_weights().mean()) == pytest.approx(1, rel=1e-4)


def test_duplicates_share_one_weight(tmp_path: Any) -> None:
    rows = [*ROWS, ROWS[0], ROWS[0]]
    ours = SafeSchedCallback(BDSReleased(learning_rate=0.1))
    trainer = make_sft(tmp_path, rows, callbacks=[ours], max_steps=-1, num_train_epochs=1)
    trainer.train()
    table = ours.table().to_pydict()
    assert table["weight"][0] == table["weight"][24] == table["weight"][25]
    assert table["seen"][0] == 3
    assert sum(table["weight"]) / 26 == pytest.approx(1, rel=1e-4)


def test_conversations_are_trained_and_told_apart(tmp_path: Any) -> None:
    """`messages` rows, the schema of the demo, with the loss on the assistant's turns only."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in text_rows(12)
    ]
    ours = SafeSchedCallback(BDSReleased(), safety_data="core")
    trainer = make_sft(tmp_path, rows, callbacks=[ours], max_steps=3, assistant_only_loss=True)
    trainer.train()
    assert ours.table().num_rows == 12


def test_two_trainers_in_one_process_do_not_meet(tmp_path: Any) -> None:
    one, two = SafeSchedCallback(Fixed()), SafeSchedCallback(Fixed())
    first = make_sft(tmp_path / "a", ROWS, callbacks=[one], max_steps=2)
    second = make_hf(tmp_path / "b", ROWS[:12], callbacks=[two], max_steps=3)
    first.train()
    second.train()
    assert (one.session.steps, two.session.steps) == (2, 3)
    assert (one.table().num_rows, two.table().num_rows) == (24, 12)


@pytest.mark.parametrize("cls", [SFTTrainer, InModelSFT])
def test_bds_sees_the_losses_of_the_rows(cls: type, tmp_path: Any) -> None:
    """The loss that the released rule learns from is the row's own, however the trainer computes it."""
    model = make_model()
    seen: dict[int, float] = {}

    class Spy(BDSReleased):
        def update(self, state: Any, step: Any) -> Any:
            seen.update(zip(step.slots.tolist(), step["nll"].tolist(), strict=True))
            return super().update(state, step)

    ours = SafeSchedCallback(Spy())
    trainer = make_sft(tmp_path, ROWS, model=model, callbacks=[ours], max_steps=6, learning_rate=0.0)
    trainer.__class__ = cls
    trainer.train()
    index = ours.session.index
    assert index.row_slots is not None
    assert isinstance(trainer, Trainer)
    for number, row in enumerate(trainer.train_dataset):  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert seen[int(index.row_slots[number])] == pytest.approx(float(expected), rel=1e-4)
