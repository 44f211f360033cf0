"""A walk-through: comparing checkpoints of one's own on one's own photographs."""
