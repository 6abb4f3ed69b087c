"""What segmentation and semantic segmentation share."""
