"""From a configuration to what trains. Modules in the order in which a start goes through them:

settle: what the data decides, as a list of (key, value, why); inputs: files that are missing, with commands.
datasets: training sets, their tasks, samples and classes. None of these three imports a tensor library.
data: the order of samples and the pipelines that make batches; materialize: values of parameters, one by one.
model: backbone, adapters and heads, parameter groups, the keys of the engine.

A new decision is a function in settle.py: it gives way to flags by itself, and the report lists it. What
hardware decides is in run/machine.py. The order in which tensors are drawn (materialize) and samples are
counted (datasets, data) is pinned by golden losses. This room knows no engine and writes no file.
"""
