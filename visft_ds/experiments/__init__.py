"""Programs built on the package; nothing in the package imports them."""
