"""From a configuration to what trains: data sets, order of samples, the prepared model and its values."""
