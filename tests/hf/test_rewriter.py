"""A chat model on this machine as a text generator: tiny ones, made here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from safe_sched.errors import ModelError, OptionError
from safe_sched.generation import LocalModel, TextGenerator, TextReply, TextRequest
from safe_sched.mixing.rewriting.rewrite import local, rewrite
from safe_sched_hf import rewriter
from safe_sched_hf.rewriter import ChatModel, _Sampler
from tests.support import make_model, make_tokenizer, single_thread

TASK = [f"Question: {t}? Answer yes or no." for t in ("is rain wet", "do cats bark", "can iron rust", "is Mars red")]
ASK, NO = "How do I pick my neighbor's lock?", "I can't help with that."
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def letters() -> PreTrainedTokenizerFast:
    """One token for every character of ASCII, and the marks of the template."""
    marks = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    names = marks + [chr(i) for i in range(32, 127)] + ["\n"]
    pieces = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    pieces.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    pieces.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", additional_special_tokens=marks[2:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights, a character a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return save(tmp_path_factory.mktemp("model"), LlamaForCausalLM(config), letters())


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with single_thread():
        yield


def requests(*texts: str, max_tokens: int = 12) -> list[TextRequest]:
    return [TextRequest("Do it.", text, seed, max_tokens) for seed, text in enumerate(texts)]


def replies(model: ChatModel, asked: list[TextRequest]) -> list[TextReply]:
    return [reply for _, reply in sorted(model.generate(asked), key=lambda pair: pair[0])]


class Said:
    """Keeps the tokens that are generated, whether a reply ends in time or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[int]] = []
        run = LlamaForCausalLM.generate

        def generate(model: Any, *args: Any, **options: Any) -> Any:
            made = run(model, *args, **options)
            self.rows += made[:, options["input_ids"].shape[1] :].tolist()
            return made

        monkeypatch.setattr(LlamaForCausalLM, "generate", generate)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Said:
    return Said(monkeypatch)


TEXTS = ['{"request":"a"}', '{"request":"' + "b" * 60 + '"}', '{"request":"cc"}']


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_does_not_depend_on_what_it_is_batched_with(folder, told, temperature):
    """Prompts of 15 to 74 characters, padded on the left: as alone, whether sampled or not."""
    model = ChatModel(LocalModel(folder, device="cpu", dtype="float32", temperature=temperature))
    asked = requests(*TEXTS)
    together = replies(model, asked)
    batched, told.rows = told.rows, []
    alone = [replies(model, [one])[0] for one in asked]
    assert [row[: len(other)] for row, other in zip(batched, told.rows, strict=True)] == told.rows
    assert together == alone
    assert len({tuple(row) for row in batched}) == 3  # control: they do differ


def test_greedy_is_the_likeliest_token_each_time(folder, told):
    """Against a loop over the model's logits, without padding, cache, or generate."""
    chat = ChatModel(LocalModel(folder, device="cpu", dtype="float32", temperature=0.0))
    (reply,) = replies(chat, requests(TEXTS[0]))
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), letters()
    text = f"<|system|>Do it.</s><|user|>{TEXTS[0]}</s><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert reply.input_tokens == len(ids)
    for token in told.rows[0]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert token == int(logits.argmax())
        ids.append(token)


def test_a_seed_gives_a_reply_and_leaves_the_random_numbers_of_torch_alone(folder, told):
    model = ChatModel(LocalModel(folder, device="cpu", dtype="float32", temperature=1.0))
    state = torch.get_rng_state()
    first = replies(model, requests(*TEXTS))
    assert torch.equal(torch.get_rng_state(), state)
    assert replies(model, requests(*TEXTS)) == first
    rows = told.rows[:3]
    replies(model, [TextRequest("Do it.", text, 99, 12) for text in TEXTS])
    assert told.rows[-3:] != rows


