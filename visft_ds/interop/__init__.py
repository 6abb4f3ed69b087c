"""Weights of other libraries: read, and written in their forms.

weights: files, tensor by tensor, of no known meaning. layouts: which backbone a file holds, under which
names. adapter: LoRA apart from a model; peft_folder: its files. heads, published: files of heads, ours and
the authors'. formats: the forms of weights that `visft export` writes; export, transformers_names: their
content; vlm: a tower inside a vision-language model; card: the model card.

A new form of weights is an entry in `formats.FORMATS` and in `export.CONTENT` a function that makes its
content, checked against its library in tests/interop. Names in files are fixed by the libraries: change them
only where a library changes. This room knows nothing of runs: what a run leaves is found by
`visft_ds.run_files`, and merged by `visft_ds.merge`.
"""
