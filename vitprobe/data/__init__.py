"""Images, from wherever they are, in the order and shape that a comparison needs."""
