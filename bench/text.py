"""Text about recruiting whose length in tokens is known without a tokenizer.

1. A text is a sequence of *pieces*. Each piece is exactly one token of SmolLM2's vocabulary, whatever stands beside it
   in the texts made here: a word with the space before it, a mark after a letter, a line break after a mark.
2. Pieces come from sentence patterns ("prose") or from lines of JSON ("rows"), drawn by a seed, cut off at the length.
3. `Part` names a stretch of text by its seed: equal parts are equal text, which is how prompts share a prefix.
4. `Calibration` holds how many tokens another server makes of a piece, and adds to each prompt; `write` corrects by it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Style = Literal["prose", "rows", "fixed"]

# Words that are one token with a space before them. tests/bench/test_load_text.py asks the real tokenizer about each.
WORDS: Final[dict[str, tuple[str, ...]]] = {
    name: tuple(words.split())
    for name, words in {
        "ROLE": """engineer manager analyst designer developer architect scientist accountant nurse teacher writer
            editor consultant administrator specialist director coordinator technician mechanic lawyer assistant
            planner researcher supervisor advisor leader officer operator programmer producer buyer agent clerk driver
            chef pharmacist physician therapist economist instructor trainer inspector contractor investor tester
            auditor translator librarian curator journalist photographer president""",
        "ADJ": """senior junior experienced careful reliable modern complex technical large small global local daily
            weekly critical public private digital secure simple clear strong broad deep practical formal independent
            creative remote flexible permanent temporary legal financial medical industrial commercial regional
            international scientific mechanical electrical electronic academic internal external early recent former
            current new major minor central rapid stable quiet busy distributed automated shared open virtual mobile
            functional relevant detailed accurate consistent efficient responsible professional strategic annual
            regular""",
        "SKILL": """planning budgeting testing design writing research leadership negotiation marketing accounting
            statistics programming networking security translation editing training teaching nursing logistics
            purchasing forecasting modeling reporting documentation maintenance welding recruitment communication
            mathematics chemistry physics biology engineering finance law analysis architecture automation storage
            search compliance auditing sales support inspection calibration simulation optimization scheduling
            procurement analytics robotics genetics surgery photography drafting plumbing manufacturing payroll
            mentoring interviewing databases spreadsheets algorithms Python Java Linux Excel SQL cloud taxation
            economics agriculture""",
        "NOUN": """team project product service platform system budget report process tool department customer client
            market plant hospital school warehouse laboratory office store network database pipeline contract schedule
            program campaign review release migration audit survey catalog prototype factory clinic bank agency
            journal library archive portfolio strategy policy model dashboard interface application website framework
            standard course curriculum study experiment dataset inventory supply quality safety delivery workshop
            vendor partner supplier account document vehicle machine device engine sensor server site branch group
            unit community""",
        "DID": """led built designed managed improved reduced planned tested wrote maintained delivered launched
            supported trained organized reviewed analyzed prepared introduced replaced moved measured automated
            documented negotiated supervised opened closed created developed directed edited expanded founded
            implemented installed monitored operated presented produced published repaired restored simplified solved
            taught translated updated ran owned started completed""",
        "DO": """lead build design manage improve reduce plan test write maintain deliver launch support train organize
            review analyze prepare introduce replace measure document negotiate supervise create develop direct edit
            expand implement install monitor operate present produce publish repair simplify solve teach translate
            update run own start complete compare""",
        "NUMBER": """two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty several
            many""",
        "FIELD": """energy health education insurance banking retail transport software construction agriculture
            aviation shipping tourism media publishing telecommunications mining chemistry biotechnology defense
            hospitality government research security manufacturing technology housing forestry fishing fashion
            entertainment sports music marketing finance medicine law food water textile automotive railway solar""",
        "PLACE": """London Paris Berlin Madrid Rome Vienna Boston Chicago Dublin Amsterdam Toronto Sydney Tokyo Mumbai
            Singapore Seattle Denver Austin Atlanta Oslo Stockholm Copenhagen Helsinki Warsaw Prague Lisbon Athens
            Cairo Melbourne Montreal Vancouver Philadelphia Houston Dallas Detroit Portland Manchester Edinburgh
            Munich Hamburg Brussels Zurich Geneva Barcelona Milan Delhi Shanghai Beijing Seoul""",
        "MONTH": """January February March April May June July August September October November December""",
        "DEGREE": """degree diploma certificate license doctorate qualification course apprenticeship internship""",
        "OFTEN": """often usually carefully quickly directly recently currently previously mostly closely regularly
            successfully quietly clearly also already always""",
        "TONGUE": "English German French Spanish Dutch",
    }.items()
}

# Words that are one token also without the space: they may follow a quotation mark.
BARE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    name: tuple(words.split())
    for name, words in {
        "skill": """testing design writing research statistics security translation editing training teaching reporting
            maintenance communication physics biology engineering law analysis storage search compliance support
            simulation surgery Python Java Linux SQL cloud economics""",
        "field": """energy health education transport software construction media mining defense government technology
            housing forestry fishing fashion music medicine food water solar""",
        "role": "manager scientist teacher writer editor director leader operator agent driver",
        "years": "one two three four five six seven eight nine ten several many",
        "place": "London Paris Rome Boston Chicago",
        "evidence": """team project product service platform system budget report process tool department customer
            market plant hospital school network database contract schedule program review release migration survey
            factory library archive strategy policy model interface application website standard study experiment
            inventory quality safety delivery account document machine device engine sensor server""",
    }.items()
}

_SENTENCES: Final = (
    "The candidate DID the ADJ NOUN of one ADJ FIELD company in PLACE for NUMBER years .",
    "Since MONTH the ADJ ROLE has OFTEN DID a NOUN for NUMBER people in FIELD and SKILL .",
    "We need a ROLE who can DO the NOUN , DO each NOUN and DO our ADJ NOUN .",
    "A DEGREE in SKILL or SKILL is required ; NUMBER years of SKILL would be useful .",
    "Their ADJ team in PLACE DID the NOUN and OFTEN DID SKILL with the ADJ NOUN .",
    "This position is for a ADJ ROLE with knowledge of SKILL , SKILL and SKILL .",
    "They DID NUMBER ADJ projects , DID the NOUN and then DID a new NOUN in PLACE .",
    "Good TONGUE is required and TONGUE is preferred , because the NOUN is in PLACE .",
    "Each ROLE must DO the NOUN with the ADJ ROLE and DO it against the ADJ NOUN .",
    "In MONTH she DID the NOUN from PLACE to PLACE without a ADJ NOUN .",
    "He DID SKILL , SKILL and SKILL for a ADJ ROLE in the FIELD market .",
    "Our company will DO the ADJ NOUN over the next NUMBER months in PLACE .",
)

JUDGE: Final = (
    "Judge this candidate against every line of the job . Repeat each line and quote the evidence for it . "
    "Return JSON with the name , score and evidence :"
)
SEARCH: Final = (
    "Turn these plain words into a structured job search . Return JSON with role , place , skill and years :"
)


def _pieces_of(line: str) -> Iterator[str]:
    for word in line.split():
        yield word if word in ".,;:" else f" {word}"


def _patterns() -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return each sentence as the choices for each of its pieces."""
    spaced = {name: tuple(f" {word}" for word in words) for name, words in WORDS.items()}
    return tuple(tuple(spaced.get(p.strip(), (p,)) for p in _pieces_of(line)) for line in _SENTENCES)


