"""From a configuration to what trains: data sets, order of samples, the prepared model, the keys of its
engine.
"""
