"""All that knows masks, but no task by its name: shared by instance, semantic and panoptic segmentation.

`config` options of the plain head and of the loss · `data` large-scale jitter, targets, their packing ·
`rasters` COCO's polygons and run-length codes drawn as soft masks · `plain` the head of queries and cells,
`pmt` its published weights · `regions` masks that do not overlap, drawn · `output` what heads of masks
predict · `loss` matching and criterion, at `points` · `interpolation`, `norm` masks of padded images · `task`
the methods of these tasks.

Names of the plain head's modules stand in exported files and in `pmt`: they stay. Points depend on a sample's
key and a layer alone, and padded cells on nothing: a loss must not depend on how a batch is divided. Options
are the fields of `config`; a new one belongs there with its unit, range and source.
"""
