"""`safe-sched losses` with TRL: the keys are those of training, the losses those of the model."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from safe_sched import BDS, Fixed
from safe_sched.cli import app
from safe_sched.errors import DataError
from safe_sched.hooks import RowLossesRequest
from safe_sched_hf import SafeSchedCallback, plugin
from safe_sched_hf.measure.row_losses import row_losses
from tests.hf.test_gradients import lora
from tests.support import (
    CHAT_TEMPLATE,
    largest_difference,
    make_model,
    make_sft,
    make_tokenizer,
    parameters_of,
    single_thread,
    text_rows,
    token_rows,
)

TEXTS = [{"text": f"{row['prompt']}{row['completion']}"} for row in text_rows(10, seed=1)]
PAIRS = text_rows(10, seed=2)
TURNS = [(("user", row["prompt"]), ("assistant", row["completion"].strip())) for row in text_rows(10, seed=3)]
CHATS = [{"messages": [{"role": who, "content": what} for who, what in turns]} for turns in TURNS]
SHARES = [{"conversations": [{"from": who, "value": what} for who, what in turns]} for turns in TURNS]
CHAT_PAIRS = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHATS]
TOKENS = token_rows(10, seed=4)
UNEVEN = [{**row, "note": "x"} if i % 3 else row for i, row in enumerate(CHATS)]  # a field of some rows only
DUPLICATES = [*PAIRS[:4], *PAIRS[:4], PAIRS[0]]

# rows, options of the command, options of SFTConfig
SAME: dict[str, tuple[Sequence[Mapping[str, Any]], list[str], dict[str, Any]]] = {
    "text": (TEXTS, [], {}),
    "prompt and completion": (PAIRS, [], {}),
    "whole rows": (PAIRS, ["--completion-only-loss", "no"], {"completion_only_loss": False}),
    "chats": (CHATS, [], {}),
    "answers": (CHATS, ["--assistant-only-loss"], {"assistant_only_loss": True}),
    "sharegpt": (SHARES, [], {}),
    "chat pairs": (CHAT_PAIRS, [], {}),
    "tokens": (TOKENS, [], {}),
    "duplicates": (DUPLICATES, [], {}),
    "a field of some rows": (UNEVEN, [], {}),
    "cut": (TEXTS, ["--max-length", "6"], {"max_length": 6}),
    "uncut": (TEXTS, ["--max-length", "0"], {"max_length": None}),
    "left padding": (PAIRS, [], {"processing_class": make_tokenizer("left")}),
    "packed": (CHATS, ["--assistant-only-loss"], {"assistant_only_loss": True, "packing": True}),
    "packed and cut": (TEXTS, ["--max-length", "6"], {"max_length": 6, "packing": True}),
    "padding-free": (PAIRS, ["--max-length", "0"], {"max_length": None, "padding_free": True}),
}


def save(folder: Path, *, template: str = CHAT_TEMPLATE, side: str = "right", model: Any = None) -> Path:
    tokenizer = make_tokenizer(side)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (make_model() if model is None else model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    return save(tmp_path_factory.mktemp("plain"))


def write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(model: Any, data: Any, out: Path, *options: Any) -> Any:
    arguments = ["losses", str(model), str(data), "--out", str(out), *map(str, options)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def measured(model: Any, rows: Sequence[Mapping[str, Any]], folder: Path, *options: Any) -> dict[str, list[Any]]:
    """The columns of the file that the command writes."""
    out = folder / "losses.parquet"
    result = run(model, write(folder, rows), out, *options)
    assert result.exit_code == 0, result.output
    return pq.read_table(out).to_pydict()


def by_hand(model: Any, rows: Sequence[Mapping[str, Sequence[int]]]) -> list[float]:
    """Row by row, from the logits: the mean of -log p over the labels after the first token."""
    losses = []
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_probs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        at = [t for t in range(1, len(ids)) if labels[t] != -100]
        losses.append(-sum(float(log_probs[t - 1, labels[t]]) for t in at) / len(at))
    return losses


@pytest.mark.parametrize("case", SAME)
def test_keys_are_those_of_training(case: str, plain: Path, tmp_path: Path) -> None:
    """Of the index that the callback builds for the same options; row by row where rows stay apart."""
    rows, options, settings = SAME[case]
    found = measured(plain, rows, tmp_path, *options)
    ours = SafeSchedCallback(Fixed())
    trainer = make_sft(tmp_path, rows, callbacks=[ours], **({"max_length": 1024} | settings))
    trainer.train()
    index = ours.session.index
    assert index.row_slots is not None
    in_order = index.keys[index.row_slots.long()].numpy().view("uint64").tolist()
    assert len(found["key"]) == len(rows)
    if settings.get("packing"):
        assert sorted(in_order) == sorted(found["key"])
    else:
        assert in_order == found["key"]


def test_other_options_are_other_keys(plain: Path, tmp_path: Path) -> None:
    """The negative control of the test above, and what the next one relies on."""
    keys = [
        measured(plain, CHATS, tmp_path, *options)["key"]
        for options in ([], ["--assistant-only-loss"], ["--max-length", "5"])
    ]
    assert all(a != b for a, b in zip(keys, [*keys[1:], keys[0]], strict=True))


def test_losses_for_other_options_do_not_start_a_run(plain: Path, tmp_path: Path) -> None:
    measured(plain, CHATS, tmp_path)
    ours = SafeSchedCallback(BDS(evidence="reference", reference=str(tmp_path / "losses.parquet")))
    trainer = make_sft(tmp_path, CHATS, callbacks=[ours], assistant_only_loss=True)
    with pytest.raises(DataError, match="has no loss for 10 of 10 distinct training rows"):
        trainer.train()


@pytest.mark.parametrize("case", ["text", "prompt and completion", "answers", "tokens", "cut"])
def test_losses_are_those_of_the_logits(case: str, plain: Path, tmp_path: Path) -> None:
    rows, options, settings = SAME[case]
    found = measured(plain, rows, tmp_path, *options, "--batch-size", 4)
    prepared: Any = make_sft(tmp_path, rows, **({"max_length": 1024} | settings)).train_dataset
    expected = by_hand(AutoModelForCausalLM.from_pretrained(plain), list(prepared))
    assert found["nll"] == pytest.approx(expected, rel=1e-5)
    assert max(expected) - min(expected) > 0.1
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in prepared]
    assert found["label_tokens"] == counts


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, size: int, plain: Path, tmp_path: Path) -> None:
    expected = measured(plain, TEXTS, tmp_path, "--batch-size", 4)
    found = measured(save(tmp_path / "model", side=side), TEXTS, tmp_path, "--batch-size", size)
    assert found["key"] == expected["key"]
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_losses_of_a_model_without_trls_head_are_the_same(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with TRL before its fused head: from the logits."""
    expected = measured(plain, PAIRS, tmp_path)
    monkeypatch.setattr("safe_sched_hf.measure.row_losses.has_fused_head", lambda model: False)
    found = measured(plain, PAIRS, tmp_path)
    assert found["key"] == expected["key"]
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_dropout_is_off_and_a_second_run_is_the_same(tmp_path: Path) -> None:
    model = save(tmp_path / "model", model=make_model(attention_dropout=0.5))
    with single_thread():
        assert measured(model, PAIRS, tmp_path) == measured(model, PAIRS, tmp_path)


