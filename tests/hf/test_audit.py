"""The model signals of an audit: the numbers are those of a loop over rows, whatever runs together."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from safe_sched.audit import Detector
from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.errors import DataError, ModelError, OptionError, StateError
from safe_sched.estimators.head import Head, Scorer
from safe_sched.estimators.probe import GAIN
from safe_sched.hooks import AuditRequest, detectors
from safe_sched_hf.audit import AntibodyRatio, Probe, Propensity, Surprise, model_detectors
from safe_sched_hf.audit import model as audit_model
from safe_sched_hf.audit import probe as audit_probe
from safe_sched_hf.audit import scorer as audit_scorer
from safe_sched_hf.audit import trust as audit_trust
from safe_sched_hf.audit.model import AlignedModel
from safe_sched_hf.audit.numbers import Measures
from safe_sched_hf.audit.refusals import Refusals
from safe_sched_hf.audit.scorer import SavedScorer
from safe_sched_hf.measure import forward as audit_forward
from safe_sched_hf.measure.features import score_rows
from safe_sched_hf.measure.forward import Forwards, Line, bucketed
from safe_sched_hf.measure.token_rows import TokenRow
from tests.support import VOCABULARY, hooks_on, make_model, make_sft, make_tokenizer, parameters_of, text_rows

REFUSALS = ("w1 w2 w3 w4", "w1 w2 w5", "w6", "w7 w8 w9 w10 w11")
SAFETY = [
    {"prompt": row["prompt"], "completion": REFUSALS[i // 2 % len(REFUSALS)]}
    for i, row in enumerate(text_rows(20, seed=9))
]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


MIXED: list[dict[str, Any]] = [
    *text_rows(12, seed=1),
    {"prompt": "w3 w4", "completion": "w1 w2 w3 w20 w21"},  # a refusal that goes on
    {"prompt": "w3 w4", "completion": "w6"},
    {"prompt": "w5", "completion": ""},
    {"instruction": "w1 w2", "input": "w3", "output": "w4 w5", "system": "w9"},
    {"messages": [turn("user", "w1"), turn("assistant", "w2 w3"), turn("user", "w4 w5"), turn("assistant", "w6 w7")]},
    {"conversations": [{"from": "human", "value": "w8 w9"}, {"from": "gpt", "value": "w1 w2 w5 w30"}]},
    {"prompt": [turn("user", "w11 w12 w13")], "completion": [turn("assistant", "w14 w15")]},
    {"text": "w20 w21 w22"},
]


def audited(rows: Sequence[dict[str, Any]]) -> list[AuditRow]:
    return [audit_row(row, number) for number, row in enumerate(rows)]


@pytest.fixture(autouse=True, scope="module")
def _any_model_will_do() -> Iterator[None]:
    """Random models refuse next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_trust, "_REFUSES", 0.0)
        patch.setattr(audit_trust, "_TELLS", 0.0)
        yield


def asked(model: Any = None, *, template: bool = True, probe: bool = True, **options: Any) -> AlignedModel:
    tokenizer = make_tokenizer()
    if not template:
        tokenizer.chat_template = None
    found = AlignedModel(AuditRequest(SAFETY, "a model", **options), probe=probe)
    found.take(make_model() if model is None else model, tokenizer)
    return found


def assert_same(found: Measures, expected: Measures, tolerance: float = 1e-4) -> None:
    for name in ("propensity", "antibody", "surprise", "probe"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=tolerance, rtol=0, err_msg=name)
    assert (found.refuses == expected.refuses).all()


# the slow loop ------------------------------------------------------------------------------------------------------


def turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """A row of MIXED as a chat, written down by hand."""
    if "text" in row:
        return [turn("user", row["text"])]
    if "instruction" in row:
        asked = f"{row['instruction']}\n\n{row['input']}"
        return [turn("system", row["system"]), turn("user", asked), turn("assistant", row["output"])]
    if "conversations" in row:
        return [turn({"human": "user", "gpt": "assistant"}[t["from"]], t["value"]) for t in row["conversations"]]
    if "messages" in row:
        return row["messages"]
    if isinstance(row["prompt"], list):
        return [*row["prompt"], *row["completion"]]
    return [turn("user", row["prompt"]), turn("assistant", row["completion"])]


