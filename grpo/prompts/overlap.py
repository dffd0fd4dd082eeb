"""Do rows to train on repeat questions of an evaluation? Exact, by shared runs of words, and by the same words moved.

A text is its *words* (``words``): lower case, without punctuation, however it is spaced. A row overlaps a question

- ``exact``: they have the same words in the same order;
- ``13 words``: they share 13 words in a row, of which 8 in a row are no template's;
- ``8 words``: shared runs of at least 8 words, each with 8 that are no template's, cover half of the question (the
  measure for questions that are too short for the one above, or cut into pieces);
- ``same words``: they have the same words in any order, but for at most one that is no number; each number stands
  beside the same word; and what they share is no template.

**Templates.** Rows of a generated task share most of their words, and no question is known by them. So 8 words are a
template's where the same 8, with all numbers and any one word left open, stand in more than ``most`` different rows:
ten, or a thousandth of them, or for the questions themselves two, or a hundredth. The same holds for the words that the
last rule leaves open. What overlaps only by templates is counted apart.

The lengths are usual ones: 13 of GPT-3 (arXiv:2005.14165, appendix C), 8 of GPT-2 and Open-R1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo.prompts.words import RUN, Texts, Vocabulary, among, counted, is_number, run_hashes

LONG = 13  # words in a row that are proof by themselves
KINDS = ("exact", f"{LONG} words", f"{RUN} words", "same words")
COVERED = 0.5  # of a question, by runs of RUN words
TELLING = 2  # numbers, and words that are in few texts, that the same words must hold
ROWS = {"least": 10, "share": 0.001}  # in more of them than this stands what is a template's
QUESTIONS = {"least": 2, "share": 0.01}


@dataclass(frozen=True)
class Overlap:
    """Row ``row`` repeats question ``question`` (their places in what was compared): ``how``, with the words that they
    share and the share of the question that these are."""

    row: int
    question: int
    how: str
    shared: str
    covers: float


@dataclass
class Overlaps:
    """At most one overlap a row, the one that says most, in the order of rows. ``by_template`` are rows that share runs
    of words with questions, and these are all templates'; ``templates`` the commonest of such runs."""

    found: list[Overlap] = field(default_factory=list)
    by_template: int = 0
    templates: list[str] = field(default_factory=list)


