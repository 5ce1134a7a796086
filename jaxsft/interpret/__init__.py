"""What a model does: its metrics and the report on them."""