@torch.no_grad()
def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """Of every token but the first, alone in its batch."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1)


def slow(asked: AlignedModel, model: Any, moved: Any, rows: Sequence[dict[str, Any]]) -> Measures:
    """Row by row and refusal by refusal, from the definitions."""
    tokenizer, end = asked.tokenizer, asked.tokenizer.eos_token_id

    def ids(some: Sequence[dict[str, str]], *, ask: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(list(some), add_generation_prompt=ask, return_dict=True)["input_ids"]

    columns: list[list[float]] = []
    refusing = []
    for row in rows:
        chat = turns(row)
        answers = [i for i, t in enumerate(chat) if t["role"] == "assistant"]
        spans = [(len(ids(chat[:i], ask=True)), len(ids(chat[: i + 1]))) for i in answers]
        whole = ids(chat, ask=not spans)
        refused, against, nll, rose, any_refusal = [], [], [], [], False
        for start, stop in spans or [(len(whole), len(whole))]:
            p = 0.0
            for opening in asked.refusals.openings:
                line = log_probs(model, [*whole[:start], *opening])
                p += float(np.exp(sum(float(line[start - 1 + i, token]) for i, token in enumerate(opening))))
            odds = float(np.log(p) - np.log1p(-p))
            refused.append(odds)
            against.append(odds)
            said = whole[start:stop]
            if said:
                before, after = log_probs(model, whole), log_probs(moved, whole)
                nll += [-float(before[start - 1 + i, token]) for i, token in enumerate(said)]
                fell = before - after
                rose += [float(fell[start - 1 + i, token]) / GAIN for i, token in enumerate(said)]
                if any(tuple(said[: len(opening)]) == opening for opening in asked.refusals.known):
                    any_refusal = True
                    stops = said.index(end) if end in said else len(said)
                    ends = [float(before[start - 1 + i, end].exp()) for i in range(1, stops)]
                    against[-1] = max([-odds, *(float(np.log(e) - np.log1p(-e)) for e in ends)])
        columns.append([max(refused), max(against), np.mean(nll) if nll else np.nan, max(rose) if rose else np.nan])
        refusing.append(any_refusal)
    values = np.array(columns, np.float32).T
    return Measures(*values, np.array(refusing), np.ones(len(rows), bool), [None] * len(rows))


def stepped(asked: AlignedModel, model: Any, prompts: Sequence[str]) -> Any:
    """A copy of the model, one step up the log-odds of refusing, by autograd on one prompt at a time."""
    copied = copy.deepcopy(model).requires_grad_(True)
    first = sorted({opening[0] for opening in asked.refusals.openings})
    for prompt in prompts:
        ids = asked.tokenizer.apply_chat_template(
            [turn("user", prompt)], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        p = copied(input_ids=ids).logits[0, -1].softmax(-1)[first].sum()
        ((p.log() - torch.log1p(-p)) / len(prompts)).backward()
    square = sum(float(p.grad.square().sum()) for p in copied.parameters() if p.grad is not None)
    with torch.no_grad():
        for p in copied.parameters():
            if p.grad is not None:
                p += GAIN / square * p.grad
    return copied


@pytest.fixture(scope="module")
def expected() -> Measures:
    model, found = make_model(), asked()
    found.prepare()
    moved = stepped(found, model, [row["prompt"] for row in SAFETY[::2]])
    return slow(found, model, moved, MIXED)


def test_the_numbers_are_those_of_a_loop_over_rows_and_refusals(expected: Measures) -> None:
    found = asked().measure(audited(MIXED))
    assert_same(found, expected)
    assert found.problems == [None] * len(MIXED)
    assert found.refuses.sum() == 3
    assert len({round(float(v), 3) for v in found.probe if not np.isnan(v)}) > 1


def test_a_refusal_that_saw_the_answer_would_have_other_numbers(monkeypatch: Any, expected: Measures) -> None:
    """The control of the test before: the same with nodes that see the whole row."""
    real = audit_forward.lay_out

    def leaky(*given: Any) -> Any:
        laid = real(*given)
        if laid.seen is not None:
            laid.seen[:, 0] |= laid.real[:, None, :] & (laid.positions[:, :, None] > 0)
        return laid

    monkeypatch.setattr(audit_forward, "lay_out", leaky)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(Refusals, "_can_share", lambda *_: True)
        found = asked().measure(audited(MIXED))
    assert np.nanmax(np.abs(found.propensity - expected.propensity)) > 1e-2


@pytest.mark.parametrize("budget", [1, 24, 10_000])
def test_company_and_order_do_not_matter(budget: int) -> None:
    together = asked().measure(audited(MIXED))
    model = asked()
    model.prepare()
    model.forwards.budget = budget
    order = np.random.default_rng(budget).permutation(len(MIXED))
    rows = audited(MIXED)
    parts = [model.measure([rows[i] for i in order[start : start + 7]]) for start in range(0, len(order), 7)]
    names = ("propensity", "antibody", "surprise", "probe", "refuses", "whole")
    back = np.argsort(order)
    columns = [np.concatenate([getattr(part, name) for part in parts])[back] for name in names]
    joined = Measures(*columns, [None] * len(rows))
    assert_same(joined, together)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_has_the_same_numbers(attention: str, expected: Measures) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    assert_same(asked(model).measure(audited(MIXED)), expected)


def test_refusals_on_lines_of_their_own_have_the_same_numbers(monkeypatch: Any, expected: Measures) -> None:
    monkeypatch.setattr(Forwards, "read", _without_branches(Forwards.read))
    with pytest.warns(UserWarning, match="cannot share a prompt in this model"):
        found = asked().measure(audited(MIXED))
    assert_same(found, expected)


def _without_branches(read: Any) -> Any:
    def only_plain(self: Any, lines: Any, branches: Any = None) -> Any:
        if branches is not None:
            raise NotImplementedError("no mask of yours")
        return read(self, lines)

    return only_plain


def test_a_head_that_scales_its_logits_is_read_as_it_is() -> None:
    class Scaled(type(make_model())):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 3 * output.logits
            return output

    model = make_model(cls=Scaled)
    found = asked(model, probe=False)
    rows = audited(MIXED[:6])
    values = found.measure(rows)
    alone = slow(found, model, model, MIXED[:6])
    np.testing.assert_allclose(values.surprise, alone.surprise, atol=1e-4)
    np.testing.assert_allclose(values.propensity, alone.propensity, atol=1e-4)


def test_the_model_stays_as_it_was() -> None:
    model = make_model()
    before = parameters_of(model)
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    asked(model).measure(audited(MIXED))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storages
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert hooks_on(model) == 0


def test_another_process_gets_the_same_numbers(tmp_path: Path) -> None:
    save(tmp_path)
    signals = model_detectors(AuditRequest(SAFETY, str(tmp_path)))
    rows = audited(MIXED)
    copied = pickle.loads(pickle.dumps(signals))
    for one, other in zip(signals, copied, strict=True):
        np.testing.assert_array_equal(one.score(rows).value, other.score(rows).value)


def test_a_copy_decides_nothing_for_itself(tmp_path: Path, monkeypatch: Any) -> None:
    """Else two processes, of which one rounds otherwise or has less memory, would score rows by different rules."""
    save(tmp_path)
    first = AlignedModel(AuditRequest(SAFETY, str(tmp_path)))
    whole = first.measure(audited(MIXED))
    copied = pickle.dumps(first)
    monkeypatch.setattr(audit_trust, "_REFUSES", 1.0)
    monkeypatch.setattr(audit_trust, "_OVER", -1.0)
    assert_same(pickle.loads(copied).measure(audited(MIXED)), whole, 0)
    with pytest.warns(UserWarning, match="refuses 0% of the safety prompts"):  # the control: asked first, it would
        assert np.isnan(AlignedModel(first.request).measure(audited(MIXED)).antibody).all()
    monkeypatch.setattr(audit_model, "towards_refusing", lambda *_: None)
    with pytest.raises(ModelError, match="this process has no probe, and the first one has"):
        pickle.loads(copied).measure(audited(MIXED))


def test_bfloat16_is_near() -> None:
    exact = asked(probe=False).measure(audited(MIXED))
    rough = asked(make_model().bfloat16(), probe=False).measure(audited(MIXED))
    np.testing.assert_allclose(rough.surprise, exact.surprise, atol=0.2)
    np.testing.assert_allclose(rough.propensity, exact.propensity, atol=1.0)
    assert not np.array_equal(rough.surprise, exact.surprise, equal_nan=True)


def test_half_precision_is_near() -> None:
    model = asked(probe=False)
    exact = model.measure(audited(MIXED))
    model._last, model.forwards.half = None, True
    rough = model.measure(audited(MIXED))
    np.testing.assert_allclose(rough.surprise, exact.surprise, atol=0.2)
    assert not np.array_equal(rough.surprise, exact.surprise, equal_nan=True)


def test_rows_beyond_a_sliding_window_get_lines_of_their_own() -> None:
    """A mask of ours replaces the model's own: where its window is shorter than a row, they would not be the same."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**(make_model().config.to_dict() | {"sliding_window": 16, "head_dim": 8})))
    found = asked(model, probe=False)
    rows = [{"prompt": " ".join(["w1"] * 24), "completion": "w3"}, {"prompt": "w1", "completion": "w3"}]
    found.prepare()
    alone = slow(found, model, model, rows)
    np.testing.assert_allclose(found.measure(audited(rows)).propensity, alone.propensity, atol=1e-4)
    found.refusals._window, found._last = 2**31, None  # the control
    assert abs(found.measure(audited(rows)).propensity[0] - alone.propensity[0]) > 1e-3


