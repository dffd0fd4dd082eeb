"""A run folder as pictures, as a page, as one line, as a model card.

Others take ``write`` and ``card``, which is the model's README."""