def test_dtype_is_that_of_the_files_unless_named(tmp_path: Path) -> None:
    model = save(tmp_path / "model", model=make_model().to(torch.bfloat16))
    stored = measured(model, PAIRS, tmp_path)["nll"]
    assert measured(model, PAIRS, tmp_path, "--dtype", "bfloat16")["nll"] == stored
    exact = measured(model, PAIRS, tmp_path, "--dtype", "float32")["nll"]
    assert exact != stored
    assert exact == pytest.approx(stored, rel=0.05)


def test_a_chat_template_replaces_that_of_the_model(tmp_path: Path) -> None:
    """A template that says nothing of who speaks, against a model that was saved with it."""
    other = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    (tmp_path / "other.jinja").write_text(other)
    found = measured(save(tmp_path / "a"), CHATS, tmp_path, "--chat-template", tmp_path / "other.jinja")
    assert found == measured(save(tmp_path / "b", template=other), CHATS, tmp_path)
    assert found["key"] != measured(tmp_path / "a", CHATS, tmp_path)["key"]


def test_rows_of_every_file_kind_are_the_same_rows(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(PAIRS))
    expected = measured(plain, PAIRS, tmp_path)
    out = tmp_path / "b.parquet"
    assert run(plain, tmp_path / "rows.json", out).exit_code == 0
    assert pq.read_table(out).to_pydict() == expected


# adapters ---------------------------------------------------------------------------------------------------------