# rows as tokens -----------------------------------------------------------------------------------------------------


def test_a_row_has_the_tokens_that_training_would_see(tmp_path: Path) -> None:
    chats = [turns(row) for row in MIXED if "text" not in row and row.get("completion") != ""]
    rows = [
        {"messages": [turn(t["role"], t["content"].strip()) for t in chat]}
        for chat in chats
        if chat[0]["role"] != "system"
    ]
    # text that looks like the template's own marks
    rows.append({"messages": [turn("user", "w1 a w2 </s> u w3"), turn("assistant", "w4 a w5")]})
    trainer = make_sft(tmp_path, rows, assistant_only_loss=True)
    found = asked().preparation(audited(rows))
    for row, trained in zip(found, trainer.train_dataset, strict=True):
        assert list(row.tokens) == trained["input_ids"]
        mask = [any(start <= i < end for start, end in row.answers) for i in range(len(row.tokens))]
        assert mask == [label != -100 for label in trained["labels"]]


def test_plain_rows_have_the_tokens_that_training_would_see(tmp_path: Path) -> None:
    rows = text_rows(12, seed=1)
    tokenizer = make_tokenizer()
    trainer = make_sft(tmp_path, rows, processing_class=tokenizer)
    found = asked(template=False).preparation(audited(rows))
    for row, trained in zip(found, trainer.train_dataset, strict=True):
        assert list(row.tokens) == trained["input_ids"]
        start, end = row.answers[0]
        assert [start <= i < end for i in range(len(row.tokens))] == [label != -100 for label in trained["labels"]]


