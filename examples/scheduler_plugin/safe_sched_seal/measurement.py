"""Losses of rows under a second adapter of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safe_sched.errors import ModelError
from safe_sched.training.loop import Inputs, Measurement, Run
from safe_sched.training.session import Batch
from safe_sched_hf.measure.probe import learn_losses_under, same_random_numbers

from .scheduler import SafeAdapterLoss


class SafeAdapterLossMeasurement(Measurement[SafeAdapterLoss]):
    """Measures rows that are due before the training forward of their micro-batch, without gradient."""

    unsharded = "a second adapter, which is switched on for some rows"

    def begin(self, run: Run) -> None:
        """Find the adapter, or load it from its folder.

        Raises:
            ModelError: The model has no adapters.
        """
        super().begin(run)
        model: Any = run.model
        if not hasattr(model, "peft_config"):
            raise ModelError(
                f"seal compares with a second adapter, and {type(model).__name__} has none; train with LoRA (peft)"
            )
        self.adapter = self.need.adapter
        self._loaded = Path(self.adapter).is_dir()
        if self._loaded:
            self.adapter, training = "seal", model.training
            with same_random_numbers():  # peft draws the weights that it then overwrites
                model.load_adapter(self.need.adapter, adapter_name=self.adapter)
            model.train(training)

    def before_forward(self, batch: Batch, inputs: Inputs) -> None:
        """Measure what is due."""
        learn_losses_under(self.adapter, self, batch, inputs)

    def end(self) -> None:
        """Give the model back without what was loaded."""
        model: Any = self.run.model
        if self._loaded:
            model.delete_adapter(self.adapter)
            self._loaded = False
