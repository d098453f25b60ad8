"""Captions into the words that the COCO caption scores count: the Penn Treebank tokenisation, punctuation dropped.

The official scores (Chen et al. 2015, section 3) run Stanford CoreNLP 3.4.1 with `-preserveLines -lowerCase` and then
drop a list of signs. Here are its rules for English captions as one pattern, found and tested by comparing with it.
`vlm.evaluation.coco_java` runs CoreNLP itself.

A caption is one line: every line break in it, Unicode's included, counts as a space. (The official wrapper replaces
only "\\n", so that any other break shifts all later captions to the wrong picture.)
"""

import re

# Signs of the official list, as they leave a tokeniser that lower-cases: its "-LRB-" and the like never match.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Abbreviations that keep their period; a leading capital is needed where the word alone is common English.
_MONTHS_DAYS = "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri"
_STATES = "ala ariz calif colo conn ct dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt"
_PEOPLE = (
    "jr sr esq mr mrs ms dr drs prof profs sen sens rep reps atty attys lt col gen messrs gov govs adm rev maj sgt cpl "
    "pvt capt pres lieut hon brig cmdr comdr pfc spc supt supts det adj adv asst assoc ens insp mlle mme msgr sfc ph"
)
_OTHERS = (
    "wis wisc wyo inc co cos corp ltd plc bros dept assn univ intl sys etc al seq bhd bancorp rt tel est ext sq st ste "
    "ave mt ft vs alex wm jos cie cf treas bldg invt elec natl blvd rd pty pte mfg mtg"
)
_CAPITALISED = "Ark Del Ill La Mass Miss Ore Pa Tex Wash"
_BEFORE_NUMBERS = "ca fig figs prop nos no art pp op"
# "K. The" ends a sentence; "K. Smith" does not.
_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once "
    "One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)


def _any(words: str) -> str:
    """A pattern for the words, the longest first."""
    return "|".join(sorted(words.split(), key=len, reverse=True))


_ABBREVIATION = f"(?i:{_any(f'{_MONTHS_DAYS} {_STATES} {_PEOPLE} {_OTHERS}')})|{_any(_CAPITALISED)}"
_LETTER = r"[^\W\d_]"
_ALNUM = r"[^\W_]"
_QUOTE = "['`]"
_SHORT = "(?:[msdMSD]|re|ve|ll|RE|VE|LL)"  # 's and the like, behind the apostrophe

