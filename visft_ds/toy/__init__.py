"""Drawings with labels, for tests, the demo and experiments: `visft toy` writes them in COCO's own form.

`shapes.py` has the twelve categories and their outlines, `patterns.py` the textures and grounds, `styles.py`
the families of images ("a", "b", or drawn by a number), `scenes.py` draws an image with the exact visible
pixels of every shape, `questions.py` asks about it, `rooms.py` traces rooms with their depth, and `coco.py`
is the command, the captions and the files.

An image is a function of its number, seed and settings alone. A change of what is drawn, or of the order in
which random numbers are used, changes every drawing, and with it the golden losses and the numbers of the
demo. A new style or texture goes behind the existing ones, which then stay as they are.
"""