_PATTERNS: Final = _patterns()
_ROW_KEYS: Final = tuple(BARE_WORDS)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt; equal parts are equal text.

    Attributes:
        seed: what its words are drawn from; for a fixed part the words themselves.
        num_tokens: of SmolLM2's vocabulary.
        is_shared: stands in several prompts, so that its length is never adjusted for one of them.
    """

    seed: str
    num_tokens: int
    style: Style = "prose"
    is_shared: bool = False


def fixed(line: str) -> Part:
    """Return a part that is this line, words and marks apart by spaces; each must be one token."""
    return Part(line, len(line.split()), "fixed", True)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a server counts: `constant_tokens` for each prompt and `tokens_per_piece` for each piece."""

    tokens_per_piece: float = 1.0
    constant_tokens: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether every piece is one token there too."""
        return self.tokens_per_piece == 1.0

    @classmethod
    def of_probes(cls, first: tuple[int, int], second: tuple[int, int]) -> Calibration:
        """Derive it from two (pieces, prompt tokens counted) pairs; the second text is the longer one."""
        (few, few_counted), (many, many_counted) = first, second
        if many_counted - few_counted == many - few:
            return cls(1.0, few_counted - few)
        rate = max((many_counted - few_counted) / (many - few), 0.1)
        return cls(rate, round(few_counted - few * rate))


class Writer:
    """Makes prompts; keeps the text of shared parts, so that thousands of prompts share it in memory and time."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibration = calibration or Calibration()
        self._shared: dict[tuple[Part, int], str] = {}

    def write(self, parts: Sequence[Part]) -> str:
        """Return a prompt that the server counts as the sum of the parts' tokens, or nearly so if it is not exact.

        The last part that is not shared takes up the difference; it keeps at least one piece.
        """
        wanted = [part.num_tokens for part in parts]
        if self.calibration != Calibration():
            wanted = self._corrected(parts)
        return "".join(self._text(part, n) for part, n in zip(parts, wanted, strict=True))

    def _corrected(self, parts: Sequence[Part]) -> list[int]:
        rate = self.calibration.tokens_per_piece
        sizes = [p.num_tokens if p.style == "fixed" else max(1, round(p.num_tokens / rate)) for p in parts]
        total = round((sum(p.num_tokens for p in parts) - self.calibration.constant_tokens) / rate)
        own = [i for i, part in enumerate(parts) if not part.is_shared]
        if own:
            sizes[own[-1]] = max(1, sizes[own[-1]] + total - sum(sizes))
        return sizes

    def _text(self, part: Part, num_pieces: int) -> str:
        if part.style == "fixed":
            return "".join(_pieces_of(part.seed))
        if not part.is_shared:
            return "".join(pieces(part.seed, num_pieces, part.style))
        key = (part, num_pieces)
        if key not in self._shared:
            self._shared[key] = "".join(pieces(part.seed, num_pieces, part.style))
        return self._shared[key]


