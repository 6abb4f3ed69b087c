"""Contrastive image-text training: a small CLIP from nothing, and the text tower of any CLIP on new captions."""
