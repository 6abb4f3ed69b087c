"""A trained model on images of one's own: loaded in one line, typed results, drawings; `visft predict`.

loading: a model rebuilt of files (run, export, checkpoint, merged weights), for `visft evaluate` and `visft
judge`, too. images: files, arrays and tensors to pixels. large: pictures that are decoded part by part.
model: `load`, `Model.predict`, features of the backbone. results: boxes, masks, caption of an image.
exported: folders of `visft export`. likeness: near duplicates of pictures. command, cli: `visft predict`.

Nothing here trains, and nothing in a folder that is read is changed. To touch: all files of a model are
found in `loading.source_of` alone; what `load` and `Prediction` offer is the public interface
(docs/reference.py). A new kind of input is a case in `images.opened`.
"""
