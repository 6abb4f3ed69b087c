"""Does stage 2 help on data that it was not trained for? `visft ablate` trains variants of the recipe and
judges them.

    ablate.py    the command: its flags, and the steps of an experiment in their order
    variants.py      what is trained: the recipe, its controls and its variants
    results.py   one table of all variants, and the sentence whether the claim holds

A variant is a row of `VARIANTS` and of docs/evaluation.md. The words of steps may change: a step runs again
when its command is another one. The claim may not: with CLAIM_SEEDS seeds both intervals of the first variant
exclude zero, in the primary number of `visft judge`. Nothing in the package imports this room.
"""
