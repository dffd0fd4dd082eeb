"""A run's folder, its checkpoints and resume, its log, trackers and screen, and what every stage sets up.

Others take ``session``, ``state``, ``log.RunLog``, ``folder``, ``checkpoint``, ``read`` (a folder read back) and
``whole.write_whole``."""
