"""The figures of the study, one module a figure, drawn from the committed results alone."""
