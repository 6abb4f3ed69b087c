"""Toy data sets: drawn images in the form of COCO, and folders of classes."""
