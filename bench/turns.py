"""Training in turns: every arm in a process of its own, one optimiser step each, round after round.

A process has one real SFTTrainer, does one optimiser step when told to, and waits: the arms alternate step by
step, and a change of the machine's load hits all of them. The order rotates from round to round.

The clock is the first callback of the trainer: from its ``on_step_begin`` to the next one lie our
``on_step_begin`` (safety batch), forward and backward, the optimiser, our ``on_step_end``, the log record, and
our share of the next ``get_batch_samples``. The wait for the next turn is left out.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from safe_sched import BDS, Antibody
from safe_sched.rows.keys import IGNORE_INDEX
from safe_sched.training import forward
from safe_sched.training.loop import Company
from safe_sched.training.session import Session
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf import attach as attachment
from safe_sched_hf.measure.refusals import RefusalOddsMeasurement
from safe_sched_hf.safety import pad_rows

THREADS = min(2, os.cpu_count() or 1)

# for every arm alike, against noise: a thread that waits sleeps, so that it neither counts as work nor takes a core
# from others; and memory comes in huge pages, where it came in a million small ones at every step
QUIETER = {"OMP_WAIT_POLICY": "passive", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True)
class Sizes:
    """What is trained, and for how long."""

    hidden: int = 384
    layers: int = 6
    vocabulary: int = 32_000
    sequence: int = 256
    batch: int = 8
    arms: Sequence[int] = (0, 1, 2, 3, 4, 5)
    rounds: int = 10
    evidence_rounds: int = 7
    warm_up: int = 2


QUICK = Sizes(hidden=32, layers=1, vocabulary=64, sequence=16, batch=4, arms=(0, 2, 5), rounds=2, evidence_rounds=2)


class ReleasedStep(SFTTrainer):
    """Antibody's step as its released code takes it: two forwards for the weights, then the one that trains.

    w is the softmax over the micro-batch of NLL(refusal) - NLL(answer), means over tokens; the loss is
    ``sum_i w_i sum_t CE_it / sum_i w_i n_i``. All three are TRL's own forward, so what differs from plain training is
    their number.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        ids, labels = inputs["input_ids"], inputs["labels"]
        refusals = refusal_tokens(self.accelerator.unwrap_model(model).config.vocab_size)
        lines, targets = [], []
        for row in range(len(ids)):
            prompt, refusal = ids[row][labels[row] == IGNORE_INDEX], torch.tensor(refusals[row % len(refusals)])
            lines.append(torch.cat([prompt, refusal]))
            targets.append(torch.cat([torch.full_like(prompt, IGNORE_INDEX), refusal]))
        with torch.no_grad():
            answer, said = self._losses(model, ids, labels)
            refused, words = self._losses(model, pad_rows(lines, 0)[0], pad_rows(targets, IGNORE_INDEX)[0])
        weights = (refused / words - answer / said).softmax(0)
        losses, said = self._losses(model, ids, labels)
        return (weights * losses).sum() / (weights * said).sum()

    @staticmethod
    def _losses(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every row, summed over its label tokens, and how many these are."""
        output = model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True)
        return -output.log_probs.sum(1), output.label_mask.sum(1)


@dataclass(frozen=True)
class Arm:
    """One way to train: with which callback, at most how slow, and in every how many-th round."""

    name: str
    callback: Callable[[Sizes], SafeSchedCallback] | None = None
    target: float | None = None
    every: int = 1
    few: bool = False
    """whether its rows are those of the warm-up, again and again"""
    prompts: bool = False
    """whether the first half of its rows is their prompt"""
    trainer: type[SFTTrainer] = SFTTrainer
    what: str = ""
    """what it is, where its name does not say it"""


def bds_with_safety(sizes: Sizes, share: float, evidence: Any = None, **options: Any) -> SafeSchedCallback:
    """BDS with ``share`` safety rows per user row, as long as these; half of each is its prompt."""
    rows = token_table(64, sizes.sequence, sizes.vocabulary, seed=1, prompt=sizes.sequence // 2).to_list()
    scheduler = BDS(evidence=evidence, **options)
    return SafeSchedCallback(scheduler, safety_data=rows, safety_batch_size=round(share * sizes.batch))


def _evidence_arms(share: float) -> tuple[Arm, Arm, Arm]:
    what = f"{share:g} safety row{'s' if share != 1 else ''} a row"
    return (
        Arm(f"{what}: no evidence", lambda sizes: bds_with_safety(sizes, share)),
        Arm(f"{what}: every row measured", lambda sizes: bds_with_safety(sizes, share, "probe")),
        # all rows of its small set have been measured, once, before the first round that counts
        Arm(f"{what}: all rows settled", lambda sizes: bds_with_safety(sizes, share, "probe", max_probes=1), few=True),
    )


def refusal_tokens(vocabulary: int) -> list[list[int]]:
    """16 refusals of twelve words and an end. Eight begin with one word, the others with four more.

    So do those of the package, more or less: 16 openings of three tokens, a trie of 21 tokens that something follows.
    """
    tokens = np.random.default_rng(2).integers(3, vocabulary, (16, 13))
    number = np.arange(16)
    tokens[:, 0] = 3 + (number // 2 - 3).clip(min=0)
    tokens[:, 1] = 8 + number
    tokens[:, -1] = 1
    return tokens.tolist()


def antibody(sizes: Sizes, **options: Any) -> SafeSchedCallback:
    """Antibody with safety rows that calibrate it and are not trained on. A random model refuses nothing: ignore it."""
    refusals = refusal_tokens(sizes.vocabulary)
    prompts = token_table(32, sizes.sequence // 2, sizes.vocabulary, seed=1).to_list()
    rows = []
    for number, row in enumerate(prompts):
        prompt, refusal = row["input_ids"], refusals[number % len(refusals)]
        rows.append({"input_ids": prompt + refusal, "labels": [IGNORE_INDEX] * len(prompt) + refusal})
    # the space in front keeps the first word apart from the prompt that it is tokenized with
    texts = tuple("".join(f" w{token}" for token in refusal[:-1]) for refusal in refusals)
    scheduler = Antibody(refusals=texts, on_inversion="ignore", **options)
    return SafeSchedCallback(scheduler, safety_data=rows, safety_weight=0)


def _antibody_arm(name: str, target: float, what: str, few: bool = False, **options: Any) -> Arm:
    return Arm(name, lambda sizes: antibody(sizes, **options), target, few=few, prompts=True, what=what)


_ANTIBODY = (
    Arm("plain, rows with prompts", prompts=True, what="TRL's own step"),
    Arm(
        "released step",
        prompts=True,
        trainer=ReleasedStep,
        what="two forwards without gradient, of the rows and of their prompts with a refusal each, then the one that "
        "trains, with the weights; re-created without safe-sched, for reference",
    ),
    _antibody_arm(
        "published rule",
        1.35,
        'the same weights from `Antibody(ratio="token_mean", anchor=False, refusal_cost="exact", pool="micro_batch", '
        'gate="softmax")`: the rows\' own likelihood is read off the forward that trains',
        ratio="token_mean",
        anchor=False,
        refusal_cost="exact",
        pool="micro_batch",
        gate="softmax",
    ),
    _antibody_arm(
        "every row read",
        1.12,
        "`Antibody()` where all rows of a step are new: one forward without gradient of their prompts, on each of "
        "which 16 openings of refusals grow",
    ),
    _antibody_arm(
        "first token",
        1.03,
        '`Antibody(refusal_cost="first_token")`, all rows new: read off the forward that trains',
        refusal_cost="first_token",
    ),
    _antibody_arm(
        "all rows read",
        1.02,
        "`Antibody()` from the second epoch on: the rows are few, and the warm-up has read them all",
        few=True,
    ),
)

ARMS = (
    Arm("plain"),
    Arm("plain, again"),
    Arm("equal weights", lambda _: SafeSchedCallback("fixed"), 1.02),
    Arm("BDS", lambda _: SafeSchedCallback(BDS(evidence=None)), 1.03),
    Arm("BDS, 0.25 safety rows a row", lambda sizes: bds_with_safety(sizes, 0.25), 1.25 * 1.03, every=2),
    Arm("BDS, 1 safety row a row", lambda sizes: bds_with_safety(sizes, 1), 2 * 1.03, every=2),
    *_evidence_arms(0.25),
    *_evidence_arms(1),
    *_ANTIBODY,
)
EVIDENCE = ((6, 7, 8), (9, 10, 11))
"""The arms that are compared with each other for the cost of the probe: none, every row, settled."""
ANTIBODY = (12, 13, 14, 15, 16, 17)
"""The arms that are compared for the cost of Antibody; the first is the plain one."""


def token_table(rows: int, length: int, vocabulary: int, seed: int = 0, prompt: int = 0) -> Dataset:
    """Random token rows of one length, all but a prompt labels; int64, as lists of Python integers give."""
    tokens = np.random.default_rng(seed).integers(3, vocabulary, rows * length)
    labels = np.where(np.arange(rows * length) % length < prompt, IGNORE_INDEX, tokens) if prompt else tokens
    starts = np.arange(0, rows * length + 1, length, dtype=np.int32)
    columns = {"input_ids": tokens, "labels": labels}
    return Dataset(pa.table({name: pa.ListArray.from_arrays(starts, flat) for name, flat in columns.items()}))


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words between spaces: ``w3`` is token 3, and so on."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{token}": token for token in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class Stop(Exception):
    """Ends an arm between two steps."""


OWN = [0.0]
"""Seconds that this process has spent in safe-sched's own code, safety batches apart; with Antibody's forwards."""


def time_own_code() -> None:
    """Count the seconds that pass in whatever the callback adds to a step, but for the safety batch."""

    def timed(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                OWN[0] += time.perf_counter() - began

        setattr(owner, name, wrapper)

    for owner, name in (
        (attachment, "batch_fields"),
        (forward, "token_weights"),
        (Company, "after_forward"),
        (Session, "begin_step"),
        (Session, "end_step"),
        (Session, "effective_sample_size"),
        (RefusalOddsMeasurement, "before_step"),
    ):
        timed(owner, name)


def clocks() -> tuple[float, float, float]:
    """Wall clock, processor time of this process, and what of it was our own code."""
    return time.perf_counter(), time.process_time(), OWN[0]


class Turns(TrainerCallback):
    """Reports the times of every step, and waits for its turn to do the next."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.began = clocks()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pipe.send([now - began for now, began in zip(clocks(), self.began, strict=True)])
        if not self.pipe.recv():
            raise Stop
        self.began = clocks()


def build_model(sizes: Sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = max(sizes.hidden // 64, 1)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=8 * sizes.hidden // 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 3, 1),
        max_position_embeddings=sizes.sequence,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def train_arm(pipe: Connection, number: int, sizes: Sizes) -> None:
    """Train one arm, one step per turn; the whole life of a process. Sends its peak MiB at the end."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(THREADS)
    time_own_code()
    arm = ARMS[number]
    prompt = sizes.sequence // 2 if arm.prompts else 0
    steps = sizes.warm_up + max(sizes.rounds, sizes.evidence_rounds) + 2
    rows = (sizes.warm_up if arm.few else steps) * sizes.batch
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        config = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_length=sizes.sequence,
            per_device_train_batch_size=sizes.batch,
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = arm.trainer(
            model=build_model(sizes),
            args=config,
            train_dataset=token_table(rows, sizes.sequence, sizes.vocabulary, prompt=prompt),
            processing_class=word_tokenizer(sizes.vocabulary),
            callbacks=[Turns(pipe), *([arm.callback(sizes)] if arm.callback else [])],
        )
        with contextlib.suppress(Stop):
            trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(peak / (2**20 if sys.platform == "darwin" else 2**10))


def train_in_turns(
    sizes: Sizes, console: Console, arms: Sequence[int], count: int
) -> tuple[list[dict[int, list[float]]], dict[int, float]]:
    """The times of a step of some arms in every round, and peak MiB of every arm."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[int, Connection] = {}
    os.environ |= QUIETER
    for number in arms:
        pipes[number], theirs = context.Pipe()
        context.Process(target=train_arm, args=(theirs, number, sizes), daemon=True).start()
        theirs.close()  # a process that dies is then an EOFError here
    for pipe in pipes.values():
        pipe.recv()  # set up, and at the first step

    def step(number: int) -> list[float]:
        pipes[number].send(True)
        return pipes[number].recv()

    rounds = []
    with console.status("training") as status:
        for turn in range(-sizes.warm_up, count):
            status.update(f"training: round {turn + 1} of {count}")
            due = [number for number in pipes if turn < 0 or turn % ARMS[number].every == 0]
            shift = turn % len(due)
            rounds.append({number: step(number) for number in due[shift:] + due[:shift]})
    for pipe in pipes.values():
        pipe.send(False)
    return rounds[sizes.warm_up :], {number: pipe.recv() for number, pipe in pipes.items()}
