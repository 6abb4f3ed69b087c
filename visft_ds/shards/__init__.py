"""COCO -> shards, and what keeps shards whole: building, verifying, repairing, comparing."""
