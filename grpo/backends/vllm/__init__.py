"""Rollouts with vLLM. The engine is always a process of its own, reached over HTTP: beside the trainer or elsewhere.

Others take ``teacher`` (a teacher that servers hold). Read ``backend.py`` first. ``api.py`` alone knows vLLM's routes,
``serve.py`` and ``worker.py`` run on vLLM's side.
"""
