"""Captioning: an LSTM with attention over the cells of the feature map (Show, Attend and Tell).

* `head`: the module, its beam search, and the criterion with a method for each loss.
* `data`: the caption an image is learnt from, as ids of the vocabulary (`tasks.vocabulary`).
* `metrics`: CIDEr, BLEU and ROUGE-L as coco-caption has them; `tokenizer`: its words, without Java.
* `config`: the keys of `visft.tasks.captioning`; `spec`: the `Task`.

Names of modules stand in exported files, and `head.PUBLISHED_NAMES` translates them to the published ones:
they may not change. Metrics are compared with pycocoevalcap (tests/tasks/test_caption_metrics.py); a rule of
the tokenizer that changes a number needs a new name in `tokenizer.TOKENIZER`.
"""