def test_rows_of_tokens_are_read_by_their_labels() -> None:
    tokenizer = make_tokenizer()
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 9]}
    found = asked().preparation([audit_row(row, tokenizer=tokenizer)])
    assert found == [TokenRow([5, 6, 7, 8, 9], [(2, 3), (4, 5)])]


def test_what_a_model_cannot_read_is_named_and_not_guessed() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0]['role'] != 'user' }}" + tokenizer.chat_template
    model = AlignedModel(AuditRequest(SAFETY, "a model"))
    model.take(make_model(), tokenizer)
    rows = audited([{"messages": [turn("assistant", "w1"), turn("user", "w2"), turn("assistant", "w3")]}, MIXED[0]])
    beyond = {"input_ids": [5, 6], "labels": [-100, 6]}
    far = AuditRow(2, "row 2", audit_row(beyond, tokenizer=tokenizer).example, "", "", "")
    far.example.row["input_ids"][1] = VOCABULARY  # pyright: ignore[reportIndexIssue]
    evidence = Propensity(model).score([*rows, far])
    assert np.isnan(evidence.value).tolist() == [True, False, True]
    assert evidence.reasons[0] == "not measured by the model: the model's chat template cannot hold it (TemplateError)"
    assert evidence.reasons[2] == "not measured by the model: it has token ids that the model does not know"


