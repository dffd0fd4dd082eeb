"""Games of Wordle, for the built-in environment ``wordle``: a hidden word of five letters, guessed in six turns.

The word (``secret``) is a column of the row, and the prompt does not tell it. A hash of the word decides the split, so
held-out words are never trained on. Where there are fewer words than rows, words come again in other games.
"""

from __future__ import annotations

import random
from itertools import cycle, islice
from typing import Any, Literal

from data.dataset import builds_dataset
from data.splits import held_out

Split = Literal["train", "eval"]

DEFAULT_SIZE = {"train": 4_096, "eval": 256}
EVAL_SHARE = 6  # one word in 6 is held out
QUESTION = (
    "Game {game}: guess the hidden English word of five letters in {max_turns} turns. Each answer shows your guess "
    "and, below each letter, G if it is right in this place, Y if it is elsewhere in the word, - if it is not in it. "
    "Put your guess last."
)

_LIST = """
about above actor acute admit adult after again agent agree ahead alarm album alert alike alive allow alone along
angel anger angle angry apart apple apply arena argue arise array aside asset avoid award aware badly baker basic
basis beach began begin being below bench birth black blade blame blank blast blind block blood board boost booth
bound brain brand brave bread break breed brick bride brief bring broad brown brush build built buyer cabin cable
candy carry catch cause chain chair chalk charm chart chase cheap check cheer chest chief child chose civil claim
class clean clear climb clock close cloth cloud coach coast count court cover craft crane crash cream crime cross
crowd crown curve cycle daily dance death debut delay depth dirty doubt dozen draft drama dream dress drill drink
drive eager early earth eight elder elect empty enemy enjoy enter entry equal error event every exact exist extra
faith false fault fiber field fifth fight final first flame flash fleet floor fluid focus force forth forty forum
found frame fresh front fruit fully funny giant given glass globe glory grace grade grain grand grant grass grave
great green greet gross group grown guard guess guest guide habit happy harsh heart heavy hello horse hotel house
human humor ideal image index inner input issue joint judge juice known label labor large laser later laugh layer
learn lease least leave legal lemon level light limit liver local logic loose lower loyal lucky lunch magic major
maker march match maybe mayor medal media mercy metal meter might minor minus mixed model money month moral motor
mount mouse mouth movie music naked nerve never night noble noise north novel nurse ocean offer often olive onion
order other ought outer owner paint panel paper party patch pause peace phase phone photo piano piece pilot pitch
place plain plane plant plate point pound power press price pride prime print prior prize proof proud prove punch
pupil queen quick quiet quite radio raise range rapid ratio reach react ready refer relax reply rider ridge right
rival river robot rough round route royal rural salad scale scene scope score sense serve seven shade shake shall
shape share sharp sheep sheet shelf shell shift shine shirt shock shoot shore short shown sight silly since skill
sleep slice slide small smart smile smoke snake solid solve sorry sound south space spare speak speed spell spend
spice split spoke sport staff stage stair stake stand start state steam steel steep stick still stock stone store
storm story strip stuff style sugar suite sunny super sweet swing table taken taste teach thank theme there thick
thing think third those three throw tight tired title today topic total touch tough tower track trade trail train
treat trend trial tribe trick truck truly trunk trust truth twice uncle under union unity until upper upset urban
usage usual valid value video virus visit vital vocal voice waste watch water weigh wheel where which while white
whole whose woman world worry worse worst worth would wound write wrong yield young youth zebra
"""
WORDS = tuple(_LIST.split())
"""The words that may be hidden, and guessed."""


def rows(split: Split, size: int | None = None, seed: int = 0, *, max_turns: int = 6) -> list[dict[str, Any]]:
    """Rows of ``prompt``, ``secret`` and ``max_turns``.

    Row ``i`` does not depend on ``size`` (None is ``DEFAULT_SIZE``). Raises ValueError for arguments that make no
    sense.
    """
    if split not in DEFAULT_SIZE:
        raise ValueError(f"split is train or eval, not {split!r}")
    if not isinstance(max_turns, int) or max_turns < 1:
        raise ValueError(f"max_turns: need at least 1, got {max_turns!r}")
    wanted = DEFAULT_SIZE[split] if size is None else size
    words = [word for word in WORDS if held_out(f"wordle/{word}", EVAL_SHARE) == (split == "eval")]
    random.Random(f"wordle/{split}/{seed}").shuffle(words)
    first = 1 if split == "train" else 1_000_001  # games have numbers of their own in each split
    return [
        {"prompt": QUESTION.format(game=first + i, max_turns=max_turns), "secret": word, "max_turns": max_turns}
        for i, word in enumerate(islice(cycle(words), wanted))
    ]


build = builds_dataset(rows)