def pieces(seed: str, num_pieces: int, style: Style = "prose") -> list[str]:
    """Return exactly this many pieces drawn from a seed; the same on every machine and version of Python."""
    rng = random.Random(seed)
    make = _rows if style == "rows" else _prose
    found: list[str] = []
    while len(found) < num_pieces:
        found += make(rng)
    return found[:num_pieces]


def _prose(rng: random.Random) -> list[str]:
    draw = rng.random
    lines: list[str] = []
    for _ in range(3 + int(draw() * 4)):
        pattern = _PATTERNS[int(draw() * len(_PATTERNS))]
        lines += [choices[0] if len(choices) == 1 else choices[int(draw() * len(choices))] for choices in pattern]
    return [*lines, "\n"]


def _rows(rng: random.Random) -> list[str]:
    """Return one line of JSON. The keys keep their order: that is what makes answers copy-heavy."""
    row: list[str] = []
    for key in _ROW_KEYS:
        values = BARE_WORDS[key]
        row += [' "' if row else ' {"', key, '":', ' "', values[int(rng.random() * len(values))]]
        if key == "evidence":
            pattern = _PATTERNS[int(rng.random() * len(_PATTERNS))]
            row += [choices[int(rng.random() * len(choices))] for choices in pattern[:-1]]
        row.append('",' if key != _ROW_KEYS[-1] else '"},')
    return [*row, "\n"]