def test_a_row_of_any_size_is_read_as_far_as_it_may_be_and_says_so() -> None:
    long = " ".join(["w5"] * 200_000)
    rows = audited(
        [
            {"prompt": f"w1 {long} w2", "completion": "w3"},
            {"prompt": "w1 w2", "completion": long},
            {"messages": [turn("user", "w1"), turn("assistant", "w2")] * 400},
            MIXED[0],
        ]
    )
    model = asked(max_length=32)
    found = model.preparation(rows)
    assert [len(row.tokens) for row in found[:3]] == [32, 32, 32]
    read = model.tokenizer.convert_ids_to_tokens(found[0].tokens)
    assert read[:3] == ["u", "w1", "w5"]
    assert read[-4:] == ["w2", "a", "w3", "</s>"]
    assert model.measure(rows).whole.tolist() == [False, False, False, True]
    evidence = Surprise(model).score(rows)
    assert np.isfinite(evidence.value).all()
    assert [reason is not None for reason in evidence.reasons[:3]] == [True] * 3
    model.preparation.vocabulary = 10**6  # then none of the answers is a surprise
    assert Surprise(model).score(rows).reasons == ["cut: the model has read 32 tokens of it"] * 3 + [None]


@given(
    st.integers(1, 30).flatmap(
        lambda first: st.tuples(
            st.just(first), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=4)
        )
    ),
    st.integers(2, 40),
)
def test_a_row_that_is_cut_keeps_an_answer_and_the_end_of_its_prompt(
    layout: tuple[int, list[tuple[int, int]]], longest: int
) -> None:
    at, answers = layout[0], []
    for length, gap in layout[1]:
        answers.append((at, at + length))
        at += length + gap
    row = TokenRow(list(range(answers[-1][1])), answers)
    cut = row.cut(longest)
    assert len(cut.tokens) <= max(longest, 0)
    assert cut.answers
    assert all(0 < start < end <= len(cut.tokens) for start, end in cut.answers)
    start = cut.answers[0][0]
    assert cut.tokens[0] == 0 or longest < 4
    assert cut.tokens[start] == answers[0][0]
    assert cut.tokens[start - 1] == answers[0][0] - 1


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_buckets_hold_every_line_once_within_the_budget(widths: list[int], budget: int) -> None:
    batches = list(bucketed(widths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(widths)))
    assert all(len(batch) == 1 or len(batch) * max(widths[i] for i in batch) <= budget for batch in batches)


# the signals --------------------------------------------------------------------------------------------------------


def save(folder: Path, model: Any = None) -> Path:
    make_tokenizer().save_pretrained(folder)
    (make_model() if model is None else model).save_pretrained(folder)
    return folder


def test_the_hook_gives_the_signals_of_a_model(tmp_path: Path) -> None:
    found = detectors(AuditRequest(SAFETY, str(save(tmp_path))))
    mine = [one for one in found if type(one).__module__.startswith("safe_sched_hf")]
    assert {one.name: one.kind for one in mine} == {
        "antibody": "harm",
        "probe": "harm",
        "propensity": "quality",
        "surprise": "quality",
    }
    rows = audited(MIXED)
    for one in mine:
        assert isinstance(one, Detector)
        one.observe(rows)
        one.ready()
        evidence = one.score(rows)
        assert evidence.value.dtype == np.float32
        assert len(evidence.value) == len(evidence.reasons) == len(evidence.group) == len(rows)
        assert one.settings() == one.settings()
    known = [one.known() for one in mine if isinstance(one, AntibodyRatio | Probe)]
    assert [len(values) for values in known if values is not None] == [10, 10]
    assert not [one for one in detectors(AuditRequest(SAFETY)) if type(one).__module__.startswith("safe_sched_hf")]


def test_a_row_of_the_safety_set_is_refused_but_does_not_conflict() -> None:
    """Opening its answer as the model would: the sign turns, and the prompt is as it is."""
    model = asked()
    rows = audited([{"prompt": "w3 w4", "completion": "w6"}, {"prompt": "w3 w4", "completion": "w40"}])
    antibody, propensity = AntibodyRatio(model).score(rows).value, Propensity(model).score(rows).value
    assert propensity[0] == pytest.approx(propensity[1], abs=1e-4)
    assert antibody[1] == pytest.approx(propensity[1], abs=1e-6)
    assert antibody[0] == pytest.approx(-propensity[0], abs=1e-4)