def question_text(question: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a prompt: of messages those that are not the system's."""
    if isinstance(question, str):
        return question
    return "\n".join(message["content"] for message in question if message["role"] != "system")


def find_overlaps(rows: Sequence[str], questions: Sequence[str]) -> Overlaps:
    """Which rows repeat which questions."""
    vocabulary = Vocabulary()
    ours, theirs = Texts(rows, vocabulary, **ROWS), Texts(questions, vocabulary, **QUESTIONS)
    result = Overlaps()
    best = _exact(ours, theirs)
    runs = _Runs(ours, theirs)
    for one in [*runs.found(), *_same_words(ours, theirs)]:
        before = best.get(one.row)
        if before is None or _weight(one) > _weight(before):
            best[one.row] = one
    result.found = [overlap for text in sorted(best) for overlap in _of_rows(best[text], ours, theirs)]
    result.found.sort(key=lambda one: one.row)
    result.by_template = sum(len(ours.rows_of[text]) for text in runs.by_template - best.keys())
    result.templates = runs.templates()
    return result


def _weight(one: Overlap) -> tuple[int, float]:
    """How much an overlap says: first what kind it is, then how much of the question it is."""
    return -KINDS.index(one.how), one.covers


def find_duplicates(texts: Sequence[str]) -> list[Overlap]:
    """Texts that repeat an earlier one (``question`` is its place): ``exact``, or as near as ``same words``."""
    ours = Texts(texts, Vocabulary(), **ROWS)
    found = [
        Overlap(row, rows[0], "exact", " ".join(ours.words(text)), 1.0)
        for text, rows in enumerate(ours.rows_of)
        for row in rows[1:]
    ]
    gone: set[int] = set()
    for one in sorted(_same_words(ours, ours), key=lambda one: (one.row, one.question)):
        if one.question < one.row and one.question not in gone and one.row not in gone:
            gone.add(one.row)
            first = ours.rows_of[one.question][0]
            row = ours.rows_of[one.row][0]
            found.append(Overlap(row, first, one.how, one.shared, one.covers))
    return sorted(found, key=lambda one: one.row)


def _of_rows(one: Overlap, ours: Texts, theirs: Texts) -> Iterable[Overlap]:
    """An overlap of different texts as that of the rows that have them."""
    question = theirs.rows_of[one.question][0]
    return (Overlap(row, question, one.how, one.shared, one.covers) for row in ours.rows_of[one.row])


# --- the same words in the same order --------------------------------------------------------------------------------


def _exact(ours: Texts, theirs: Texts) -> dict[int, Overlap]:
    return {
        text: Overlap(text, theirs.text_of[ids], "exact", " ".join(ours.words(text)), 1.0)
        for ids, text in ours.text_of.items()
        if ids in theirs.text_of
    }


# --- runs of words ---------------------------------------------------------------------------------------------------


class _Runs:
    """Runs of at least RUN words that texts share with questions, and which of them are templates'."""

    def __init__(self, ours: Texts, theirs: Texts) -> None:
        self.ours, self.theirs = ours, theirs
        hash_of = ours.vocabulary.hashes()
        places, self.their_places = ours.runs(), theirs.runs()
        hashes = run_hashes(hash_of, ours, places)
        self.their_hashes = run_hashes(hash_of, theirs, self.their_places)
        shared = among(hashes, np.unique(self.their_hashes))
        self.places, self.hashes = places[shared], hashes[shared]
        self.distinct, first = np.unique(self.hashes, return_index=True)
        self.examples = self.places[first]
        self.is_template = self._templates()

    def _templates(self) -> np.ndarray:
        """For each different run that is shared: whether it stands in many texts, numbers and any one word open."""
        is_template = np.zeros(len(self.distinct), dtype=bool)
        if not len(self.distinct):
            return is_template
        vocabulary = self.ours.vocabulary
        masked = np.where(vocabulary.numbers(), np.uint64(1), vocabulary.hashes())
        sides = [self.ours.sample(), self.theirs.sample()]
        for open_place in range(RUN):
            wanted, back = np.unique(run_hashes(masked, self.ours, self.examples, open_place), return_inverse=True)
            for texts in sides:
                places = texts.runs()
                hashes = run_hashes(masked, texts, places, open_place)
                is_template |= (counted(wanted, hashes, texts.text[places]) > texts.most)[back]
        return is_template

    @property
    def by_template(self) -> set[int]:
        """Texts that share a run."""
        return set(np.unique(self.ours.text[self.places]).tolist())

    def templates(self, shown: int = 5) -> list[str]:
        counts = counted(self.distinct, self.hashes, self.ours.text[self.places])
        order = [i for i in np.argsort(-counts, kind="stable") if self.is_template[i]][:shown]
        return [
            " ".join(self.ours.vocabulary.words[i] for i in self.ours.ids[self.examples[o] : self.examples[o] + RUN])
            for o in order
        ]

    def found(self) -> list[Overlap]:
        telling = ~self.is_template[np.searchsorted(self.distinct, self.hashes)]
        wanted = self.distinct[~self.is_template]
        questions: dict[int, list[int]] = defaultdict(list)
        asked = among(self.their_hashes, wanted)
        for place, value in zip(self.their_places[asked].tolist(), self.their_hashes[asked].tolist(), strict=True):
            questions[value].append(place)
        pairs: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # text and question: runs of the latter
        ended: dict[tuple[int, int], int] = {}  # text, and how far apart the two are: the end of the run behind
        for place, value in zip(self.places[telling].tolist(), self.hashes[telling].tolist(), strict=True):
            text = int(self.ours.text[place])
            for other in questions[value]:
                if place < ended.get((text, other - place), -1):
                    continue
                before, behind = self._extent(place, other)
                ended[text, other - place] = place + behind
                if before + behind >= RUN:
                    question = int(self.theirs.text[other])
                    first = other - before - int(self.theirs.starts[question])
                    pairs[text, question].append((first, first + before + behind))
        return [found for pair, runs in pairs.items() if (found := self._judged(*pair, runs))]

    def _extent(self, place: int, other: int) -> tuple[int, int]:
        """How many words before and from these places on are the same in both texts."""
        ours, theirs = self.ours, self.theirs
        text, question = int(ours.text[place]), int(theirs.text[other])
        most = min(ours.starts[text + 1] - place, theirs.starts[question + 1] - other)
        same = ours.ids[place : place + most] == theirs.ids[other : other + most]
        behind = int(most if same.all() else np.argmin(same))
        most = min(place - ours.starts[text], other - theirs.starts[question])
        same = (ours.ids[place - most : place] == theirs.ids[other - most : other])[::-1]
        before = int(most if same.all() else np.argmin(same))
        return before, behind

    def _judged(self, text: int, question: int, runs: list[tuple[int, int]]) -> Overlap | None:
        size = int(self.theirs.starts[question + 1] - self.theirs.starts[question])
        covered = np.zeros(size, dtype=bool)
        for start, end in runs:
            covered[start:end] = True
        start, end = max(runs, key=lambda run: run[1] - run[0])
        share = float(covered.mean())
        if end - start >= LONG:
            how = KINDS[1]
        elif share >= COVERED:
            how = KINDS[2]
        else:
            return None
        return Overlap(text, question, how, " ".join(self.theirs.words(question, start, end)), share)


# --- the same words, moved -------------------------------------------------------------------------------------------


def _same_words(ours: Texts, theirs: Texts) -> list[Overlap]:
    """Texts whose words are a question's in any order, but for one that is added, missing or another.

    A text's sum of hashes says which words it has; less one of these, which it has but for one. Two texts are
    candidates where one of their sums agrees.
    """
    hash_of = ours.vocabulary.hashes()
    our_sums, our_texts = _sums(ours, hash_of)
    their_sums, their_texts = (our_sums, our_texts) if theirs is ours else _sums(theirs, hash_of)
    wanted = np.unique(our_sums[among(our_sums, np.unique(their_sums))])
    mine, others = counted(wanted, our_sums, our_texts), counted(wanted, their_sums, their_texts)
    wanted = wanted[(mine <= ours.most) & (others <= theirs.most) & (others > (ours is theirs))]
    if not len(wanted):
        return []
    questions: dict[int, set[int]] = defaultdict(set)
    asked = among(their_sums, wanted)
    for value, question in zip(their_sums[asked].tolist(), their_texts[asked].tolist(), strict=True):
        questions[value].add(question)
    rare = _rare(ours) & _rare(theirs)
    tried: set[tuple[int, int]] = set()
    found = []
    hit = among(our_sums, wanted)
    for value, text in zip(our_sums[hit].tolist(), our_texts[hit].tolist(), strict=True):
        for question in sorted(questions[value]):
            if (text, question) not in tried and not (theirs is ours and question >= text):
                tried.add((text, question))
                if one := _same(ours, theirs, text, question, rare):
                    found.append(one)
    return found


def _sums(texts: Texts, hash_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the sum of its words' hashes, and for each of its words the sum of the others'; and the texts."""
    values = hash_of[texts.ids]
    sums = np.add.reduceat(values, texts.starts[:-1]) if len(texts) else np.zeros(0, dtype=np.uint64)
    return np.concatenate([sums, sums[texts.text] - values]), np.concatenate([np.arange(len(texts)), texts.text])


def _rare(texts: Texts) -> np.ndarray:
    """Which words are in few texts."""
    pairs = np.unique(texts.ids.astype(np.int64) << 32 | texts.text)
    return np.bincount(pairs >> 32, minlength=len(texts.vocabulary.words)) <= texts.most


def _same(ours: Texts, theirs: Texts, text: int, question: int, rare: np.ndarray) -> Overlap | None:
    mine, other = ours.words(text), theirs.words(question)
    added, gone = _surplus(mine, other), _surplus(other, mine)
    if mine == other or len(added) > 1 or len(gone) > 1 or any(map(is_number, added + gone)):
        return None
    vocabulary = ours.vocabulary
    shared = [word for word in dict.fromkeys(other) if word not in gone]
    telling = [word for word in shared if word.isdecimal() or rare[vocabulary.ids[word]]]
    if len(telling) < TELLING or not _numbers_stay(mine, other):
        return None
    words = " ".join(word for word in other if word not in gone)
    return Overlap(text, question, "same words", words, 1 - len(gone) / len(other))


def _surplus(some: list[str], others: list[str]) -> list[str]:
    left = list(some)
    for word in others:
        if word in left:
            left.remove(word)
    return left


def _numbers_stay(mine: list[str], other: list[str]) -> bool:
    """Whether every number stands beside a word that it stands beside in the other text."""
    before = set(zip(["", *other], other, strict=False))
    behind = set(zip(other, [*other[1:], ""], strict=False))
    pairs = zip(["", *mine], mine, [*mine[1:], ""], strict=False)
    return all((a, b) in before or (b, c) in behind for a, b, c in pairs if is_number(b))
