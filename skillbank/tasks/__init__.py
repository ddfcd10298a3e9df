"""Tasks that models are trained for and judged by."""