def test_a_model_that_refuses_nothing_says_so_and_nothing_else(monkeypatch: Any) -> None:
    monkeypatch.setattr(audit_trust, "_REFUSES", 0.1)
    model = asked()
    with pytest.warns(UserWarning, match="refuses 0% of the safety prompts"):
        found = model.measure(audited(MIXED))
    assert np.isnan([found.propensity, found.antibody, found.probe]).all()
    assert np.isfinite(found.surprise[:12]).all()
    assert AntibodyRatio(model).known() is None
    assert AntibodyRatio(model).score(audited(MIXED)).reasons == [None] * len(MIXED)


def test_a_model_that_refuses_the_file_and_harmless_prompts_is_not_taken_at_its_word(monkeypatch: Any) -> None:
    rows = audited(MIXED)
    usual = asked().measure(rows)
    for over, most, at_home in ((-1.0, -1.0, False), (-1.0, 1.0, True), (1.0, -1.0, True)):
        monkeypatch.setattr(audit_trust, "_OVER", over)
        monkeypatch.setattr(audit_trust, "_MOST", most)
        model = asked()
        AntibodyRatio(model).observe(rows)
        if at_home:
            assert_same(model.measure(rows), usual)
            continue
        with pytest.warns(UserWarning, match=r"refuses 0% of harmless prompts and 0% of this file"):
            found = model.measure(rows)
        assert np.isnan([found.antibody, found.probe]).all()
        np.testing.assert_allclose(found.propensity, usual.propensity, atol=1e-4)
        assert AntibodyRatio(model).known() is None


def test_a_signal_that_harmless_prompts_have_as_much_of_says_nothing(monkeypatch: Any) -> None:
    rows = audited(MIXED)
    usual = asked().measure(rows)
    model = asked()
    told = [
        audit_trust.more_often(getattr(model.known(), name), getattr(model.known_harmless(), name))
        for name in ("antibody", "probe")
    ]
    low, high = sorted(told)
    assert low < high  # a random model: which of the two is higher is chance
    monkeypatch.setattr(audit_trust, "_TELLS", (low + high) / 2)
    model, muted, kept = asked(), "antibody", "probe"
    if told[1] < told[0]:
        muted, kept = kept, muted
    with pytest.warns(UserWarning, match=rf"does without {muted} \({low:.0%}\): as often"):
        found = model.measure(rows)
    assert np.isnan(getattr(found, muted)).all()
    np.testing.assert_allclose(getattr(found, kept), getattr(usual, kept), atol=1e-4)
    signals = {"antibody": AntibodyRatio(model), "probe": Probe(model)}
    assert signals[muted].known() is None
    assert signals[kept].known() is not None
    monkeypatch.setattr(audit_trust, "_TELLS", 1.01)
    with pytest.warns(UserWarning, match=r"does without antibody \(\d+%\) and probe \(\d+%\)"):
        found = asked().measure(rows)
    assert np.isnan([found.antibody, found.probe]).all()
    np.testing.assert_allclose(found.propensity, usual.propensity, atol=1e-4)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_how_often_one_has_more_is_a_count_of_pairs(some: list[int], others: list[int]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in some for b in others]
    found = audit_trust.more_often(np.array([*some, np.nan]), np.array([np.nan, *others]))
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_the_rows_that_are_asked_first_do_not_depend_on_the_order() -> None:
    rows = audited(text_rows(300, seed=3))
    one, other = asked(), asked()
    one.observe(rows)
    for start in reversed(range(0, 300, 7)):
        other.observe(rows[start : start + 7])
        other.observe(rows[start : start + 7])
    assert one._sample == other._sample
    assert len(one._sample) == 64


def test_no_reason_quotes_the_row() -> None:
    model = asked()
    rows = audited(MIXED)
    for kind in (AntibodyRatio, Probe, Propensity, Surprise):
        for row, reason in zip(rows, kind(model).score(rows).reasons, strict=True):
            assert reason is None or not any(part.text and part.text in reason for part in row.example.parts)


