"""The callback: what happens at each event of a trainer, from its construction to the end of training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from safe_sched.data.rows import CORE
from safe_sched.errors import DataError, OptionError, unknown_name
from safe_sched.estimators.head import Scorer
from safe_sched.scheduler import Scheduler
from safe_sched.schedulers import build
from safe_sched.training.checkpoint import STATE_FILE
from safe_sched.training.loop import Company, Measurement, Part, Run, measurements_for, part_of
from safe_sched.training.ranks import Exchange
from safe_sched.training.record import RunRecord
from safe_sched.training.session import Normalizer, Session, require_normalizer
from safe_sched.version import __version__, versions
from safe_sched_hf.attach import Attachment, calling_trainer, refuse_sharded, refuse_unsupported, trial_of
from safe_sched_hf.columns import ColumnReader, read_prior, require_prior
from safe_sched_hf.distributed import exchange_of, telling
from safe_sched_hf.noise import ParameterNoise
from safe_sched_hf.rows import first_rows, index_rows
from safe_sched_hf.safety import SafetyBatch, SafetyData, SafetySet, are_chats
from safe_sched_hf.sampling import Sampling

Act = Literal["weight", "sample"]

_OPTIONS = (
    "scheduler",
    "safety_data",
    "safety_batch_size",
    "safety_weight",
    "normalizer",
    "model_temperature",
    "act",
    "parts",
    "seed",
    "report",
    "prior",
    "rows",
)


class SafeSchedCallback(TrainerCallback):
    """Weighs every row that a trainer trains on, and trains on safety rows beside them.

    Add it to the callbacks of a `transformers.Trainer` or a `trl.SFTTrainer`; nothing else of the script changes. The
    loss of an optimiser step becomes, as in BDS (arXiv 2510.27172)::

        safety_weight * mean over safety rows of nll
            +  the trainer's own loss, row i weighted by w_i

    Args:
        scheduler: A scheduler (`safe_sched.BDS`, `safe_sched.Fixed`), or its name in the catalogue.
        safety_data: Harmful prompts with refusals: ``"core"`` (about 250 rows that come with the package), a path to a
            .jsonl, .json, .csv or .parquet file, a list of dicts or a `datasets.Dataset`, in any schema that TRL's
            SFTTrainer takes. Plain prompts and completions are put into the chat template where the training rows
            are chats. None: no safety batch.
        safety_batch_size: Safety rows per optimiser step, >= 1; with `safe_sched_hf.Lisa`, per safe step. None:
            ``per_device_train_batch_size``, as many times as there are processes. They divide them among themselves.
        safety_weight: Factor of the safety loss, >= 0. At 0 the rows are not trained on: the scheduler only asks them.
        normalizer: What the weighted loss is a mean over: ``"token"``, the trainer's own; or ``"row"``, the mean over
            rows of each row's mean. See `safe_sched.training.session.Session`.
        model_temperature: Temperature of Langevin noise on the model's own parameters, >= 0; 1 makes the run an SGLD
            sample of the posterior over the model as well (see `safe_sched_hf.noise`), 0 leaves the optimiser alone.
        act: What a weight does to a row. ``"weight"``: it multiplies what the row teaches. ``"sample"``: it is the
            probability that the row is trained on at all; rows left out cost nothing, and the expected gradient is the
            same (see `safe_sched.training.sampling`).
        parts: What else takes part in the run: objects such as `safe_sched_hf.Lisa`, or names of registered parts; see
            `safe_sched.training.loop`.
        seed: Random seed of the order of the safety rows, of that noise and of what is sampled. None: the trainer's.
        report: What is left in the output folder beside the manifest: ``"table"``, what `table` returns, or ``"none"``.
        prior: The column of the training set that says of every row how likely it is harmful, from 0 to 1, before the
            run: ``"safe_sched.p_harmful"`` in the rows that ``safe-sched audit --out`` writes. For `safe_sched.BDS`,
            `safe_sched.NeuralBDS` and `safe_sched.Fixed`, see `safe_sched.estimators.prior`.
        rows: The training set as it was before the trainer prepared it, a `datasets.Dataset` or a list of rows. Needed
            only where a scheduler reads a column that the trainer has dropped: `safe_sched.Fixed` with a weight column
            and packing.

    Raises:
        OptionError: An option is unknown or out of range.
        DataError, ModelError: When training starts: the data, the model or the trainer cannot be defended, with the
            cause and the remedy.

    Example:
        >>> from safe_sched import BDS
        >>> from safe_sched_hf import SafeSchedCallback
        >>> callback = SafeSchedCallback(BDS(), safety_data="core")
        >>> # trainer = SFTTrainer(model, train_dataset=rows, callbacks=[callback]); trainer.train()
        >>> # callback.table()
        >>> SafeSchedCallback(BDS(), safety_date="core")
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: unknown option of SafeSchedCallback 'safety_date' (did you mean ...
    """

    def __init__(
        self,
        scheduler: Scheduler[Any] | str = "bds",
        *,
        safety_data: SafetyData | None = None,
        safety_batch_size: int | None = None,
        safety_weight: float = 1.0,
        normalizer: Normalizer = "token",
        model_temperature: float = 0.0,
        act: Act = "weight",
        parts: Sequence[Part | str] = (),
        seed: int | None = None,
        report: Literal["none", "table"] = "table",
        prior: str | None = None,
        rows: Any = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise unknown_name("option of SafeSchedCallback", name, _OPTIONS)
        if safety_batch_size is not None and safety_batch_size < 1:
            raise OptionError(f"safety_batch_size={safety_batch_size}; allowed: a whole number >= 1, or None")
        if not 0 <= safety_weight < float("inf"):
            raise OptionError(f"safety_weight={safety_weight}; allowed: a finite number >= 0")
        if not 0 <= model_temperature < float("inf"):
            raise OptionError(f"model_temperature={model_temperature}; allowed: a finite number >= 0, usually 0 or 1")
        if report not in ("none", "table"):
            raise OptionError(f"report={report!r}; allowed: 'none', 'table'")
        require_normalizer(normalizer)
        if act not in get_args(Act):
            raise OptionError(f"act={act!r}; allowed: {', '.join(map(repr, get_args(Act)))}")
        self.scheduler = build(scheduler)
        if prior is not None:
            require_prior(prior, self.scheduler)
        self._company = Company(
            measurements_for(self.scheduler), _parts(parts, act, safety_data, safety_weight, model_temperature)
        )
        self._company.each(
            "require",
            self.scheduler,
            {"safety_data": safety_data, "safety_weight": safety_weight, "model_temperature": model_temperature},
        )
        self.prior = prior
        self.rows = rows
        self.act: Act = act
        self.safety_data = safety_data
        self.safety_batch_size = safety_batch_size
        self.safety_weight = safety_weight
        self.normalizer: Normalizer = normalizer
        self.model_temperature = model_temperature
        self.seed = seed
        self.report = report
        self.source: dict[str, Any] | None = None  # of the rows before they were tokens, where a front end knows it
        self._record: RunRecord | None = None
        self._session: Session | None = None
        self._safety: SafetySet | None = None
        self._attachment: Attachment | None = None

    @property
    def session(self) -> Session:
        """What has been learned so far; there from the start of training on."""
        if self._session is None:
            raise DataError("there is no session yet: call trainer.train() first")
        return self._session

    @property
    def measurements(self) -> dict[str, Measurement[Any]]:
        """What measures the needs of the scheduler, by name."""
        return {measurement.name: measurement for measurement in self._company.measurements}

    @property
    def parts(self) -> list[Part]:
        """The parts of the loop beside the measurements, those that options of the callback stand for among them."""
        return self._company.parts

    def table(self) -> pa.Table:
        """One line per training row, in the order in which the trainer holds them.

        Returns:
            ``row`` int64, ``key`` uint64 (the row's content), ``weight`` float32 (as of the last step), ``seen`` int32
            (how often its content was trained on); with `BDS` also ``p_harmful`` and its interval, see
            `safe_sched.training.session.Session.table`.
        """
        return self.session.table()

    def scorer(self) -> Scorer:
        """What a `safe_sched.NeuralBDS` has learned, for rows that it has never seen.

        Raises:
            OptionError: Another scheduler was at work, which knows of its own rows only.
        """
        make = getattr(self.session.scheduler, "scorer", None)
        if make is None:
            raise OptionError(
                f"{self.session.scheduler.name!r} knows of the rows that it was trained on and of no others; use "
                "SafeSchedCallback(NeuralBDS(), ...)"
            )
        return make(self.session.state)

    # events -----------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what can never be defended, while the script is still setting up."""
        trainer, _ = calling_trainer(self)
        self._refuse(trainer)
        dataset = trainer.train_dataset
        if hasattr(dataset, "__len__") and len(dataset) == 0:  # pyright: ignore[reportArgumentType]
            raise DataError("the training set has no rows; give the trainer at least one row to train on")

    def _refuse(self, trainer: Trainer) -> None:
        refuse_unsupported(trainer, self, ranks=True)
        self._company.each("refuse", trainer)
        if trainer.is_fsdp_enabled:
            refuse_sharded(self._company)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Identify the rows, read the safety set, go on from a checkpoint, attach."""
        if self._attachment is not None:
            self._attachment.detach()
        trainer, resumed_from = calling_trainer(self)
        self._refuse(trainer)
        exchange = exchange_of(trainer)
        with telling(exchange):
            self._begin(trainer, resumed_from, exchange, args, state, kwargs)

    def _begin(
        self,
        trainer: Trainer,
        resumed_from: str | None,
        exchange: Exchange,
        args: TrainingArguments,
        state: TrainerState,
        kwargs: dict[str, Any],
    ) -> None:
        loader = kwargs["train_dataloader"]
        index = index_rows(loader.dataset, loader.collate_fn, progress=not args.disable_tqdm)
        tokenizer, sample = kwargs.get("processing_class"), first_rows(loader.dataset)
        self._safety = self._read_safety(self.safety_data, args, tokenizer, sample)
        settings: dict[str, Any] = {"safety": self._safety_settings(), "act": self.act, "prior": None}
        settings["parts"] = self._company.settings()
        if self.model_temperature:
            settings["model_temperature"] = self.model_temperature
        columns = ColumnReader.connect(index, trainer, loader, self.rows)
        self._session = Session(self.scheduler, index, self.normalizer, settings, exchange)
        self._session.settings |= columns.settings()
        if self.prior is not None:
            self._session.take_prior(read_prior(trainer.train_dataset, self.prior))
        seed = args.seed if self.seed is None else self.seed
        model = trainer.model
        assert isinstance(model, nn.Module)
        run = Run(
            model,
            self._session,
            torch.device(args.device),
            backward=trainer.accelerator.backward,
            precision=trainer.compute_loss_context_manager,
            prepare=lambda inputs: trainer._prepare_inputs(dict(inputs)),
            rows_at_once=args.per_device_train_batch_size,
            safety=self._safety,
            tokenizer=tokenizer,
            default_safety=functools.cache(lambda: self._read_safety(CORE, args, tokenizer, sample)),
            seed=seed,
            dataset=loader.dataset,
            collate=loader.collate_fn,
            progress=not args.disable_tqdm,
            sharded=bool(trainer.is_fsdp_enabled),
            safety_weight=self.safety_weight,
            wrapped=trainer.model_wrapped,
            trainer=trainer,
            optimizer=trainer.optimizer,
            loader=loader,
        )
        company = self._company
        company.begin(run)
        folder = None
        if state.global_step > 0:
            folder = resumed_from or f"{args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            company.load(self._session.load(Path(folder) / STATE_FILE, steps=state.global_step))
        self._session.require_same()
        company.each("ready")
        attachment, self._record = Attachment(trainer, run, company), None
        exchange("ready")
        # the last thing before training: an error until here, on any rank, leaves the folder as it is
        if state.is_world_process_zero:
            self._record = RunRecord(trainer._get_output_dir(trial_of(trainer)) or ".", folder)
            self._record.begin(self._manifest(trainer, state))
        exchange("started")  # the others' next collective is the trainer's, where they would not hear of an error
        self._attachment = attachment
        attachment.attach()

    def _read_safety(
        self, data: SafetyData | None, args: TrainingArguments, tokenizer: Any, sample: list[list[int]]
    ) -> SafetySet | None:
        if data is None:
            return None
        return SafetySet(
            data,
            tokenizer,
            max_length=getattr(args, "max_length", getattr(args, "max_seq_length", None)),  # TRL; Axolotl
            batch_size=self.safety_batch_size or args.per_device_train_batch_size * args.world_size,
            seed=args.seed if self.seed is None else self.seed,
            chat=are_chats(sample, tokenizer),
        )

    def _safety_settings(self) -> dict[str, Any] | None:
        return None if self._safety is None else self._safety.settings() | {"weight": self.safety_weight}

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the parts."""
        if self._attachment is not None:
            self._company.each("begin_epoch")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are empty now, so the user's micro-batches add to those of the parts."""
        if self._attachment is not None:
            with telling(self.session.exchange):
                self._attachment.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the parts that the parameters have moved."""
        if self._attachment is not None:
            self._company.each("after_optimizer")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the scheduler learn from the step, then tell the parts."""
        attachment = self._attachment
        assert attachment is not None
        attachment.note(self.session.end_step())
        last = control.should_training_stop or state.global_step >= state.max_steps
        attachment.note(self._company.after_step(last=last, log=control.should_log))
        if control.should_log:
            attachment.note({"safe_sched/ess": self.session.effective_sample_size()})

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where something has stopped training early: what parts still owe."""
        if self._attachment is not None and control.should_training_stop:
            self._attachment.note(self._company.after_step(last=True, log=False))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the scheduler's state beside the checkpoint."""
        if self._attachment is not None:
            folder = Path(self._attachment.trainer._get_output_dir(trial_of(self._attachment.trainer)))
            folder = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            about = {} if self._record is None else self._record.checkpoint(folder)
            self.session.save(folder / STATE_FILE, self._company.save(), version=__version__, **about)
            self._company.each("forget")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the trainer as it was, and write down that the run was defended."""
        if self._attachment is None:
            return
        trainer = self._attachment.trainer
        if not args.load_best_model_at_end:
            self._company.after_step(last=True, log=False)  # stopped by what the last evaluation said
        self._attachment.detach()
        self._attachment = None
        if self._record is not None and self.session.steps:
            self._record.finish(self._manifest(trainer, state), self.table(), keep_table=self.report == "table")

    def _manifest(self, trainer: Trainer, state: TrainerState) -> dict[str, Any]:
        session = self.session
        seen = session.seen > 0
        return {
            "trainer": type(trainer).__name__,
            "scheduler": session.scheduler.settings(),
            "normalizer": session.normalizer,
            **session.settings,
            "data": {
                "fingerprint": session.index.fingerprint(),
                "rows": session.index.rows,
                "distinct_rows": session.index.slots,
                "distinct_rows_trained_on": int(seen.sum()),
            },
            # end_step stops the run where this would be less than all
            "coverage": {
                "steps": session.steps,
                "rows_trained_on": session.rows_trained,
                "rows_weighed": session.rows_trained,
                "trainer_steps": state.global_step,
            },
            **({} if self.source is None else {"source": self.source}),
            "parts": [part.settings() | part.summary() for part in self._company.parts],
            "versions": versions(("torch", "transformers", "trl", "peft", "accelerate", "datasets")),
        }


def _parts(
    given: Sequence[Part | str], act: Act, safety_data: SafetyData | None, safety_weight: float, temperature: float
) -> list[Part]:
    """The parts of a run: those that were given, and those that options of the callback stand for."""
    parts = [part_of(part) for part in given]
    if safety_data is not None and safety_weight and not any(part.brings_safety_rows for part in parts):
        parts.append(SafetyBatch())
    if act == "sample":
        parts.append(Sampling())
    return [*parts, ParameterNoise(temperature)] if temperature else parts
