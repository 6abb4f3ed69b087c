"""Backbones (image -> feature map) and the adapters that go into them."""