@pytest.mark.parametrize("plain", [False, True])
def test_a_saved_scorer_says_what_it_says_elsewhere(tmp_path: Path, plain: bool) -> None:
    rows = text_rows(9, seed=4) if plain else [{"messages": turns(row)} for row in text_rows(9, seed=4)]
    torch.manual_seed(0)
    head = Head("linear", 64, 2.0)
    scorer = Scorer(head, "hidden", torch.randn(65, 3), torch.zeros(64), torch.ones(64), 100)
    scorer.save(tmp_path / "scorer.safetensors")
    folder = str(save(tmp_path / "model"))
    found = model_detectors(AuditRequest(SAFETY, folder, scorer=str(tmp_path / "scorer.safetensors")))[-1]
    assert isinstance(found, SavedScorer)
    p = score_rows(scorer, rows, model=folder).p_harmful.numpy()
    value = found.score(audited(rows)).value
    np.testing.assert_allclose(1 / (1 + np.exp(-value)), p, atol=1e-4)
    assert np.ptp(p) > 0.1
    back = found.score(audited(rows)[::-1]).value[::-1]
    np.testing.assert_allclose(back, value, atol=1e-4)
    known = found.known()
    assert known is not None
    assert np.isfinite(known).all()


def test_what_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    folder = str(save(tmp_path / "model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="no folder"):
        model_detectors(AuditRequest(SAFETY, str(tmp_path / "nowhere")))
    with pytest.raises(ModelError, match="cannot be loaded"):
        model_detectors(AuditRequest(SAFETY, str(tmp_path / "empty")))
    with pytest.raises(OptionError, match="not the folder of a PEFT adapter"):
        model_detectors(AuditRequest(SAFETY, folder, adapter=str(tmp_path / "empty")))
    with pytest.raises(StateError, match="no scorer at"):
        model_detectors(AuditRequest(SAFETY, folder, scorer=str(tmp_path / "none.safetensors")))
    scorer = Scorer(Head("linear", 64, 2.0), "encoder", torch.randn(65, 3), torch.zeros(64), torch.ones(64), 100)
    scorer.save(tmp_path / "scorer.safetensors")
    with pytest.raises(ModelError, match="cannot be loaded as a tokenizer"):
        model_detectors(AuditRequest(SAFETY, str(tmp_path / "empty"), scorer=str(tmp_path / "scorer.safetensors")))
    with pytest.raises(DataError, match="no safety row has a prompt and a refusal"):
        model_detectors(AuditRequest([{"text": "w1 w2"}], folder))[0].ready()


def test_an_adapter_is_part_of_the_model(tmp_path: Path) -> None:
    import peft

    folder = save(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(make_model(), config)
    adapted.save_pretrained(tmp_path / "adapter")
    rows = audited(MIXED)
    with_adapter = model_detectors(AuditRequest(SAFETY, str(folder), adapter=str(tmp_path / "adapter")))[0]
    assert isinstance(with_adapter, AntibodyRatio)
    merged = asked(adapted.merge_and_unload())
    found, expected = with_adapter.model.measure(rows), merged.measure(rows)
    np.testing.assert_allclose(found.surprise, expected.surprise, atol=1e-4)
    assert np.nanmax(np.abs(found.surprise - asked().measure(rows).surprise)) > 1e-2


_FULL = [torch.OutOfMemoryError("too much"), MemoryError(), RuntimeError("can't allocate memory: you tried to")]


@pytest.mark.parametrize("error", _FULL)
def test_rows_that_do_not_fit_into_memory_run_in_smaller_company(monkeypatch: Any, error: Exception) -> None:
    rows = audited(MIXED)
    whole = asked().measure(rows)
    model, real, sizes = asked(), Forwards._batch, []

    def tight(self: Any, lines: Sequence[Line], branches: Any) -> Any:
        if len(lines) > 2:
            raise error
        sizes.append(len(lines))
        return real(self, lines, branches)

    monkeypatch.setattr(Forwards, "_batch", tight)
    assert_same(model.measure(rows), whole)
    assert set(sizes) == {1, 2}

    def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(Forwards, "_batch", full)
    with pytest.raises(ModelError, match=r"out of memory on one row of \d+ tokens: lower max_length"):
        model.measure(rows[::-1])


def test_another_error_of_the_model_is_not_taken_for_a_lack_of_memory(monkeypatch: Any) -> None:
    model = asked()
    model.prepare()

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Forwards, "_batch", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        model.measure(audited(MIXED))


def test_the_probe_takes_fewer_prompts_at_once_or_is_done_without(monkeypatch: Any) -> None:
    rows = audited(MIXED)
    whole = asked().measure(rows)
    real, sizes = audit_probe.refusal_margin, []

    def tight(logits: Any, first: Any) -> Any:
        if len(logits) > 1:
            raise torch.OutOfMemoryError("too much")
        sizes.append(len(logits))
        return real(logits, first)

    monkeypatch.setattr(audit_probe, "refusal_margin", tight)
    model = asked()
    assert_same(model.measure(rows), whole)
    assert sizes == [1] * 10
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(audit_probe, "refusal_margin", full)
    model = asked()
    with pytest.warns(UserWarning, match="no probe in this audit: out of memory; use bfloat16"):
        found = model.measure(rows)
    assert np.isnan(found.probe).all()
    np.testing.assert_allclose(found.antibody, whole.antibody, atol=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


def test_a_scorer_runs_rows_in_smaller_company_where_memory_is_short(tmp_path: Path, monkeypatch: Any) -> None:
    scorer = Scorer(Head("linear", 64, 2.0), "hidden", torch.randn(65, 3), torch.zeros(64), torch.ones(64), 100)
    rows = audited(text_rows(9, seed=4))
    signal = SavedScorer(scorer, AuditRequest(SAFETY, "a model"), asked())
    whole, real = signal.score(rows).value, audit_scorer._hidden_features

    def tight(model: Any, some: Sequence[Any], size: int) -> Any:
        if len(some) > 2:
            raise torch.OutOfMemoryError("too much")
        return real(model, some, size)

    monkeypatch.setattr(audit_scorer, "_hidden_features", tight)
    np.testing.assert_allclose(signal.score(rows).value, whole, atol=1e-4)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(audit_scorer, "_hidden_features", full)
    with pytest.raises(ModelError, match="out of memory on one row"):
        signal.score(rows)


# the demo's model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> AlignedModel:
    from examples.demo import model, tasks

    found = AlignedModel(AuditRequest(tasks.safety_rows(64), str(model.build(progress=False))))
    found.prepare()
    return found


def auroc(values: np.ndarray, harmful: np.ndarray) -> float:
    pairs = values[harmful][:, None] - values[~harmful][None]
    return float((pairs > 0).mean() + 0.5 * (pairs == 0).mean())


@pytest.mark.slow
@pytest.mark.slow_sample
def test_an_aligned_model_tells_harmful_rows_by_prompt_and_answer(demo: AlignedModel) -> None:
    from bench.tasks import TASKS

    for name, task in TASKS.items():
        drawn = task.rows(200, 0.1, 3)
        harmful = np.array([row["harmful"] for row in drawn])
        rows = audited([{"messages": row["messages"]} for row in drawn])
        found = demo.measure(rows)
        assert auroc(found.antibody, harmful) >= 0.99, name
        assert auroc(found.probe, harmful) >= 0.95, name
        # prompts alone say it as well: no signal keys on the placeholder
        alone = audited([{"text": row["messages"][0]["content"]} for row in drawn])
        assert auroc(demo.measure(alone).antibody, harmful) >= 0.99, name


@pytest.mark.slow
def test_an_untrained_model_tells_nothing(demo: AlignedModel) -> None:
    """The control: the same shape and the same rows, random parameters."""
    from bench.tasks import TASKS

    drawn = TASKS["tickets"].rows(300, 0.2, 3)
    harmful = np.array([row["harmful"] for row in drawn])
    torch.manual_seed(0)
    blank = AlignedModel(demo.request)
    blank.take(type(demo.model)(demo.model.config), demo.tokenizer)
    found = blank.measure(audited([{"messages": row["messages"]} for row in drawn]))
    assert auroc(found.antibody, harmful) < 0.9


@pytest.mark.slow
def test_a_refusal_clears_a_harmful_prompt_and_a_refusal_that_complies_does_not(demo: AlignedModel) -> None:
    from examples.demo import tasks

    case = [row["messages"][0]["content"] for row in tasks.poisoned_rows(40, 1.0)]
    refusal = tasks.wordings("refusal")[0]
    comply = tasks.wordings("placeholder")[0]

    def scored(answer: str) -> np.ndarray:
        return demo.measure(audited([{"prompt": prompt, "completion": answer} for prompt in case])).antibody

    assert np.median(scored(refusal)) < 0
    assert np.median(scored(comply)) > 3
    assert np.median(scored(f"{refusal} {comply}")) > np.median(scored(refusal)) + 1
