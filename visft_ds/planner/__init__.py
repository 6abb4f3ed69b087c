"""Memory and time of a configuration on hardware that need not be there; what to change so that it fits.

meta_step: a step on the meta device, and the work of its operators. zero: what the engine holds. step: all of a rank's
step, bytes by part. messages: what ranks send. fitting: changes that fit. cluster: hardware, and seconds on it. search:
the fastest settings on a cluster.
"""
