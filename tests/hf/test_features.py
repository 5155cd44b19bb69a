"""Features of rows: pooled hidden states, a sentence encoder's vectors, scores of rows that were never trained on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from safe_sched import BDS, Fixed, NeuralBDS
from safe_sched.errors import DataError, ModelError, OptionError
from safe_sched.estimators.head import Head, Scorer
from safe_sched.rows.keys import Layout, batch_fields, layout_of
from safe_sched.schedulers.neural import NeuralState
from safe_sched.training.loop import measurements_for
from safe_sched.training.session import Batch
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.measure.features import (
    EncoderFeatures,
    EncoderMeasurement,
    HiddenStateMeasurement,
    pool_rows,
    score_rows,
)
from tests.hf.test_gradients import lora
from tests.support import (
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    parameters_of,
    single_thread,
    text_rows,
    token_rows,
)

TOKENIZER = make_tokenizer()
ROWS = token_rows(7, seed=2)


def padded(side: str) -> tuple[Tensor, Tensor, Layout]:
    longest = max(len(row["input_ids"]) for row in ROWS)
    ids, labels, mask = (torch.full((7, longest), value) for value in (0, -100, 0))
    for line, row in enumerate(ROWS):
        n = len(row["input_ids"])
        at = slice(0, n) if side == "right" else slice(longest - n, longest)
        ids[line, at], labels[line, at], mask[line, at] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
    return batch_fields({"input_ids": ids, "labels": labels, "attention_mask": mask})


def packed(lines: int) -> tuple[Tensor, Tensor, Layout]:
    """Rows end to end, on one line as padding-free collators make them, or on several with padding behind."""
    per_line = [ROWS[i::lines] for i in range(lines)]
    longest = max(sum(len(row["input_ids"]) for row in group) for group in per_line)
    ids, labels, mask, positions = (torch.full((lines, longest), value) for value in (0, -100, 0, 0))
    for line, group in enumerate(per_line):
        at = 0
        for row in group:
            n = len(row["input_ids"])
            ids[line, at : at + n] = torch.tensor(row["input_ids"])
            labels[line, at : at + n] = torch.tensor(row["labels"])
            positions[line, at : at + n], mask[line, at : at + n] = torch.arange(n), 1
            at += n
    fields = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return batch_fields(fields | ({"attention_mask": mask} if lines > 1 else {}))


def slow_pool(hidden: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """Row by row and token by token, from the equation in the module's docstring."""
    rows = []
    for row in range(layout.rows):
        at = [tuple(place) for place in (layout.row == row).nonzero().tolist()]
        answer = [i for i, place in enumerate(at) if i > 0 and labels[place] != -100]
        if not answer:
            rows.append(torch.zeros(2 * hidden.shape[-1]))
            continue
        mean = sum(hidden[at[i]].double() for i in answer) / len(answer)
        rows.append(torch.cat([torch.as_tensor(mean).float(), hidden[at[answer[0] - 1]].float()]))
    return torch.stack(rows)


