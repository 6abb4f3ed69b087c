"""`visft judge`: gains and costs of further training, by frozen features on other data.

`command` runs the steps. `model_text` and `kinds` read the command line; `classes`, `dense_sets`, `images`
open data sets, `in_domain` finds out whether a model was trained on them. `comparison` chooses layers
(`layers`), brings controls to equal feature shift (`shift`, `models`, `variants`) and scores (`scoring`
caches; `encoding`, `encoders` and `text` make features). `table` takes differences with `intervals`,
`verdict` says the word, `judge.html.j2` and `sheet` are the page; `rehearsal` is --dry-run.

`benchmark` is the interface of all that gives numbers: `classification`, `linear_classification`,
`few_shots`, `zero_shot`, `retrieval`, `objects`, `ocr`, `agreement`, `vqa` with `questions` and
`vqa_accuracy`, `captions`; the last two also by a vision-language model (`vlm_text`); and of maps
`segmentation`, `linear_segmentation`, `in_context`, `depth`. Probes share `rows`, `protocol`, `crops`, `knn`,
`logistic`, `ranking`; those of maps also `dense_probes`, `heads`, `miou`.

To add a benchmark: a module with its NUMBERS and a function `benchmark`, and an entry in `kinds.KINDS`;
help, page and manual are made of these. A change of what a score is raises `scoring.VERSION`.
"""
