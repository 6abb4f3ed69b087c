"""Measurements of what a training configuration costs: time, memory, arithmetic, data, communication; the plan of it.

cli: the commands. harness: cases in turn, spreads, records. train (with session, timing, memory), data, data_compare,
blocks, peft, comm: one measurement each, with its record and tables. plan, plan_validation: the planner's answers.
"""
