"""safe-sched: how much may each row of a fine-tuning set teach?

The core knows no trainer. It turns what a training step computes anyway into one weight per row, and a gate that
binds the weight in the backward pass. `safe_sched_hf` plugs it into HF Trainer and TRL.
"""

from safe_sched.audit.run import audit  # from here on the function; the package's classes: from safe_sched.audit import
from safe_sched.errors import SafeSchedError
from safe_sched.needs import NLL
from safe_sched.scheduler import Observation, PerRow, Scheduler, State
from safe_sched.schedulers import BDS, Antibody, BDSReleased, Fixed, NeuralBDS, combine
from safe_sched.version import __version__

__all__ = [
    "BDS",
    "NLL",
    "Antibody",
    "BDSReleased",
    "Fixed",
    "NeuralBDS",
    "Observation",
    "PerRow",
    "SafeSchedError",
    "Scheduler",
    "State",
    "__version__",
    "audit",
    "combine",
]
