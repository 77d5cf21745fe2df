"""Tables and figures of what a basis and a model look like; the only place that draws."""
