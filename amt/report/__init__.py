"""Results shown: tables, figures, the page, TensorBoard."""
