"""Memory and time of a configuration on hardware that need not be there; what to change so that it fits.

meta_step: a step on the meta device, and the work of its operators. zero: what the engine holds. step: all of a rank's
step, bytes by part. messages: what ranks send. fitting: changes that fit. cluster: hardware, and seconds on it. search:
the fastest settings on a cluster.
"""

from visft_ds.planner.fitting import Suggestion, fitting_settings
from visft_ds.planner.step import MemoryPlan, PlannedRun, plan_largest, plan_stream, run_of
from visft_ds.tasks.spec import Content

__all__ = [
    "Content",
    "MemoryPlan",
    "PlannedRun",
    "Suggestion",
    "fitting_settings",
    "plan_largest",
    "plan_stream",
    "run_of",
]