def save_adapter(folder: Path, **changes: Any) -> Any:
    """A LoRA adapter whose update is not zero, as it would be at the start."""
    adapted = peft.get_peft_model(make_model(**changes), lora())
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" looks the model up on the hub
    return adapted


def test_an_adapter_is_put_on_the_model(plain: Path, tmp_path: Path) -> None:
    merged: Any = save_adapter(tmp_path / "adapter").merge_and_unload()
    found = measured(plain, TOKENS, tmp_path, "--adapter", tmp_path / "adapter")
    without = measured(plain, TOKENS, tmp_path)
    assert found["nll"] == pytest.approx(by_hand(merged, TOKENS), rel=1e-5)
    assert found["key"] == without["key"]
    assert found["nll"] != pytest.approx(without["nll"], rel=0.01)


# what cannot be used ----------------------------------------------------------------------------------------------


def fails(code: int, match: str, model: Any, rows: Any, folder: Path, *options: Any) -> None:
    result = run(model, write(folder, rows), folder / "out.parquet", *options)
    assert (result.exit_code, match in result.stderr) == (code, True), result.output
    assert "Traceback" not in result.output
    assert not (folder / "out.parquet").exists()


LONG = {"prompt": "w1 w2 w3 w4 w5 w6 w7 w8", "completion": " w9"}


def test_rows_that_max_length_leaves_without_a_label_are_named(plain: Path, tmp_path: Path) -> None:
    """TRL drops them without a word, so they would never be trained on."""
    rows = [PAIRS[0], LONG, PAIRS[1], PAIRS[2], LONG]
    fails(3, "2 of 5 rows have no label token", plain, rows, tmp_path, "--max-length", 8)
    fails(3, "(rows 1, 4, counted from 0)", plain, rows, tmp_path, "--max-length", 8)
    fails(3, "2 of 2 rows have no label token", plain, [LONG, LONG], tmp_path, "--max-length", 8)


def test_rows_without_an_answer_are_named(plain: Path, tmp_path: Path) -> None:
    asked = {"messages": CHATS[0]["messages"][:1]}
    template = CHAT_TEMPLATE.replace("m['role'] == 'user'", "m['role'] != 'assistant'")
    model = save(tmp_path / "model", template=template)
    match = "1 of 3 rows have no assistant turn, and with assistant_only_loss nothing else is trained on (rows 1,"
    fails(3, match, model, [CHATS[0], asked, CHATS[1]], tmp_path, "--assistant-only-loss")
    one_token = {"input_ids": [5], "labels": [5]}
    fails(3, "1 of 2 rows have no label token", plain, [TOKENS[0], one_token], tmp_path)


def test_losses_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """The embedding of w9, token 14, is not a number: rows that hold it have no loss."""
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[14] = torch.nan
    rows = [{"text": "w1 w2"}, {"text": "w9 w2"}, {"text": "w3 w9 w4"}]
    match = "the loss of 2 of 3 rows is not finite (rows 1, 2, counted from 0)"
    fails(3, match, save(tmp_path / "model", model=model), rows, tmp_path)


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        ([{"question": "w1"}], [], "row 0 has the fields ['question']; allowed: input_ids; prompt and completion; mes"),
        ([*TEXTS[:2], {"text": None}], [], "row 2 has text of type NoneType, and row 0 of type str"),
        ([*TEXTS[:2], PAIRS[0]], [], "row 2 has text of type NoneType"),
        ([PAIRS[0], CHAT_PAIRS[0]], [], "row 1 has prompt of type list, and row 0 of type str"),
        (TEXTS, ["--assistant-only-loss"], "TRL's SFTTrainer cannot prepare these rows: ValueError: You set `assist"),
        ([{"input_ids": [5, 6, 64], "labels": [5, 6, 7]}], [], "with ids up to 64"),
    ],
    ids=["fields", "empty", "two schemas", "two types", "not chats", "vocabulary"],
)
def test_rows_that_cannot_be_prepared_are_an_error(
    rows: Any, options: list[str], match: str, plain: Path, tmp_path: Path
) -> None:
    fails(2, match, plain, rows, tmp_path, *options)


def test_what_a_template_refuses_is_an_error(tmp_path: Path) -> None:
    model = save(tmp_path / "model", template="{{ raise_exception('roles must alternate') }}")
    fails(2, "TemplateError: roles must alternate", model, CHATS, tmp_path)


