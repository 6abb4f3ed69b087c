"""`visft judge`: what further training gained and cost, by frozen features on other data.

`command` runs the steps. `model_text` and `kinds` read the command line; `classes`, `dense_sets`, `images`
open data sets. `comparison` chooses layers (`layers`), brings controls to equal feature shift (`shift`,
`models`) and scores (`scoring` caches; `encoding` and `encoders` make features of images). `table` takes
differences with `intervals`, `verdict` says the word, `judge.html.j2` is the page; `rehearsal` is --dry-run.
`benchmark` is the interface of all that gives numbers. Probes of maps share `dense_probes` and `heads`, all
probes `rows` and `protocol`.

To add a benchmark: a module with its NUMBERS and a function that returns a `Benchmark`, and an entry in
`kinds.KINDS`; help, page and manual are made of these. A change of what a score is raises `scoring.VERSION`.
"""
