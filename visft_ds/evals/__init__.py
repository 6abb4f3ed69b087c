"""Numbers of trained models, and their pages: `visft evaluate`, `judge`, `report` and `labels`.

evaluate: a run or any files on a split, with records of it. records: what these commands leave in their
folders, read again. report, pages: HTML pages out of templates (*.html.j2). judge/: further-trained models
compared with their base. labels/: labels that a model denies. cli: flags of all four. The predictions
themselves are made by visft_ds.evaluation, as during training, with models of visft_ds.predict.loading.

To touch: a number is computed in its task's folder (visft_ds/tasks), never here. metrics.json has a version
(records.VERSION), which changes with its content. A page loads nothing from the network, and only that of
labels runs a script.
"""
