"""Memory and time of a configuration on hardware that need not be there; what to change so that it fits.

rehearsal: a step of the model on the meta device. zero: what the engine holds. memory: both together. fitting: changes
that fit.
"""

from visft_ds.planner.fitting import Suggestion, fitting_settings
from visft_ds.planner.memory import MemoryPlan, plan_memory
from visft_ds.planner.rehearsal import Content

__all__ = ["Content", "MemoryPlan", "Suggestion", "fitting_settings", "plan_memory"]
