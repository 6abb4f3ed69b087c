"""Detection: an asymmetric DETR on one feature map."""
