"""A run: its processes, its folder, its loop of steps, checkpoints and resume, its log, trackers and screen.

Others take ``run.Run``, ``session``, ``state``, ``log.RunLog``, ``folder``, ``checkpoint``, ``peers`` (what became
of the other processes), ``exchange`` (between processes), ``read`` (a folder read back), ``closed_output``
(nobody reads what is printed), ``fields`` (numbers as text), ``screen`` (what is printed), ``agreement`` (of what
processes draw), ``inputs`` and ``named_files`` (what a run is made from), ``manifest`` (hashes of files), ``same_run``
(what differs between two), and ``stopping`` (requests to stop); the command also ``owner`` (whose folder it is),
``secrets`` (what no file holds), ``evaluations`` (what `grpo eval` leaves) and ``push`` (what goes to the hub).
"""