# Alternatives in the order of precedence: where two could match, CoreNLP takes the longer.
_TOKEN = re.compile(
    "|".join(
        [
            r"</?[A-Za-z!][^<>]*>",
            r"https?://[^\s\"<>|()]*[^\s\"<>|().!?,;:'-]",
            r"www\.(?:[^\W_][\w-]*\.)*[A-Za-z]{2,4}(?:/[^\s\"<>|()]*[^\s\"<>|().!?,;:'-])?(?![A-Za-z])",
            r"[A-Za-z0-9](?:[\w.+-]*\w)?@[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?(?!\w)",
            r"(?:[A-Za-z0-9][\w-]*\.)+(?:com|org|net|edu|gov)(?:/[^\s\"<>|()]+[^\s\"<>|().!?,;:'-])?(?![A-Za-z0-9])",
            r"(?i:can(?=not(?!\w))|(?:gon|wan)(?=na(?![\w']))|got(?=ta(?![\w']))|(?:gim|lem)(?=me(?![\w'])))",
            r"(?i:'t(?=(?:is|was)(?:n't)?(?!\w))|more(?='n(?!\w)))",
            # Words before n't and 's, 'm, 'd, 're, 've, 'll, and those themselves.
            rf"[A-Za-z]*[A-MO-Za-mo-z](?=[nN]{_QUOTE}[tT](?!{_LETTER}))",
            rf"[nN]{_QUOTE}[tT](?!{_LETTER})",
            rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*(?='{_SHORT}(?!{_LETTER}))",
            rf"'{_SHORT}(?!{_LETTER})",
            # Words with an apostrophe of their own.
            rf"'(?:[nN]'|n(?=\s|$)|em(?!{_LETTER})|[2-9]0s(?!{_ALNUM})|till?(?!{_LETTER})|cause(?!{_LETTER}))",
            rf"[yY]'(?={_LETTER})|[dDoOlL]'{_LETTER}{{2,}}|[A-HJ-XZn]'{_LETTER}{{2,}}",
            rf"{_LETTER}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_LETTER}*",
            r"(?:somethin|Dunkin|[oO]l)'|[lLdDjJ]'(?!s)",
            r"(?:c'mon|nor'easter|s'mores|ev'ry|li'l|nat'l|cont'd)(?!\w)",
            # Joined by slashes, hyphens, ampersands, underscores; telephone numbers.
            r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
            rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:(?:[A-Za-z]\.){{2,}}(?!{_ALNUM})|{_ALNUM}+))+(?:\.(?=[,;:]))?",
            r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+",
            r"\(\d{2,3}\)[- ]?\d{3,4}-\d{3,4}",
            r"[A-Z]+(?:&[A-Z]+)+(?![a-z])",
            # Abbreviations and acronyms with their period, unless a longer word goes on behind it.
            rf"(?:[pP]h\.[dD]|[eE]d\.[dD]|{_ABBREVIATION})\.(?!{_LETTER})",
            rf"(?i:{_any(_BEFORE_NUMBERS)})\.(?=\s?\d)",
            rf"(?P<initial>[A-Za-z])(?=\.\s+(?:{_any(_STARTERS)})\s)",
            rf"[A-Za-z](?:\.[A-Za-z])*\.(?!{_LETTER})",
            # Numbers, words, words with digits in front.
            rf"(?:[-+](?=[\d.]))?\d*(?:[.:,]\d+)+|(?:[-+]\d+|\d+)(?!{_ALNUM})|[-+]\d+",
            r"[A-Z]*\$|[cC]\+\+|[cCfF]#|-[LR][RCS]B-|&#\d+;",
            rf"{_LETTER}+\.(?=[,;:])",
            rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*",
            rf"{_ALNUM}+",
            rf"#{_LETTER}+|@[A-Za-z]\w*",
            # Signs: faces, dots, quotes, dashes, runs.
            rf"[:;=][-o*']?[()DPdp@|\[\]](?!{_ALNUM})",
            r"\.{3}|``|''|-{2,}|[?!]+|\*+|_+|#+|\S",
        ]
    )
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKET = re.compile(r"[()\[\]{}]")
_UNUSUAL = str.maketrans(
    {
        "\u200b": " ",
        "\ufeff": " ",
        "\xad": "",
        "“": '"',
        "”": '"',
        "„": '"',
        "’": "'",
        "‘": "`",
        "—": " -- ",
        "–": " -- ",
        "…": " ... ",
        "½": " 1/2 ",
        "¼": " 1/4 ",
        "¾": " 3/4 ",
        "²": " ² ",
        "³": " ³ ",
        "€": "$",
        "£": "#",
        "¢": " cents ",
    }
)
_ENTITIES = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp);")
_ENTITY = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_DASHES = re.compile("-{3,}")
_BEYOND = re.compile("[\U00010000-\U0010ffff\ud800-\udfff]")
_NEEDS_CONTEXT = re.compile(rf"<|(?:^|[^A-Za-z.])[A-Za-z]\.$|(?i:{_any(_BEFORE_NUMBERS)})\.$|&(?:nbsp|lt);|\(\d+\)$")
_CAPTION_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_INITIAL = re.compile(r"[A-Za-z]\.")
_STARTS = re.compile(rf"\s*(?:{_any(_STARTERS)})\s")
_DROPPED = {'"', *PUNCTUATION}

_KNOWN_MOST = 1 << 17
# Chunk between spaces -> its words, joined by a space; None where its neighbours decide. Captions repeat their words.
_known: dict[str, str | None] = {w: f"{w[:3]} {w[3:]}" for w in ["cannot", "gonna", "wanna", "gotta", "gimme", "lemme"]}


def ptb_tokenize(caption: str, following: str = "") -> str:
    """The lower-case words of a caption, joined by spaces; empty where it holds none.

    following: the next caption. CoreNLP sees captions as lines of one text, and where the next one starts with "A " a
    last "k." is a letter and the end of a sentence, not an initial.
    """
    words: list[str] = []
    chunks = caption.split()
    if following and chunks and len(chunks[-1]) == 2 and _INITIAL.fullmatch(chunks[-1]) and _STARTS.match(following):
        chunks[-1] = chunks[-1][0]
    for chunk in chunks:
        try:
            found = _known[chunk]
        except KeyError:
            found = _learn(chunk)
        if found is None:
            return _words(" ".join(chunks))
        if found:
            words.append(found)
    return " ".join(words)


def _learn(chunk: str) -> str | None:
    plain = _CAPTION_WORD.fullmatch(chunk)
    found = chunk if plain else None if _NEEDS_CONTEXT.search(chunk) else _words(chunk)
    if len(_known) < _KNOWN_MOST:
        _known[chunk] = found
    return found


def _words(text: str) -> str:
    if not text.isascii():
        text = _BEYOND.sub(" ", text.translate(_UNUSUAL))
    if "&" in text:
        text = _ENTITIES.sub(lambda match: _ENTITY[match[0]], text)
    if "---" in text:
        text = _DASHES.sub("--", text)
    tokens = (match[0].lower() for match in _TOKEN.finditer(text))
    return " ".join(_BRACKET.sub(lambda match: _BRACKETS[match[0]], token) for token in tokens if token not in _DROPPED)
