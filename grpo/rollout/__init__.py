"""The completions of a step: sampled by a backend, drawn on until groups have a signal, replayed from earlier steps.

Others take ``groups.draw_groups``, ``rollouts.Rollouts`` and what ``replay`` keeps."""
