r"""How an answer is set, which changes nothing of what it says: fonts, colours, spacing, delimiters, ``\text``.

Each function takes text and gives text. Upright letters are letters (``\mathrm{e}``), upright words are ``\text{...}``.
"""

from __future__ import annotations

import re

from rewards.math.guard import TRIGONOMETRIC
from rewards.math.text_errors import Unreadable

STYLED = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|pmb|mathit|mathsf|mathtt|mathnormal|underline|uline|ensuremath|mathop|mathbin|mathord|"
    r"textcolor\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}|color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}(?=\s*\{)|colorbox\s*\{[^{}]*\}|"
    r"fcolorbox\s*\{[^{}]*\}\s*\{[^{}]*\}|fbox|boxed|emph|textup|bbox\s*(?:\[[^\]]*\])?)\s*(?=\{)|"
    r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf)(?![A-Za-z])\s*(?=[A-Za-z0-9])"
)
SWITCH = re.compile(
    r"\\(?:bf|it|rm|sf|tt|bfseries|itshape|boldmath|tiny|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle|"
    r"textstyle|scriptstyle|limits|nolimits|nobreak|null|strut|hfill|centering|color\s*\{[^{}]*\})(?![A-Za-z])\s*"
)
SPACING = re.compile(
    r"\\(?:hspace|vspace|hskip|mspace)\*?\s*\{[^{}]*\}|\\(?:enspace|thinspace|quad|qquad|enskip)(?![A-Za-z])"
)
DROPPED = re.compile(r"\\(?:tag|label|vphantom|hphantom)\*?\s*\{[^{}]*\}")
TEXT = re.compile(
    r"\\(text|textbf|textit|textrm|textsf|texttt|textnormal|textup|emph|mathrm|mbox|hbox|operatorname\*?|rm)"
    r"\s*\{([^{}]*)\}"
)
UPRIGHT = frozenset("eixyznkabpqrjc")  # single letters that are no units where they are set upright
FUNCTION_NAMES = TRIGONOMETRIC | {"ln", "log", "lg", "exp", "tg", "ctg", "arctg", "sen", "max", "min", "gcd", "lcm"}
DIGITS = "0123456789"
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", DIGITS, strict=True))
RAISED = re.compile(f"[{''.join(SUPERSCRIPTS)}]+")
LOWERED = re.compile(f"[{''.join(SUBSCRIPTS)}]+")
DELIMITER = re.compile(r"\\(?:\\|[()\[\]])")  # \\[2pt] is a line break
PROSE = re.compile(r"[A-Za-z][A-Za-z ,.'/-]*")
JOINING = re.compile(r"\s*,?\s*(?:and|or)?\s*,?\s*")


def scripts(text: str) -> str:
    """Raised and lowered Unicode digits as TeX's: ``x²`` is ``x^{2}``."""
    text = RAISED.sub(lambda run: "^{" + "".join(SUPERSCRIPTS[c] for c in run[0]) + "}", text)
    return LOWERED.sub(lambda run: "_{" + "".join(SUBSCRIPTS[c] for c in run[0]) + "}", text)


def with_dollars(text: str) -> str:
    r"""The text with ``$`` for both ends of each ``\(...\)`` and ``\[...\]``, which mean the same."""
    if "\\(" not in text and "\\[" not in text:
        return text
    pieces, position = [], 0
    opened: re.Match[str] | None = None
    for delimiter in DELIMITER.finditer(text):
        symbol = delimiter[0][1]
        if symbol in "([":
            opened = delimiter
        elif symbol in ")]" and opened and opened[0][1] == {")": "(", "]": "["}[symbol]:
            pieces += [text[position : opened.start()], "$", text[opened.end() : delimiter.start()], "$"]
            position, opened = delimiter.end(), None
    return "".join([*pieces, text[position:]])


def without_delimiters(text: str) -> str:
    r"""Without ``$…$``, ``\(…\)`` and bold marks. Words outside of them are text. One ``$`` alone is money."""
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", with_dollars(text))
    if text.startswith("**") and text.endswith("**") and len(text) > 4:
        text = text[2:-2]
    parts = re.split(r"(?<!\\)\$+", text)
    if len(parts) == 1:
        return text
    if len(parts) % 2 == 1:
        parts[::2] = map(_prose, parts[::2])
        return " ".join(parts).strip()
    if len(parts) == 2 and re.match(r"-?\$(?=\s*-?[0-9.])|-?[0-9.,]+\s*\$$", text):
        return re.sub(r"(?<!\\)\$", lambda _: r"\$", text)
    raise Unreadable("a $ that does not match")


def _prose(part: str) -> str:
    stripped = part.strip()
    return rf"\text{{ {stripped} }}" if PROSE.fullmatch(stripped) and not JOINING.fullmatch(stripped) else part