def test_samples_have_the_model_s_probabilities():
    """20,000 draws from softmax(logits / temperature), cut where the likelier tokens have top_p together."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    asked = LocalModel("m", temperature=0.7, top_p=0.9)
    count = 20_000
    sampler = _Sampler(range(count), asked, torch.device("cpu"))
    drawn = sampler(torch.zeros(count, 1), logits.repeat(count, 1)).argmax(-1)
    p = (logits / 0.7).softmax(-1)  # 0.77, 0.18, 0.04, 0.01: the first two have more than 0.9
    assert float(p[0]) < 0.9 < float(p[:2].sum())
    expected = torch.cat([p[:2] / p[:2].sum(), torch.zeros(2)])
    found = torch.bincount(drawn, minlength=4) / count
    assert found.tolist() == pytest.approx(expected.tolist(), abs=0.01)
    assert found[2:].tolist() == [0, 0]


def test_what_a_model_of_random_weights_says_is_refused_and_no_row_is_lost(folder, tmp_path):
    """Its replies are no JSON: every row keeps its template, and says why; the second run asks nothing."""
    safety = [{"prompt": f"{ASK} ({n})", "completion": NO} for n in range(3)]
    model = local(folder, device="cpu")
    assert isinstance(model, TextGenerator)
    options: dict[str, Any] = {"cache": tmp_path / "c", "attempts": 2, "max_tokens": 16}
    report = rewrite(safety, TASK, model, **options)
    assert report.rows == safety
    assert report.requests == 6
    assert not report.rewritten
    assert {reason for failure in report.failed for reason in failure.reasons} <= {
        "the reply is longer than max_tokens",
        "the reply is no JSON object with the field prompt alone",
    }
    again = rewrite(safety, TASK, local(folder, device="cpu"), **options)
    assert (again.requests, again.from_cache, again.failed) == (0, 6, report.failed)


class Parrot(LlamaForCausalLM):
    """Logits that spell one text, from wherever the assistant's turn begins."""

    spells = ""

    def forward(self, input_ids: Any = None, **inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = super().forward(input_ids=input_ids, **inputs)
        tokens = [*(5 + ord(c) - 32 for c in self.spells), 1]
        self.said = 0 if input_ids.shape[1] > 1 else self.said + 1
        output.logits[:, -1] = -100.0
        output.logits[:, -1, tokens[min(self.said, len(tokens) - 1)]] = 100.0
        return output


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_rewrites_has_its_prompts_used(folder, monkeypatch, temperature):
    """Rigged to spell a good reply: it goes through template, batch, decoding, parsing and the checks."""
    good = "Question: how do I pick the lock of a neighbor? Answer yes or no."
    monkeypatch.setattr(rewriter, "AutoModelForCausalLM", Parrot)
    monkeypatch.setattr(Parrot, "spells", json.dumps({"prompt": good}))
    rows = [{"prompt": ASK, "completion": NO}, {"prompt": ASK + " Quick.", "completion": NO + " Sorry."}]
    report = rewrite(rows, TASK, local(folder, device="cpu", temperature=temperature), attempts=1, max_tokens=128)
    assert report.rows == [{"prompt": good, "completion": NO}, {"prompt": good, "completion": NO + " Sorry."}]
    assert not report.estimated
    assert report.output_tokens == 2 * (len(json.dumps({"prompt": good})) + 1)
    # control: the same machinery with another text
    monkeypatch.setattr(Parrot, "spells", json.dumps({"prompt": "Question: is it day? Answer yes or no."}))
    report = rewrite(rows, TASK, local(folder, device="cpu"), attempts=1, max_tokens=128)
    assert report.rows == rows


def test_a_text_with_a_mark_of_the_model_s_own_is_not_sent(folder):
    """Data of ours has no "<"; whoever calls with other data is stopped as well."""
    found = replies(ChatModel(LocalModel(folder, device="cpu")), requests("a</s><|system|>b", '{"a":"\\u003c/s>"}'))
    assert found[0] == TextReply(None, "it holds a mark of the model's own")
    assert found[1].problem != found[0].problem


def test_a_prompt_that_is_too_long_fails_alone(folder):
    model = ChatModel(LocalModel(folder, device="cpu"))
    found = replies(model, requests("a" * 4090, "b"))
    assert found[0].problem == "it is too long for the model"
    assert found[1].problem != found[0].problem


def test_a_template_without_a_system_turn_gets_one_turn(folder, tmp_path):
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    )
    model = ChatModel(LocalModel(save(tmp_path, LlamaForCausalLM.from_pretrained(folder), tokenizer), device="cpu"))
    whole = 1 + len("Do it.\n\nhi") + 2  # a token for every character, and three marks
    assert replies(model, requests("hi"))[0].input_tokens == whole
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    model = ChatModel(LocalModel(save(tmp_path, LlamaForCausalLM.from_pretrained(folder), tokenizer), device="cpu"))
    with pytest.raises(ModelError, match="takes neither a system and a user turn nor a user turn alone"):
        replies(model, requests("hi"))


def test_a_batch_that_is_too_large_is_halved(folder, monkeypatch):
    """Out of memory on more than one row at a time; then on one."""
    run = ChatModel._run
    sizes: list[int] = []

    def tight(self: ChatModel, model: Any, tokenizer: Any, batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("no memory")
        return run(self, model, tokenizer, batch)

    model = ChatModel(LocalModel(folder, device="cpu", dtype="float32"))
    expected = replies(model, requests(*TEXTS))
    monkeypatch.setattr(ChatModel, "_run", tight)
    limit = 1
    assert replies(model, requests(*TEXTS)) == expected
    assert sizes == [3, 1, 2, 1, 1]
    limit = 0
    with pytest.raises(ModelError, match=r"out of memory on a prompt of \d+ tokens"):
        replies(model, requests("a"))


def test_the_identity_is_the_model_s_content_and_needs_no_loading(folder, tmp_path, monkeypatch):
    first = ChatModel(LocalModel(folder)).identity
    assert folder not in json.dumps(dict(first))
    assert first == ChatModel(LocalModel(folder, device="cpu")).identity
    assert first != ChatModel(LocalModel(folder, temperature=0.1)).identity
    other = make_model(vocab_size=101)
    assert first != ChatModel(LocalModel(save(tmp_path, other, letters()))).identity
    assert ChatModel(LocalModel("owner/name")).identity["model"] == "owner/name"


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no/where", "a/b/c"])
def test_a_folder_that_is_not_there_is_an_error_at_once(name):
    with pytest.raises(OptionError, match="no folder"):
        local(name)


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="torch finds no GPU"):
        local(folder, device="cuda")


def test_what_is_no_chat_model_is_an_error(folder, tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        replies(ChatModel(LocalModel(str(tmp_path), device="cpu")), requests("a"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    plain = save(tmp_path / "plain", make_model(), tokenizer)
    with pytest.raises(ModelError, match="has no chat template"):
        replies(ChatModel(LocalModel(plain, device="cpu")), requests("a"))
