"""What a teacher on a server says of texts: each process asks of its share, and all get all of it."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

from grpo.backends import TeacherServers
from grpo.errors import RunError
from grpo.rollout.rollouts import share_of
from grpo.types import Group, TeacherSays

Text = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its completion


def teach(servers: TeacherServers, groups: Sequence[Group], accelerator: Accelerator) -> None:
    """Fill ``teacher`` of every group. The same groups on each process, all of which call it."""
    texts: list[Text] = [(group.prompt.token_ids, c.token_ids) for group in groups for c in group.completions]
    says = iter(ask_teacher(servers, texts, accelerator))
    for group in groups:
        group.teacher = [next(says) for _ in group.completions]


def ask_teacher(servers: TeacherServers, texts: Sequence[Text], accelerator: Accelerator) -> list[TeacherSays]:
    """What the teacher says of each text's completion, on every process. An error of one is raised on all."""
    says: list[TeacherSays] = []
    failure: RunError | None = None
    try:
        says = servers.ask([texts[i] for i in share_of(len(texts), accelerator)])
    except RunError as error:
        failure = error
    found = gather_object([(says, failure)])
    for _, failed in found:
        if failed is not None:
            raise failed
    return [of for mine, _ in found for of in mine]
