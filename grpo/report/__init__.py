"""A run folder as pictures, as a page, in a terminal, as one line; several beside each other.

Others take ``write`` (a page), ``live`` (a page while the run goes on), ``watch`` (in a terminal) and ``compare_page``
(several runs).
"""
