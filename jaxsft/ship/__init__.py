"""How a model leaves: as weights, as a compiled function, quantised, with its card, or behind a port."""