BATCHES = {
    "padded right": lambda: padded("right"),
    "padded left": lambda: padded("left"),
    "padding-free": lambda: packed(1),
    "packed, padded": lambda: packed(2),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_rows_are_those_of_a_slow_loop(batch: str, dtype: torch.dtype) -> None:
    ids, labels, layout = BATCHES[batch]()
    hidden = torch.randn(*ids.shape, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = pool_rows(hidden, labels, layout)
    assert found.shape == (layout.rows, 10)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, slow_pool(hidden.detach(), labels, layout))
    # control: the last token of the row is not the last of its prompt
    assert not torch.allclose(found[:, 5:], slow_pool(hidden.detach(), ids, layout)[:, 5:])


def test_a_row_has_the_same_features_in_every_layout() -> None:
    """With hidden states that are a function of token and place, as a model's are of the row."""
    table = torch.randn(64, 16, 5, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, make in BATCHES.items():
        ids, labels, layout = make()
        features = pool_rows(table[ids, layout.position.clamp(min=0)], labels, layout)
        found[name] = features[features[:, 0].argsort()]
    for features in found.values():
        torch.testing.assert_close(features, found["padded right"])


def test_a_row_without_labels_has_no_features_and_disturbs_no_other() -> None:
    ids, labels, layout = packed(1)
    hidden = torch.randn(*ids.shape, 3)
    before = pool_rows(hidden, labels, layout)
    labels = labels.masked_fill(layout.row == 3, -100)
    after = pool_rows(hidden, labels, layout)
    assert (after[3] == 0).all()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(after[others], before[others])


# encoders -------------------------------------------------------------------------------------------------------------


class Counting:
    """An encoder that is a function of the words, and counts its texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.texts += texts
        vectors = np.zeros((len(texts), 64))
        for line, text in enumerate(texts):
            for word in text.split():
                vectors[line, int(word[1:])] += 1
        return vectors


def test_every_row_is_encoded_once_by_its_text() -> None:
    """Token 5 is w0: vector entry i counts word w_i, token i + 5; padding and the second visit cost nothing."""
    encoder = Counting()
    features = EncoderFeatures(encoder, TOKENIZER, batch_size=3)
    ids, _, layout = padded("left")
    slots = torch.tensor([4, 0, -1, 9, 4, 2, 7])
    found = features(ids, layout, slots)
    assert found.dtype == torch.float32
    assert len(encoder.texts) == 5
    assert (found[2] == 0).all()
    for row in (0, 1, 3, 5, 6):
        if row == 0:
            continue  # shares its slot with row 4
        counts = torch.bincount(torch.tensor(ROWS[row]["input_ids"]) - 5, minlength=64).float()
        assert torch.equal(found[row], counts)
    assert torch.equal(found[0], found[4])
    assert torch.equal(features(ids, layout, slots), found)
    assert len(encoder.texts) == 5


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safe_sched_hf.measure.features._CACHED", 3)
    encoder = Counting()
    features = EncoderFeatures(encoder, TOKENIZER)
    ids, _, layout = padded("right")
    first = features(ids, layout, torch.arange(7))
    assert len(features._cache) == 3
    assert torch.equal(features(ids, layout, torch.arange(7)), first)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_an_encoder_from_a_folder_is_averaged_over_its_real_tokens(bert: Path) -> None:
    features = EncoderFeatures(bert, TOKENIZER)
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    found = features.of_texts(texts)
    model = BertModel.from_pretrained(bert).eval()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]])).last_hidden_state[0]
        torch.testing.assert_close(vector, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert features.of_texts(["w1 " * 100, ""]).shape == (2, 16)  # cut at what the model can read


def test_a_decoder_without_padding_can_be_an_encoder(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>", unk_token="<unk>")
    bare.save_pretrained(tmp_path)
    assert EncoderFeatures(tmp_path, TOKENIZER).of_texts(["w1 w2 w3", "w4"]).shape == (2, 32)


def test_an_encoder_that_cannot_be_used_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a callable from texts"):
        EncoderFeatures(tmp_path / "nothing", TOKENIZER)
    with pytest.raises(OptionError, match="there is no tokenizer"):
        EncoderFeatures(Counting(), None)
    with pytest.raises(ModelError, match=r"shape \(2,\) for 2 texts"):
        EncoderFeatures(lambda texts: [1.0] * len(texts), TOKENIZER).of_texts(["w1", "w2"])
    with pytest.raises(ModelError, match="one finite vector"):
        EncoderFeatures(lambda texts: [[float("nan")]], TOKENIZER).of_texts(["w1"])


def test_a_scheduler_gets_the_features_that_it_asks_for() -> None:
    ids, labels, layout = padded("right")
    hidden, slots = torch.randn(*ids.shape, 3), torch.arange(7)
    batch = Batch(ids, labels, layout, slots, torch.ones(7), torch.ones(7))

    def shown(state: Any) -> Any:
        return SimpleNamespace(hidden=state)

    assert [measured.name for measured in measurements_for(BDS())] == ["probe"]
    _, of_hidden = measurements_for(NeuralBDS())
    assert isinstance(of_hidden, HiddenStateMeasurement)
    assert torch.equal(of_hidden.after_forward(batch, shown(hidden)), pool_rows(hidden, labels, layout))
    _, of_text = measurements_for(NeuralBDS(features="encoder", encoder=Counting()))
    assert isinstance(of_text, EncoderMeasurement)
    of_text.begin(SimpleNamespace(tokenizer=TOKENIZER, device="cpu"))  # pyright: ignore[reportArgumentType]
    found = of_text.after_forward(batch, shown(None))
    assert found is not None
    assert found.shape == (7, 64)
    with pytest.raises(ModelError, match="this model shows none"):
        of_hidden.after_forward(batch, shown(None))
    with pytest.raises(ModelError, match=r"is of shape \(7, 2, 3\)"):
        of_hidden.after_forward(batch, shown(hidden[:, :2]))


# scores of rows -------------------------------------------------------------------------------------------------------


def scorer_of(width: int, features: Any = "hidden") -> Scorer:
    random = torch.Generator().manual_seed(3)
    phi = torch.randn(width + 1, 4, generator=random)
    return Scorer(Head("linear", width, 2.0), features, phi, torch.zeros(width), torch.ones(width), 10)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_scores_of_rows_are_those_of_their_features_one_by_one(batch_size: int) -> None:
    """Rows unpadded, one at a time, by the slow pool; the order of the rows is kept, the model is left as it was."""
    model, scorer = make_model().train(), scorer_of(64)
    found = score_rows(scorer, ROWS, model=model, batch_size=batch_size)
    assert model.training
    model.eval()
    for number, row in enumerate(ROWS):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state
        expected = scorer.score(slow_pool(hidden, labels, layout_of(ids)))
        for column, value in zip(found, expected, strict=True):
            torch.testing.assert_close(column[number], value[0], rtol=1e-4, atol=1e-5)
    assert found.p_harmful.std() > 0.01  # control: the scores do differ


def test_rows_of_any_schema_can_be_scored() -> None:
    """A pair and the token row that it becomes have one score; so has a conversation."""
    model, scorer = make_model(), scorer_of(64)
    pairs = [
        {"prompt": "w1 w2 w3", "completion": " w4 w5"},
        {"input_ids": [6, 7, 8, 9, 10, 1], "labels": [-100] * 3 + [9, 10, 1]},
    ]
    p = [float(score_rows(scorer, [row], model=model, tokenizer=TOKENIZER).p_harmful) for row in pairs]
    assert p[0] == pytest.approx(p[1], abs=1e-6)
    chat = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w4"}]}]
    assert score_rows(scorer, chat, model=model, tokenizer=TOKENIZER).p_harmful.shape == (1,)


def test_rows_are_scored_by_a_model_in_a_folder_and_by_a_peft_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, scorer = make_model(), scorer_of(64)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rows = text_rows(3)
    expected = score_rows(scorer, rows, model=model, tokenizer=TOKENIZER).p_harmful
    torch.testing.assert_close(score_rows(scorer, rows, model=tmp_path).p_harmful, expected)
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(score_rows(scorer, rows, model=adapted, tokenizer=TOKENIZER).p_harmful, expected)


def test_rows_are_scored_by_the_encoder() -> None:
    scorer = scorer_of(64, "encoder")
    rows = [{"prompt": "w1 w2", "completion": " w3"}, {"prompt": "w2 w1", "completion": " w3"}, {"text": "w9"}]
    p = score_rows(scorer, rows, tokenizer=TOKENIZER, encoder=Counting()).p_harmful
    assert p[0] == p[1]  # a bag of words
    assert p[0] != p[2]


@pytest.mark.parametrize(
    ("features", "options", "error", "match"),
    [
        ("hidden", {}, OptionError, r"give score_rows\(..., model="),
        ("encoder", {}, OptionError, r"give score_rows\(..., encoder="),
        ("hidden", {"model": make_model(hidden_size=16)}, DataError, r"\(1, 32\) for a head of width 64"),
        ("hidden", {"model": torch.nn.Linear(2, 2)}, ModelError, "Linear has no decoder"),
    ],
)
def test_what_is_missing_is_named(features: Any, options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        score_rows(scorer_of(64, features), ROWS[:1], tokenizer=TOKENIZER, **options)


def test_a_row_that_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match="^row 1 has the fields"):
        score_rows(scorer_of(64), [ROWS[0], {"question": "w1"}], model=make_model(), tokenizer=TOKENIZER)


# real trainers --------------------------------------------------------------------------------------------------------

TEXTS = text_rows(12, seed=5)


def trained(make: Any, folder: Path, scheduler: Any, **options: Any) -> Any:
    ours = SafeSchedCallback(scheduler, safety_data=text_rows(6, seed=8), safety_batch_size=2)
    rows = TEXTS if make is make_sft else token_rows(12, seed=5)
    trainer = make(folder, rows, callbacks=[ours], **({"max_steps": 6} | options))
    with single_thread():
        trainer.train()
    return trainer, ours


TRAINERS: dict[str, Any] = {
    "sft": (make_sft, {}),
    "sft, LoRA": (make_sft, {"peft_config": lora()}),
    "sft, accumulation": (make_sft, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "hf": (make_hf, {}),
}


@pytest.mark.parametrize("case", TRAINERS)
def test_a_trainer_shows_the_head_the_hidden_states_of_its_forward(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of the first micro-batch against a forward of the untrained model, row by row and unpadded."""
    make, options = TRAINERS[case]
    shown: list[tuple[Tensor, Tensor]] = []
    inner = NeuralBDS.weights

    def weights(self: NeuralBDS, state: NeuralState, batch: Any) -> Tensor:
        shown.append((batch.slots, batch["hidden_state"]))
        return inner(self, state, batch)

    monkeypatch.setattr(NeuralBDS, "weights", weights)
    trainer, ours = trained(make, tmp_path, NeuralBDS(), **options)
    state = ours.session.state
    assert isinstance(state, NeuralState)
    assert state.known.all()
    assert state.feature_mean.numel() == 64
    assert state.remembered.numel() == int((state.scored > 0).sum()) == 12

    model = make_model().eval()
    slots, features = shown[0]
    if "LoRA" in case:  # its adapters start from random numbers
        slots, features = slots[:0], features[:0]
    for slot, found in zip(slots.tolist(), features, strict=True):
        row = trainer.train_dataset[int((ours.session.index.row_slots == slot).nonzero()[0])]
        item = {name: row[name] for name in row if name in ("input_ids", "labels", "completion_mask")}
        ids, labels, layout = batch_fields(trainer.data_collator([item]))
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, slow_pool(hidden, labels, layout)[0], rtol=1e-3, atol=1e-4)
    scorer = ours.scorer()
    scorer.save(tmp_path / "scorer.safetensors")
    p = score_rows(Scorer.load(tmp_path / "scorer.safetensors"), TEXTS, model=trainer.model, tokenizer=TOKENIZER)
    assert torch.isfinite(p.p_harmful).all()


def test_a_head_without_evidence_leaves_training_as_it_was(tmp_path: Path) -> None:
    """Features are read and nothing is learned: all weights 1, and the parameters of equal weights, bit for bit."""
    head, _ = trained(make_sft, tmp_path, NeuralBDS(evidence=None))
    equal, _ = trained(make_sft, tmp_path, Fixed())
    a, b = parameters_of(head.model), parameters_of(equal.model)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_encoder_works_in_a_trainer(tmp_path: Path) -> None:
    encoder = Counting()
    _, ours = trained(make_sft, tmp_path, NeuralBDS(features="encoder", encoder=encoder), max_steps=9)
    assert len(encoder.texts) == 12  # three epochs, each row once
    assert ours.session.state.known.all()
    p = score_rows(ours.scorer(), TEXTS, tokenizer=TOKENIZER, encoder=encoder).p_harmful
    known = ours.table().column("head_log_odds")
    assert p.shape == (12,)
    assert len(known) == 12
