"""Memory and time of a configuration on hardware that need not be there; what to change so that it fits.

rehearsal: the model on the meta device. work: of an operator. zero: what the engine holds. step: all of one rank's
step. memory: bytes by part. cluster, time: hardware, and seconds on it. fitting, choice: changes that fit. search: the
fastest settings on a cluster.
"""

from visft_ds.planner.choice import memory_of, settle_recompute
from visft_ds.planner.fitting import Suggestion, fitting_settings
from visft_ds.planner.memory import MemoryPlan, plan_memory
from visft_ds.tasks.spec import Content

__all__ = ["Content", "MemoryPlan", "Suggestion", "fitting_settings", "memory_of", "plan_memory", "settle_recompute"]
