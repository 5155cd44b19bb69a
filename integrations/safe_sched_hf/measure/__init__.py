"""What is measured of rows with a model, for training and for an audit."""

from typing import Any

from safe_sched.needs import EncoderVector, HiddenState, Probe, ReferenceLoss, RefusalOdds
from safe_sched.training.loop import Measurement
from safe_sched_hf.measure.features import EncoderMeasurement, HiddenStateMeasurement
from safe_sched_hf.measure.probe import ProbeMeasurement, ReferenceLossMeasurement
from safe_sched_hf.measure.refusals import RefusalOddsMeasurement

MEASUREMENTS: dict[str, type[Measurement[Any]]] = {
    Probe.name: ProbeMeasurement,
    ReferenceLoss.name: ReferenceLossMeasurement,
    RefusalOdds.name: RefusalOddsMeasurement,
    HiddenState.name: HiddenStateMeasurement,
    EncoderVector.name: EncoderMeasurement,
}
"""What measures each need, by its name."""
