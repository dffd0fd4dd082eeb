"""The groups of a step: sampled by a backend, in rounds until enough have a signal, or replayed from earlier steps.

Others take ``groups.draw_groups``, ``rollouts.Rollouts``, ``replay.remembered`` and ``replay.restored``,
and ``teaching.ask_teacher`` (what a server says of completions)."""
