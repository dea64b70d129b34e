"""Caption tokens as the COCO tools count them: Penn-Treebank rules, lower case, most punctuation dropped.

The COCO tools call Stanford's Java tokenizer. These rules were written from its observed output and are compared with it in the tests
(stored output always, the tool itself where it is installed); they hold for English captions. Text that captions do not hold
(long e-mail addresses, mark-up, letters of a few rare scripts) may be cut elsewhere.
"""
import re

DROPPED = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Abbreviations that keep their full stop; those of the second list only when capitalised, those of the third before a number.
_ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri mr mrs ms dr drs prof profs sr jr rev gen col capt lt
    lieut sgt gov govs sen sens rep reps st ste adm brig cmdr cpl hon maj messrs pres pvt supt supts det mme mlle esq ave blvd rd mt ft sq
    bldg ala ariz calif colo conn dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wyo inc co corp ltd bros
    cos plc pty assn dept univ intl est etc vs al tel cf alex wm jos mfg natl bancorp sys cie ph.d ed.d""".split()
_CAPITALISED = "ark del ill la mass miss ore pa tex wash".split()
_BEFORE_NUMBER = "no nos fig figs pp".split()
_SPLIT_WORDS = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3, "'tis": 2, "'twas": 2, "y'all": 2}  # cut after
_SYMBOLS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "\u00a3": "#", "\u20ac": "$", "\u00a2": "cents",
            "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", '"': "''", "\u201c": "``", "\u201d": "''", "\u00ab": "``", "\u00bb": "''",
            "\u2018": "`", "\u2026": "...", "\u2013": "--", "\u2014": "--"}

_W = r"[^\W_]"  # a letter or digit
_END = rf"(?!{_W})"


def _any_case(words):
    return "(?i:" + "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) + ")"


_TOKEN = re.compile("|".join([
    r"</?[A-Za-z][^<>\s]*>",
    r"https?://[^\s\"]*[^\s\".,;:!?]|www\.[^\s\"]*[^\s\".,;:!?]",
    rf"[\w.+-]+@{_W}+(?:[.-]{_W}+)*|@\w+|\#[A-Za-z]{_W}*",
    r"(?P<smile>[:;=]-?[()])",
    r"(?P<ellipsis>\.{3,}|\.\s\.\s\.)",
    r"(?P<dashes>-{2,})",
    rf"(?P<split>{_any_case(_SPLIT_WORDS)}{_END})",
    r"[A-Za-z](?:\.[A-Za-z])+" + _END + r"\.?",
    rf"(?:{_any_case(_ABBREVIATIONS)}|(?:{'|'.join(word.capitalize() for word in _CAPITALISED)}))\.(?!\.|{_W})",
    rf"{_any_case(_BEFORE_NUMBER)}\.(?=\s?\d)",
    rf"[A-Za-z]\.(?!\.|{_W})",
    rf"{_W}*[A-Za-z]{_W}*(?:\.[A-Za-z]{{2,}})+{_END}|[A-Za-z]{{2,}}\.[A-Za-z]{_END}",  # names of sites and files, a missing blank
    rf"[A-Za-z]+[?!][A-Za-z]+{_END}",
    r"[-+]?\d+(?:[.,:/]\d+)*[.,:]\d+(?:[.,:/]\d+)*|[-+.,]\d+(?:[.,:]\d+)*(?!\d)",
    r"[A-Z]+(?:&[A-Z]+)+" + _END + r"|[Cc](?:\+\+|\#)",
    r"'[Nn]'|'(?:[Nn]|[Ee]m|cause)" + _END + rf"|(?<!\d)'\d\ds?{_END}",
    rf"(?i:[odl]'{_W}{{2,}}|ma'am|c'mon|s'mores|d'ye|ol'){_END}",
    rf"(?i:n't|'(?:s|m|d|ll|re|ve)){_END}",
    rf"{_W}+?(?=[Nn]'[Tt]{_END})",
    rf"{_W}+(?:[-/]{_W}+)*?(?=-?[Nn]'[Tt]{_END})(?<=[-/]{_W})",
    rf"{_W}+(?:[-/_]{_W}+)*",
    r"[!?]+|''|``",
    r"[^\s\u200b-\u200f\ufe00-\ufe0f\U00010000-\U0010ffff]",
]), re.UNICODE)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"'}


def ptb_tokenize(text):
    """All tokens of a text, lower case, punctuation included.

    >>> ptb_tokenize("A man's dog isn't running.")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'running', '.']
    """
    text = text.replace("\u2019", "'")
    for entity, sign in _ENTITIES.items():
        text = text.replace(entity, sign)
    tokens = []
    for match in _TOKEN.finditer(text):
        token, kind = match.group(), match.lastgroup
        if kind == "split":
            cut = _SPLIT_WORDS[token.lower()]
            tokens += [token[:cut], token[cut:]]
        elif kind == "smile":
            tokens.append(token[:-1] + _SYMBOLS[token[-1]])
        else:
            tokens.append({"ellipsis": "...", "dashes": "--"}.get(kind) or _SYMBOLS.get(token, token))
    return [token.lower() for token in tokens]


def caption_tokens(text):
    """The tokens that caption metrics count: those of :func:`ptb_tokenize` without the punctuation the COCO tools drop.

    >>> caption_tokens("A man, riding a wave.")
    ['a', 'man', 'riding', 'a', 'wave']
    """
    return [token for token in ptb_tokenize(text) if token not in DROPPED]
