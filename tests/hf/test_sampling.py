"""Acting by sampling: what is left out costs nothing, and what is left teaches what the weighted loss would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from safe_sched import BDS, Antibody, BDSReleased, Fixed, NeuralBDS, combine
from safe_sched.errors import CoverageError, DataError, ModelError, OptionError, StateError
from safe_sched.training.sampling import FLOOR, uniform
from safe_sched_hf import Lisa, SafeSchedCallback
from safe_sched_hf.sampling import DrawnBatches
from tests.hf.test_untouched import Breaks, assert_same_run
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
    text_rows,
    token_rows,
    uneven_weights,
)

ROWS = token_rows(22, seed=2)
SEED = 3  # of the trainers of tests.support

PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "single rows": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "workers": {"dataloader_num_workers": 2},
    "group by length": {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
    "drop last": {"dataloader_drop_last": True, "gradient_accumulation_steps": 2},
}
SFT: dict[str, dict[str, Any]] = PLANS | {
    "packing": {"packing": True, "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
}
HF: dict[str, dict[str, Any]] = PLANS | {"rebalanced": {"train_sampling_strategy": "batch_rebalance"}}
EVERY = [
    *(pytest.param(make_sft, options, id=f"sft, {name}") for name, options in SFT.items()),
    *(pytest.param(make_hf, options, id=f"hf, {name}") for name, options in HF.items()),
]


def sampling(scheduler: Any = None, **options: Any) -> SafeSchedCallback:
    return SafeSchedCallback(Fixed() if scheduler is None else scheduler, act="sample", **options)


def train(make: Any, folder: Path, callbacks: Any, rows: Any = ROWS, resume: Any = None, **options: Any) -> Any:
    model = make_model(attention_dropout=options.pop("dropout", 0.1))
    trainer = make(folder, rows, model=model, callbacks=callbacks, **({"max_steps": 12} | options))
    torch.manual_seed(11)
    with single_thread():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


class Forwards(TrainerCallback):
    """Counts the rows and the forwards of training."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def count(module: Any, positional: Any, named: Any) -> None:
            if module.training and torch.is_grad_enabled():
                self.rows.append(len(named["input_ids"]))

        kwargs["model"].register_forward_pre_hook(count, with_kwargs=True)