def plain(text: str) -> str:
    """Without fonts, colours, sizes and named spaces."""
    if "\\" not in text:
        return text
    text = DROPPED.sub("", SPACING.sub(" ", text))
    for _ in range(40):
        styled = STYLED.search(text)
        if not styled:
            break
        text = text[: styled.start()] + _ungrouped(text[: styled.start()], text[styled.end() :])
    text = SWITCH.sub(" ", text)
    text = TEXT.sub(_upright, text)
    text = re.sub(r"\\(?:mathrm|operatorname)\s+([A-Za-z])(?![A-Za-z])", r" \1", text)
    return re.sub(r"(?<=[0-9])\s*\\text\{([A-F]{1,4})\}\s*(?=[0-9A-F]*\s*_)", r"\1", text)


def _ungrouped(before: str, rest: str) -> str:
    """The text after a styling command, without the braces of its group where they hold nothing together."""
    depth = end = 0
    for end, symbol in enumerate(rest):  # noqa: B007
        depth += (symbol == "{") - (symbol == "}")
        if depth == 0:
            break
    if not rest.startswith("{"):
        return " " + rest
    inside, after = rest[1:end], rest[end + 1 :]
    binds = re.search(r"[\^_]\s*$|\\[A-Za-z]+\s*$", before) or re.match(r"\s*[\^_!]", after)
    return f"{{{inside}}}{after}" if binds and len(inside) > 1 else f" {inside} {after}"


def _upright(match: re.Match[str]) -> str:
    command, content = match[1], match[2]
    inside = content.strip(" ~")
    if inside in FUNCTION_NAMES:
        return f"\\{inside} "
    if len(inside) == 1 and inside in ("ei" if command.startswith("text") else UPRIGHT):
        return f" {inside} "
    if not re.search(r"[A-Za-z]", content):
        return f" {content} "
    if command == "mathrm" and re.fullmatch(r"\\[A-Za-z]+", inside):
        return f" {inside} "
    return rf"\text{{{content}}}"


# --- fractions and binomials with their sign inside, matrices ---------------------------------------------------------

INFIX = re.compile(r"\\(over|choose)(?![A-Za-z])")
BEGIN = re.compile(
    r"\\begin\s*\{(array|[pbBvV]?matrix|smallmatrix|cases|aligned|gathered)\*?\}\s*(?:(\[[a-z]\])?\{[lcr|@ .{}]*?\})?"
)
ENVIRONMENT = re.compile(r"\\begin\{(array|smallmatrix|matrix)\}(.*?)\\end\{\1\}", re.DOTALL)


def prefixed(text: str) -> str:
    r"""``{1 \over 2}`` as ``\frac{1}{2}``, ``{n \choose k}`` as ``\binom{n}{k}``."""
    for _ in range(20):
        found = INFIX.search(text)
        if not found:
            break
        start, end = _group(text, found.start())
        command = r"\frac" if found[1] == "over" else r"\binom"
        inside = f"{command}{{{text[start : found.start()].strip()}}}{{{text[found.end() : end].strip()}}}"
        text = text[:start] + inside + text[end:]
    return text


def _group(text: str, position: int) -> tuple[int, int]:
    """Where the content of the innermost braces around a position begins and ends."""
    depth, start = 0, position
    while start > 0:
        symbol = text[start - 1]
        depth += (symbol == "}") - (symbol == "{")
        if depth < 0 and (start < 2 or text[start - 2] != "\\"):
            break
        start -= 1
    depth, end = 0, position
    while end < len(text):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth < 0:
            break
        end += 1
    return start, end


def matrices(text: str) -> str:
    r"""``array``, ``matrix`` and ``smallmatrix`` in brackets as ``pmatrix``; systems in ``cases`` as "a and b"."""
    if r"\begin" not in text:
        return text
    text = re.sub(r"\\hline|\\cr(?![A-Za-z])(?=.*\\end)", "", text)
    text = re.sub(r"\\\\\s*\[[^\]]*\]", lambda _: r"\\", text)
    text = BEGIN.sub(lambda match: rf"\begin{{{match[1]}}}", text)
    text = re.sub(r"\\end\s*\{(\w+)\*?\}", r"\\end{\1}", text)
    text = re.sub(r"\\(begin|end)\{(?:small)?matrix\}", r"\\\1{array}", text)
    if system := re.fullmatch(
        r"(?:\\\{\s*\\begin\{(?P<a>array|aligned|gathered)\}(?P<rows>.*)\\end\{(?P=a)\}"
        r"|\\begin\{cases\}(?P<cases>.*)\\end\{cases\})\s*",
        text,
        re.DOTALL,
    ):
        rows = [row.strip(" ,;") for row in re.split(r"\\\\", system["rows"] or system["cases"]) if row.strip(" ,;")]
        if rows and all("=" in row for row in rows):
            return r" \text{ and } ".join(row.replace("&", " ") for row in rows)
    text = re.sub(
        r"([(\[])\s*\\begin\{array\}((?:(?!\\begin).)*?)\\end\{array\}\s*([)\]])",
        lambda match: rf"\begin{{pmatrix}}{match[2]}\end{{pmatrix}}",
        text,
        flags=re.DOTALL,
    )
    return re.sub(r"\\(begin|end)\{array\}", r"\\\1{matrix}", text)
