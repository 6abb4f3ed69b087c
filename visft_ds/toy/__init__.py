"""Toy data sets: drawn pictures in the form of COCO, and folders of classes."""
