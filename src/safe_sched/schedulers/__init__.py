"""The methods: each decides how much a row may teach. One a file, in the order config, state, init, weights, update."""

from safe_sched.schedulers.antibody import Antibody
from safe_sched.schedulers.bds import BDS
from safe_sched.schedulers.bds_released import BDSReleased
from safe_sched.schedulers.catalog import CATALOG, build
from safe_sched.schedulers.combined import combine
from safe_sched.schedulers.fixed import Fixed
from safe_sched.schedulers.neural import NeuralBDS

__all__ = ["BDS", "CATALOG", "Antibody", "BDSReleased", "Fixed", "NeuralBDS", "build", "combine"]
