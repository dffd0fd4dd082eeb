"""A run folder as pictures, as a page, in a terminal, as one line, as a model card; several beside each other.

Others take ``write`` (a page), ``live`` (a page while the run goes on), ``watch`` (in a terminal), ``compare_page``
(several runs), ``compare_suites`` (evaluations), ``chain_page`` (a chain), ``markup`` (pieces of pages),
``conversation`` (an episode) and ``card``, which is the model's README.
"""