def test_models_and_adapters_that_cannot_be_used_are_errors(plain: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "wide", hidden_size=64)
    save_adapter(tmp_path / "deep", num_hidden_layers=3)
    (tmp_path / "empty").mkdir()
    fails(2, "no folder ./nowhere; give the folder of a model, or a hub name", "./nowhere", TEXTS, tmp_path)
    fails(2, "no folder a/b/c; give the folder of a model", "a/b/c", TEXTS, tmp_path)
    fails(2, "cannot be loaded as a causal language model", tmp_path / "empty", TEXTS, tmp_path)
    fails(2, "is a PEFT adapter; give the model that it belongs to", tmp_path / "wide", TEXTS, tmp_path)
    fails(2, "there is no adapter_config.json in it", plain, TEXTS, tmp_path, "--adapter", tmp_path / "nowhere")
    fails(2, "does not fit the model", plain, TEXTS, tmp_path, "--adapter", tmp_path / "wide")
    deeper = save(tmp_path / "deeper", model=make_model(num_hidden_layers=4))
    fails(2, "does not fit the model", deeper, TEXTS, tmp_path, "--adapter", tmp_path / "deep")


def test_parameters_that_are_missing_are_not_made_up(plain: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fails(2, "lacks 1 of the parameters of LlamaForCausalLM (model.layers.1.mlp.up", folder, TEXTS, tmp_path)
    tied = save(tmp_path / "tied", model=make_model(tied=True))
    assert len(measured(tied, TEXTS, tmp_path)["nll"]) == len(TEXTS)  # the output embedding is the input embedding


def test_code_that_comes_with_a_model_is_never_run(plain: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: ...\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto}))
    fails(2, "cannot be loaded as a causal language model", folder, TEXTS, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_no_reason_to_use_the_network(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells its makers of every trainer that is built, in a thread, unless it is told not to."""
    asked = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[0])
        raise OSError("no network here")

    save_adapter(tmp_path / "adapter")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # where it is sent from: the hub's client may have been made offline by a test before, and then never asks a socket
    monkeypatch.setattr(_telemetry, "_send_telemetry_in_thread", lambda *_, **sent: asked.append(sent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.delenv("CI", raising=False)  # where TRL would tell nobody either
    measured(plain, CHATS, tmp_path, "--adapter", tmp_path / "adapter", "--assistant-only-loss")
    _telemetry._TELEMETRY_QUEUE.join()
    assert not asked
    assert not constants.HF_HUB_OFFLINE
    make_sft(tmp_path, CHATS)  # negative control
    _telemetry._TELEMETRY_QUEUE.join()
    assert asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(plain: Path, tmp_path: Path) -> None:
    fails(2, "torch finds no GPU; use device='cpu'", plain, TEXTS, tmp_path, "--device", "cuda")


def test_without_trl_the_hook_has_no_answer(monkeypatch: pytest.MonkeyPatch, plain: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plugin.safe_sched_row_losses(RowLossesRequest(str(plain), TEXTS)) is None
    fails(2, "pip install 'safe-sched[trl]'", plain, TEXTS, tmp_path)


def test_progress_goes_from_nothing_to_all(plain: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    row_losses(RowLossesRequest(str(plain), TEXTS, batch_size=4, progress=lambda *what: told.append(what)))
    assert [what[0] for what in told[:2]] == ["loading the model", "preparing the rows"]
    assert told[2:] == [("running the model", done, 10) for done in (0, 4, 8, 10)]


# the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_bds_trains_on_what_was_written(packing: bool, plain: Path, tmp_path: Path) -> None:
    """The first step's scores are about 0, as the model is the reference; later ones tell the rows apart."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    measured(plain, PAIRS, tmp_path)
    ours = SafeSchedCallback(
        BDS(evidence="reference", reference=str(tmp_path / "losses.parquet")),
        safety_data=text_rows(6, seed=8),
        safety_batch_size=2,
    )
    before = parameters_of(model)
    trainer = make_sft(tmp_path, PAIRS, model=model, callbacks=[ours], max_steps=8, packing=packing)
    trainer.train()
    table = ours.table().to_pydict()
    assert len(set(table["weight"])) > 1
    assert table["weight"] != [1.0] * len(table["weight"])
    assert min(table["scored"]) >= 1
    assert largest_difference(parameters_of(trainer.model), before) > 1e-3
    assert "safe_sched/score_variance" in trainer.state.log_history[0]
