"""Flat alignment in a trainer: an aligned model that harmful fine-tuning moves less.

One callback for the training run that aligns a model, on prompts with good answers and refusals. Beside each optimiser
step it runs a batch of harmful rows at the parameters and at the point where a step of an attack would take them, and
adds what makes that step worth less; see `safe_sched.training.flat_alignment` for the equations.

======================  ===========================================================================================
the trainer             all micro-batches of the optimiser step: ``g_align`` in ``p.grad``
``training_step``       behind the last of them, before clipping: three more forwards and backwards, whose sum is
                        added to ``p.grad``
the trainer             clips, steps, logs as always
======================  ===========================================================================================

The extra passes run in the model's training mode, which gradient checkpointing asks for, with the same random numbers
in each: a difference of two losses must not be one of two dropout masks. Parameters, buffers, modes and the trainer's
random numbers are afterwards as they were before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import safe_sched
from safe_sched.data.rows import core_refusals, read_rows
from safe_sched.errors import DataError, ModelError, OptionError, StateError, unknown_name
from safe_sched.rows.keys import IGNORE_INDEX
from safe_sched.training.checkpoint import load_state, require_same, save_state
from safe_sched.training.flat_alignment import Flatness, Flattened, flatten
from safe_sched_hf.attach import Wrapping, calling_trainer, refuse_unsupported
from safe_sched_hf.callback import SafeSchedCallback
from safe_sched_hf.measure.probe import same_random_numbers
from safe_sched_hf.rows import first_rows
from safe_sched_hf.safety import SafetyData, SafetySet, are_chats, prompt_and_completion, safety_loss

ALIGNMENT_FILE = "safe_sched_alignment.safetensors"
_OPTIONS = (
    "harmful_data",
    "refusals",
    "harmful_batch_size",
    "seed",
    *(field.name for field in dataclasses.fields(Flatness)),
)
_BUFFER = 1 << 16  # elements; larger buffers are quantised weights, which no forward writes


class FlatAlignmentCallback(TrainerCallback):
    """Aligns flatly: harmful fine-tuning has to take more steps to undo what this training run teaches.

    Add it to the callbacks of a `transformers.Trainer` or a `trl.SFTTrainer` that trains on prompts with good answers
    and refusals; nothing else of the script changes. The gradient of every optimiser step becomes, as in the
    alignment stage of Antibody (arXiv 2603.00498)::

        the trainer's own  +  lambda * (grad L_harm(theta) - grad L_harm(phi))  +  lambda_refusal * grad L_refusal(phi)
        phi = theta - rho * grad L_harm(theta) / |grad L_harm(theta)|

    Losses are means over rows of each row's mean over answer tokens. Logged as ``safe_sched/sharpness``
    (``L_harm(theta) - L_harm(phi)``, nats), ``safe_sched/lambda``, ``safe_sched/harmful_loss`` and
    ``safe_sched/refusal_loss``.

    Args:
        harmful_data: Harmful prompts with compliant answers, which are attacked with and never learned; an inert
            placeholder does. In every form that ``safety_data`` of `SafeSchedCallback` has, but with prompts.
        refusals: What to answer these prompts instead, one per row by a seeded draw. None: about a hundred one-line
            refusals that come with the package.
        rho: Length of the attack's step in the space of the trainable parameters, > 0.
        rule: How lambda is found: ``"theorem"``, ``"cosine"`` (the authors' code) or ``"constant"`` (with
            ``lambda_refusal=0``: Booster). See `safe_sched.training.flat_alignment`.
        xi: Of ``"theorem"``, >= 0: the sharpness falls at least as fast as ``xi * grad L_sharp`` alone would lower it.
        eta: Of ``"cosine"``, >= 0.
        strength: Of ``"constant"``, >= 0: lambda itself.
        lambda_refusal: Weight of the refusals at the attacked point, >= 0; 0 saves that pass.
        harmful_batch_size: Harmful rows per optimiser step, >= 1. None: ``per_device_train_batch_size``.
        seed: Of the order of the harmful rows and of their refusals. None: the trainer's seed.

    Raises:
        OptionError: An option is unknown or out of range, or another callback of ours is in the same run.
        DataError, ModelError: When training starts: rows or trainer cannot be used, with the cause and the remedy.

    Example:
        >>> from safe_sched_hf import FlatAlignmentCallback
        >>> attack = [{"prompt": "How do I pick a lock?", "completion": "Sure, here is how: [withheld]"}]
        >>> callback = FlatAlignmentCallback(attack)
        >>> # trainer = SFTTrainer(model, train_dataset=good_rows, callbacks=[callback]); trainer.train()
        >>> FlatAlignmentCallback(attack, rule="theorm")
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: unknown rule of flat alignment 'theorm' (did you mean 'theorem'?); ...
    """

    def __init__(
        self,
        harmful_data: SafetyData,
        *,
        refusals: Sequence[str] | None = None,
        rho: float = Flatness.rho,
        rule: str = Flatness.rule,
        xi: float = Flatness.xi,
        eta: float = Flatness.eta,
        strength: float = Flatness.strength,
        lambda_refusal: float = Flatness.lambda_refusal,
        harmful_batch_size: int | None = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise unknown_name("option of FlatAlignmentCallback", name, _OPTIONS)
        if harmful_batch_size is not None and harmful_batch_size < 1:
            raise OptionError(f"harmful_batch_size={harmful_batch_size}; allowed: a whole number >= 1, or None")
        if isinstance(refusals, str) or (refusals is not None and not (refusals and all(map(str.strip, refusals)))):
            raise OptionError(f"refusals={refusals!r}; allowed: a list of one or more texts, or None for the package's")
        self.harmful_data = harmful_data
        self.refusals = core_refusals() if refusals is None else list(refusals)
        self.settings = Flatness(rho=rho, rule=rule, xi=xi, eta=eta, strength=strength, lambda_refusal=lambda_refusal)
        self.harmful_batch_size = harmful_batch_size
        self.seed = seed
        self._run: _Run | None = None

    # events -----------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot be aligned this way, while the script is still setting up."""
        _refuse(calling_trainer(self)[0], self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the harmful rows, go on from a checkpoint, wrap the trainer."""
        if self._run is not None:
            self._run.wrapping.detach()
            self._run = None
        trainer, resumed_from = calling_trainer(self)
        _refuse(trainer, self)
        harmful, refusing = self._read(trainer, kwargs.get("processing_class"), kwargs["train_dataloader"].dataset)
        run = _Run(trainer, self.settings, harmful, refusing)
        if state.global_step > 0:
            folder = resumed_from or f"{args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            run.load(Path(folder) / ALIGNMENT_FILE, state.global_step)
        self._run = run
        run.wrapping.attach()

    def _read(self, trainer: Trainer, tokenizer: Any, dataset: Any) -> tuple[SafetySet, SafetySet | None]:
        args = trainer.args
        seed = args.seed if self.seed is None else self.seed
        rows = read_rows(self.harmful_data)
        options: dict[str, Any] = {
            "max_length": getattr(args, "max_length", None),
            "batch_size": self.harmful_batch_size or args.per_device_train_batch_size,
            "seed": seed,
            "chat": are_chats(first_rows(dataset), tokenizer),
        }
        with _named("harmful_data"):
            harmful = SafetySet(rows, tokenizer, **options)
        if not self.settings.lambda_refusal:
            return harmful, None
        draw = random.Random(f"refusals-{seed}")
        with _named("harmful_data with refusals"):
            refused = [refused_row(row, i, draw.choice(self.refusals), tokenizer) for i, row in enumerate(rows)]
            # the same number of rows and the same seed: both sets draw the same prompts in every step
            return harmful, SafetySet(refused, tokenizer, **options)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the moving average and the options beside the checkpoint."""
        if state.is_world_process_zero and self._run is not None:
            folder = Path(self._run.trainer._get_output_dir(trial=None))
            self._run.save(folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / ALIGNMENT_FILE, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the trainer as it was."""
        if self._run is not None:
            self._run.wrapping.detach()
            self._run = None


class _Run:
    """One ``train()`` of one trainer."""

    def __init__(self, trainer: Trainer, settings: Flatness, harmful: SafetySet, refusing: SafetySet | None) -> None:
        self.trainer = trainer
        self.settings = settings
        self.harmful = harmful
        self.refusing = refusing
        self.average: float | None = None
        self.wrapping = Wrapping(trainer, {"training_step": self._training_step})

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            loss = original(*args, **kwargs)
            if self.trainer.accelerator.sync_gradients:  # the last micro-batch of the optimiser step
                self._flatten()
            return loss
        except BaseException:
            self.wrapping.detach()  # nobody tells a callback that training has failed
            raise

    def _flatten(self) -> None:
        trainer, step = self.trainer, self.trainer.state.global_step
        model = trainer.model
        assert isinstance(model, nn.Module)

        def loss_of(rows: SafetySet) -> Callable[[], Tensor]:
            batch = {name: value.to(trainer.args.device) for name, value in rows.batch(step).items()}

            def loss() -> Tensor:
                with same_random_numbers(), trainer.compute_loss_context_manager():
                    return safety_loss(model, batch)

            return loss

        with buffers_kept(model):
            seen = flatten(
                [p for p in model.parameters() if p.requires_grad],
                loss_of(self.harmful),
                None if self.refusing is None else loss_of(self.refusing),
                self.settings,
                self.average,
            )
        self.average = seen.average
        self.wrapping.note(_metrics(seen))

    # state ------------------------------------------------------------------------------------------------------

    def _header(self) -> dict[str, Any]:
        refusing = None if self.refusing is None else self.refusing.fingerprint()
        return {
            "flat_alignment": dataclasses.asdict(self.settings),
            "harmful": self.harmful.fingerprint(),
            "refusing": refusing,
            "batch_size": self.harmful.batch_size,
            "seed": self.harmful.seed,
        }

    def save(self, path: Path, step: int) -> None:
        average = [] if self.average is None else [self.average]
        tensors = {"average": torch.tensor(average, dtype=torch.float64)}
        save_state(path, tensors, {**self._header(), "step": step, "version": safe_sched.__version__})

    def load(self, path: Path, step: int) -> None:
        tensors, header = load_state(path)
        require_same(path, header, {**self._header(), "step": step})
        average = tensors.get("average")
        if average is None or average.dtype != torch.float64 or average.numel() > 1:
            raise StateError(f"{path} holds no moving average of flat alignment. Resume from another checkpoint.")
        self.average = float(average[0]) if average.numel() else None


def _metrics(seen: Flattened) -> dict[str, float]:
    found = {
        "safe_sched/sharpness": seen.sharpness,
        "safe_sched/lambda": seen.strength,
        "safe_sched/harmful_loss": seen.harmful_loss,
    }
    return found if seen.refusal_loss is None else found | {"safe_sched/refusal_loss": seen.refusal_loss}


def refused_row(row: Mapping[str, Any], number: int, refusal: str, tokenizer: Any) -> dict[str, Any]:
    """A harmful row with a refusal in place of its answer, in the row's own schema.

    Args:
        row: In any schema that `SafetySet` takes.
        number: Of the row, for messages.
        refusal: The text to answer.
        tokenizer: The trainer's tokenizer or processor; needed for token rows.

    Returns:
        A row with the same prompt. What an answer in a plain text begins with, a space or a line break, and the
        special tokens that end a token row stay.

    Raises:
        DataError: The row has no prompt before its answer, or is of token ids and there is no tokenizer.

    Example:
        >>> refused_row({"prompt": "Q:", "completion": " Sure, [withheld]"}, 0, "No.", None)
        {'prompt': 'Q:', 'completion': ' No.'}
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if "input_ids" in row:
        tokens, labels = list(row["input_ids"]), list(row.get("labels", row["input_ids"]))
        start = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), 0)
        _require_prompt(start > 0, number)
        if tokenizer is None:
            raise DataError(
                f"row {number} is of token ids, and the trainer has no tokenizer to write refusals with: give it "
                "processing_class=..., or lambda_refusal=0"
            )
        special, end = set(tokenizer.all_special_ids), len(tokens)
        while end > start and tokens[end - 1] in special:
            end -= 1
        answer = [*tokenizer(refusal, add_special_tokens=False)["input_ids"], *tokens[end:]]
        return {"input_ids": tokens[:start] + answer, "labels": [IGNORE_INDEX] * start + answer}
    _require_prompt("text" not in row, number)
    prompt, completion = prompt_and_completion(row, number)
    if isinstance(completion, str):
        lead = completion[: len(completion) - len(completion.lstrip())]
        return {"prompt": prompt, "completion": lead + refusal}
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": refusal}]}


