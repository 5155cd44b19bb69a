"""safe-sched: how much may each row of a fine-tuning set teach?

The core knows no trainer. It turns what a training step computes anyway into one weight per row, and a gate that
binds the weight in the backward pass. `safe_sched_hf` plugs it into HF Trainer and TRL.
"""

from safe_sched.errors import SafeSchedError
from safe_sched.schedulers import BDS, Antibody, Fixed, Lisa, NeuralBDS, combine

__all__ = ["BDS", "Antibody", "Fixed", "Lisa", "NeuralBDS", "SafeSchedError", "__version__", "combine"]
__version__ = "0.1.0.dev0"
