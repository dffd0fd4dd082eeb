"""A run folder as pictures, as a page, as one line.

Others take ``write``."""
