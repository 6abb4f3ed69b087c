"""Instance segmentation: Mask2Former on one feature map."""