# equal weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "options"), EVERY)
def test_equal_weights_leave_training_untouched(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Parameters after 12 steps over several epochs, and the trainer's record, are those of the plain run."""
    ours = train(make, tmp_path, [sampling()], **options)
    assert_same_run(ours, train(make, tmp_path, [], **options))
    assert ours.state.log_history[-2]["safe_sched/rows_kept"] == 1.0


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Negative control: one row of 22 that is sometimes left out shows."""
    ours = train(make_sft, tmp_path, [sampling(Fixed([0.5] + [1.0] * 21))])
    with pytest.raises(AssertionError):
        assert_same_run(ours, train(make_sft, tmp_path, []))


# what a step teaches ------------------------------------------------------------------------------------------------


def expected_gradient(model: Any, rows: Any, factors: list[float], total: int) -> dict[str, torch.Tensor]:
    """``1 / total sum_i f_i sum_t l_it``, by a loop over rows."""
    model.zero_grad()
    for row, factor in zip(rows, factors, strict=True):
        if factor:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            logits = model(input_ids=ids).logits
            loss = cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
            (factor * loss / total).backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def tokens_of(rows: Any) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def kept_of(weights: list[float], seed: int = SEED, epoch: int = 0) -> tuple[list[bool], list[float]]:
    p = [min(max(w, FLOOR), 1.0) for w in weights]
    u = uniform(seed, epoch, torch.arange(len(weights))).tolist()
    return [one < other for one, other in zip(u, p, strict=True)], p


SHAPES = [
    pytest.param({"per_device_train_batch_size": 12}, id="one micro-batch"),
    pytest.param({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, id="three"),
    pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12}, id="single rows"),
    pytest.param({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}, id="the last one is smaller"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalizer", ["token", "row"])
@pytest.mark.parametrize("make", [make_sft, make_hf])
def test_a_step_teaches_the_rows_kept_each_over_its_probability(
    make: Any, normalizer: Any, shape: dict[str, Any], tmp_path: Path
) -> None:
    """The slow loop: ``1/T sum over kept rows of w_i / p_i g_i`` with T the label tokens of all rows of the step."""
    rows, weights = ROWS[:12], [round(0.3 * i % 1.7, 2) for i in range(12)]
    probe, forwards = GradientProbe(), Forwards()
    train(
        make,
        tmp_path,
        [sampling(Fixed(weights), normalizer=normalizer), probe, forwards],
        rows,
        max_steps=1,
        max_grad_norm=0,
        dropout=0.0,
        train_sampling_strategy="sequential",
        **shape,
    )
    kept, p = kept_of(weights)
    assert 2 < sum(kept) < 10
    factors = [k * w / q for k, w, q in zip(kept, weights, p, strict=True)]
    total = tokens_of(rows)
    if normalizer == "row":
        factors = [f / tokens_of([row]) for f, row in zip(factors, rows, strict=True)]
        total = len(rows)
    assert largest_difference(probe.gradients[0], expected_gradient(make_model(), rows, factors, total)) < 1e-5
    # the rows kept fill as few micro-batches as they can, and nothing else is computed
    size = shape["per_device_train_batch_size"]
    assert sum(forwards.rows) == sum(kept)
    assert len(forwards.rows) == -(-sum(kept) // size)


def test_without_the_probability_it_would_show(tmp_path: Path) -> None:
    """Negative control: factors ``w`` instead of ``w / p``."""
    weights = [round(0.3 * i % 1.7, 2) for i in range(12)]
    probe = GradientProbe()
    train(
        make_hf,
        tmp_path,
        [sampling(Fixed(weights)), probe],
        ROWS[:12],
        max_steps=1,
        max_grad_norm=0,
        dropout=0.0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=12,
    )
    kept, _ = kept_of(weights)
    wrong = [k * w for k, w in zip(kept, weights, strict=True)]
    expected = expected_gradient(make_model(), ROWS[:12], wrong, tokens_of(ROWS[:12]))
    assert largest_difference(probe.gradients[0], expected) > 0.1


@pytest.mark.slow
def test_the_mean_over_seeds_is_the_gradient_of_the_weighted_loss(tmp_path: Path) -> None:
    """A z-test of every coordinate over 60 seeds. Twelve rows are behind all of them: the mean of z**2 is about 1."""
    weights = [round(0.2 + 0.06 * i, 2) for i in range(12)]
    options: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_grad_norm": 0, "dropout": 0.0}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 1}

    def gradient(callback: SafeSchedCallback) -> torch.Tensor:
        probe = GradientProbe()
        train(make_hf, tmp_path, [callback, probe], ROWS[:12], **options)
        return torch.cat([g.flatten() for g in probe.gradients[0].values()]).double()

    expected = gradient(SafeSchedCallback(Fixed(weights)))
    found = torch.stack([gradient(sampling(Fixed(weights), seed=seed)) for seed in range(60)])

    def scores(sample: torch.Tensor) -> torch.Tensor:
        return (sample.mean(0) - expected) / (sample.std(0) / len(sample) ** 0.5 + 1e-9)

    z = scores(found)
    assert float(z.square().mean()) < 2
    assert float(scores(found * 1.3).square().mean()) > 2  # negative control


def test_a_micro_batch_without_a_common_mean_counts_by_itself(tmp_path: Path) -> None:
    """A trainer whose loss is a mean over each micro-batch: the weighted loss is a mean of those means."""
    rows, weights = ROWS[:12], [round(0.3 * i % 1.7, 2) for i in range(12)]
    probe = GradientProbe()
    trainer = make_hf(
        tmp_path,
        rows,
        model=make_model(),
        callbacks=[sampling(Fixed(weights)), probe],
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=3,
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    kept, p = kept_of(weights)
    parts = []
    for start in (0, 4, 8):
        some = slice(start, start + 4)
        factors = [k * w / q for k, w, q in list(zip(kept, weights, p, strict=True))[some]]
        parts.append(expected_gradient(make_model(), rows[some], factors, 3 * tokens_of(rows[some])))
    expected = {name: sum(part[name] for part in parts if name in part) for name in parts[0] | parts[1] | parts[2]}
    assert largest_difference(probe.gradients[0], expected) < 1e-5  # pyright: ignore[reportArgumentType]


def test_a_step_of_which_nothing_is_kept_teaches_nothing(tmp_path: Path) -> None:
    """Weights of 0: one row of the step is run with the factor 0, and the parameters stay."""
    forwards = Forwards()
    trainer = train(
        make_sft, tmp_path, [sampling(Fixed([0.0] * 22)), forwards], weight_decay=0.0, gradient_accumulation_steps=2
    )
    before = parameters_of(make_model(attention_dropout=0.1))
    assert all(torch.equal(before[name], value) for name, value in parameters_of(trainer.model).items())
    assert len(forwards.rows) >= 12
    assert sum(forwards.rows) < 40  # of 88


def test_rows_of_weight_nought_come_by_now_and_then(tmp_path: Path) -> None:
    """They are kept with probability ``FLOOR``, so that a scheduler can change its mind; 4.5 standard deviations."""
    callback = sampling(Fixed([0.0] * 11 + [1.0] * 11))
    train(make_hf, tmp_path, [callback], max_steps=-1, num_train_epochs=25, learning_rate=1e-4, logging_steps=100)
    seen = torch.tensor(callback.table().column("seen").to_pylist())
    assert (seen[11:] == 25).all()
    mean, deviation = 275 * FLOOR, (275 * FLOOR * (1 - FLOOR)) ** 0.5
    assert abs(int(seen[:11].sum()) - mean) < 4.5 * deviation


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}])
def test_rows_that_lie_side_by_side_keep_their_own_factors(options: dict[str, Any], tmp_path: Path) -> None:
    """A packed line comes as often as the row in it that may teach most; its rows are told from each other."""
    first, again = sampling(), GradientProbe()
    shared: dict[str, Any] = {"max_grad_norm": 0, "dropout": 0.0, "train_sampling_strategy": "sequential"}
    shared |= {"max_steps": 1, "per_device_train_batch_size": 32} | options
    train(make_sft, tmp_path, [first], **shared)
    keys = first.table().column("key").to_pylist()
    weights = [round(0.3 * i % 0.9, 2) for i in range(len(keys))]
    ours = sampling(Fixed(weights, keys=keys), seed=1)
    trainer = train(make_sft, tmp_path, [ours, again], **shared)
    # by loop over the lines, as the set holds them
    lines = trainer.train_dataset
    by_length: dict[tuple[int, ...], float] = {}
    rows_of: list[list[dict[str, Any]]] = []
    place = 0
    for line in lines:
        lengths = line.get("seq_lengths") or [len(line["input_ids"])]
        start, rows = 0, []
        for length in lengths:
            piece = {name: list(line[name][start : start + length]) for name in ("input_ids", "labels")}
            rows.append(piece)
            by_length[tuple(piece["input_ids"])] = weights[place]
            start, place = start + length, place + 1
        rows_of.append(rows)
    assert place == len(weights)
    p = [max(max(by_length[tuple(r["input_ids"])] for r in rows), FLOOR) for rows in rows_of]
    u = uniform(1, 0, torch.arange(len(rows_of))).tolist()
    flat, factors = [], []
    for rows, q, one in zip(rows_of, p, u, strict=True):
        for row in rows:
            flat.append(row)
            factors.append((one < q) * by_length[tuple(row["input_ids"])] / q)
    assert any(f == 0 for f in factors)
    assert sum(f > 0 for f in factors) > 3
    expected = expected_gradient(make_model(), flat, factors, tokens_of(flat))
    assert largest_difference(again.gradients[0], expected) < 1e-5


# resuming -----------------------------------------------------------------------------------------------------------


def learner(**options: Any) -> SafeSchedCallback:
    scheduler = BDSReleased(transform="sigmoid", initial_logit=-1.0, learning_rate=0.3)
    return sampling(scheduler, safety_data=text_rows(6, seed=8), safety_batch_size=2, **options)


def test_fresh_draws_at_a_resume_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the steps that were drawn ahead are drawn anew, with the weights of the checkpoint."""
    from safe_sched.training.sampling import Draws

    options = {"dataloader_num_workers": 2, "save_strategy": "steps", "save_steps": 1}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = train(make_sft, tmp_path / "whole", [learner()], **options)

    def forget(self: Draws, tensors: Any) -> None:
        restore(self, tensors)
        self._saved.clear()

    restore = Draws.restore
    monkeypatch.setattr(Draws, "restore", forget)
    again = train(make_sft, tmp_path, [learner()], resume=tmp_path / "whole" / "checkpoint-8", **options)
    a, b = parameters_of(trainer.model), parameters_of(again.model)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_resume_that_does_not_fit_stops(tmp_path: Path) -> None:
    """Another way to act, another seed, another order: an error that names it."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "per_device_train_batch_size": 2}
    train(make_hf, tmp_path, [sampling()], **options)
    saved = tmp_path / "checkpoint-2"
    more = options | {"max_steps": 3, "save_strategy": "no"}

    def resume(callback: SafeSchedCallback, **changes: Any) -> None:
        train(make_hf, tmp_path, [callback], resume=saved, **(more | changes))

    with pytest.raises(StateError, match="act: saved 'sample', now 'weight'"):
        resume(SafeSchedCallback(Fixed()))
    with pytest.raises(StateError, match="sample_seed: saved 3, now 4"):
        resume(sampling(seed=4))
    with pytest.raises(StateError, match="in another order than the saved run did"):
        resume(sampling(), train_sampling_strategy="sequential")
    resume(sampling(), ignore_data_skip=True)
    resume(sampling())


def test_a_resume_from_weighting_stops(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(make_hf, tmp_path, [SafeSchedCallback(Fixed())], **options)
    with pytest.raises(StateError, match="act: saved 'weight', now 'sample'"):
        train(make_hf, tmp_path, [sampling()], resume=tmp_path / "checkpoint-2", max_steps=3)


# schedulers -----------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Any] = {
    "bds": BDS,
    "bds, released": BDSReleased,
    "neural": NeuralBDS,
    "antibody": lambda: Antibody(on_inversion="ignore", refusals=("w1 w2", "w3 w4")),
    "antibody, softmax": lambda: Antibody(
        on_inversion="ignore", refusals=("w1 w2", "w3 w4"), gate="softmax", ratio="token_mean"
    ),
    "combined": lambda: combine(BDS(), Antibody(on_inversion="ignore", refusals=("w1 w2", "w3 w4"))),
}


@pytest.mark.parametrize("name", [*SCHEDULERS, "fixed, lisa", "bds, lisa"])
def test_every_scheduler_can_be_sampled_by(name: str, tmp_path: Path) -> None:
    method = name.removesuffix(", lisa")
    parts = [Lisa(safe_steps=2, user_steps=3)] if name.endswith("lisa") else []
    scheduler = Fixed() if method == "fixed" else SCHEDULERS[method]()
    ours = sampling(scheduler, parts=parts, safety_data=text_rows(6, seed=8), safety_batch_size=2)
    trainer = train(make_sft, tmp_path, [ours], gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert ours.session.steps == 12
    table = ours.table()
    assert 22 <= sum(table.column("seen").to_pylist()) <= 44  # the first of two epochs is drawn while nothing is known
    assert trainer.state.log_history[0]["safe_sched/rows_kept"] == 1.0 or "softmax" in name or "released" in name


# nothing is left behind ---------------------------------------------------------------------------------------------


class Loader(TrainerCallback):
    """Keeps the loader of the run."""

    loader: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loader = kwargs["train_dataloader"]


@pytest.mark.parametrize("first", [True, False])
def test_the_loader_has_its_own_sampler_again_after_training(first: bool, tmp_path: Path) -> None:
    kept = Loader()
    callbacks = [sampling(Fixed([0.5] * 22)), kept]
    trainer = train(make_hf, tmp_path, callbacks if first else callbacks[::-1])
    assert kept.loader is not None
    assert not isinstance(kept.loader.batch_sampler, DrawnBatches)
    assert sorted(i for batch in kept.loader.batch_sampler for i in batch) == list(range(22))
    assert "training_step" not in vars(trainer)


@pytest.mark.parametrize("event", ["on_step_begin", "on_log"])
def test_a_loader_that_outlives_a_crash_is_whole(event: str, tmp_path: Path) -> None:
    """Nobody tells a callback of the failure; the sampler knows that its ``train()`` is over all the same."""
    kept, ours = Loader(), sampling(Fixed([0.0] * 22))
    model = make_model()
    trainer = make_hf(tmp_path, ROWS, model=model, callbacks=[ours, kept, Breaks(event, RuntimeError)], max_steps=8)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    loader = kept.loader
    assert hooks_on(model) == 0
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, Breaks)]
    trainer.remove_callback(ours)
    trainer.get_train_dataloader = lambda: loader
    forwards = Forwards()
    trainer.add_callback(forwards)
    trainer.train()
    assert sum(forwards.rows) == 22 + 2 * 4


def test_evaluation_sees_every_row(tmp_path: Path) -> None:
    """With weights of 0 nothing is learned, and the evaluation is that of the model it began with."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": ROWS[:9], "max_steps": 4, "weight_decay": 0.0}
    ours = train(make_hf, tmp_path, [sampling(Fixed([0.0] * 22))], dropout=0.0, **options)
    plain = train(make_hf, tmp_path, [], dropout=0.0, **(options | {"learning_rate": 0.0}))
    pick = lambda run: [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]  # noqa: E731
    assert len(pick(ours)) == 2
    assert pick(ours) == pick(plain)


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    ours = sampling(Fixed(uneven_weights(22)))
    trainer = train(make_hf, tmp_path, [ours], max_steps=3)
    trainer.train()
    assert ours.session.steps == 3


# refused --------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_sampled_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    with pytest.raises(OptionError, match="act='sampel'; allowed: 'weight', 'sample'"):
        SafeSchedCallback(Fixed(), act="sampel")  # pyright: ignore[reportArgumentType]

    trainer = make_hf(tmp_path, ROWS, callbacks=[sampling()])
    trainer.train_dataset = Dataset.from_list(ROWS).to_iterable_dataset()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DataError, match="this one is a stream"):
        trainer.train()
    with pytest.raises(ModelError, match="dataloader_in_order=True"):
        train(make_hf, tmp_path, [sampling()], dataloader_in_order=False, dataloader_num_workers=1)


def test_a_collator_that_changes_the_order_of_rows_stops_the_run(tmp_path: Path) -> None:
    class Reversing(DataCollatorForSeq2Seq):
        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            return super().__call__(list(features)[::-1], return_tensors)

    with pytest.raises(CoverageError, match="holds other rows than were drawn for it"):
        train(make_hf, tmp_path, [sampling()], data_collator=Reversing(make_tokenizer()))