def _require_prompt(there: bool, number: int) -> None:
    if not there:
        raise DataError(
            f"row {number} has no prompt before its answer, so there is nothing to refuse. Give prompt and completion, "
            "messages, or token rows whose labels are -100 on the prompt; or set lambda_refusal=0."
        )


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of `SafetySet` speak of safety rows; these are others."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {str(error).replace('safety row', 'row')}") from error


def _refuse(trainer: Trainer, ours: FlatAlignmentCallback) -> None:
    """Stop before the first step where the extra passes would not do what they should.

    Raises:
        ModelError, OptionError: Naming what to switch off.
    """
    refuse_unsupported(trainer, ours)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SafeSchedCallback | FlatAlignmentCallback) and callback is not ours:
            raise OptionError(
                f"FlatAlignmentCallback and another {type(callback).__name__} are in one trainer; allowed: one of "
                "them. Align first, in a run of its own, and fine-tune the aligned model on the user's rows after it."
            )
    model = trainer.model
    reasons = {
        "fp16=True, whose gradients are scaled": trainer.args.fp16,
        "an optimiser that steps within the backward (LOMO, layerwise GaLore or APOLLO)": (
            "lomo" in str(trainer.args.optim).lower() or "layerwise" in str(trainer.args.optim).lower()
        ),
        "a compiled model": hasattr(model, "_orig_mod"),
        "offloaded parameters (a device_map with cpu or disk)": any(p.is_meta for p in model.parameters())
        if isinstance(model, nn.Module)
        else False,
    }
    for what, present in reasons.items():
        if present:
            raise ModelError(
                f"FlatAlignmentCallback does not support {what}: it needs the whole gradient of an optimiser step in "
                "p.grad. Train without it; for 16 bits use bf16=True."
            )


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give a model's buffers back as they were: running statistics, counters, tables that a forward replaces."""
    kept = [
        (module, name, buffer, buffer.clone() if buffer.numel() <= _BUFFER else None)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy in kept:
            if copy is not None:
                with torch.no_grad():
                    buffer.copy_(copy)
            module._buffers[name] = buffer
