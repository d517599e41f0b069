r"""
Graders: which answer a response commits to, and whether it is right.

    from data.graders import final_answer, same_value
    same_value(final_answer(r"So \boxed{√2/2}."), r"\frac{1}{\sqrt{2}}")     # -> True

An answer that is not understood is wrong. Formulas are read and compared by math-verify, and what
it would round is compared exactly first.
"""
import functools
import logging
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from data.chat import OutOfTime, reopens_thought, time_limit

# ---------------------------------------------------------------------------------------------
# Text to LaTeX

GLYPHS = dict(zip("−–‐‑‒―➖×·⋅∙÷±≤⩽≥⩾≠≈∞∅∪∩∈√∛π°º、٫٬％⌊⌋⌈⌉ℝ", (
    r"- - - - - - - \times \cdot \cdot \cdot / \pm \le \le \ge \ge \ne \approx \infty "
    r"\emptyset \cup \cap \in \sqrt \sqrt[3] \pi ^\circ ^\circ , . , % \lfloor \rfloor \lceil "
    r"\rceil \mathbb{R}"
).split()))
GLYPHS |= {chr(code): "\\" + unicodedata.name(chr(code)).split()[-1].lower()
           for code in range(0x3B1, 0x3CA) if code not in (0x3C2, 0x3BB, 0x3C0)} | {"λ": "\\lambda"}
SMALL = {kind: "".join(c for c in map(chr, range(0xAA, 0x2160))
                       if unicodedata.decomposition(c).startswith(kind) and c not in GLYPHS)
         for kind in ("<super>", "<sub>", "<fraction>")}              # ², ₂ and ½
SMALL_TEXT = re.compile("[{<super>}]+|[{<sub>}]+|[{<fraction>}]".format(**SMALL))

def _write_small(match):
    """Write x², H₂ or ½ (what SMALL_TEXT finds in them) as LaTeX."""
    text = unicodedata.normalize("NFKC", match[0]).replace("−", "-")
    if match[0] in SMALL["<fraction>"]:
        return "\\frac{{{}}}{{{}}}".format(*text.split("⁄"))
    return f"{'^' if match[0][0] in SMALL['<super>'] else '_'}{{{text}}}"

def to_latex(text):
    """Write Unicode mathematics as LaTeX, and digits and punctuation of all scripts as ASCII. Marks
    of code and bold type are taken away."""
    text = SMALL_TEXT.sub(_write_small, text)
    text = re.sub(r"([√∛])\s*(\d+|\w|\(([^()]*)\))", lambda m: f"{m[1]}{{{m[3] or m[2]}}}", text)
    text = "".join(f"{GLYPHS[c]} " if GLYPHS.get(c, "")[-1:].isalpha() else GLYPHS.get(c, c)
                   for c in text)
    text = unicodedata.normalize("NFKC", text)                        # full width, spaces
    text = re.sub(r"(?![0-9])\d", lambda match: str(unicodedata.decimal(match[0])), text)
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w({-])|<sup>(-?\w+)</sup>", r"^\1", text)      # x**2
    marks = r"```[a-z]*\n|`+|\*\*|</?(?:b|i|u|em|strong|code)>|[\u200b-\u200f\ufeff]"
    return re.sub(marks, "", text)

# ---------------------------------------------------------------------------------------------
# The answer that a response commits to

MAX_RESPONSE = 100_000                 # characters at the end of a response that are searched
MAX_ANSWER_CHARS = 400                 # the longest reference answer of MATH-500 has 48
MAX_BOXES = 20
ANSWER_WORD = (                        # "answer" in the larger languages
    r"\b(?:answers?|(?:correct|right|best) (?:option|choice)|respuesta|réponse|antwort|lösung"
    r"|risposta|resposta|antwoord|odpowiedź|cevap|jawaban|ответ|відповідь|đáp án|câu trả lời)\b"
    r"|答案(?:选项)?|答え|答|解答|正解|정답|답|उत्तर|जवाब|উত্তর|الجواب|الإجابة|پاسخ|جواب|คำตอบ")
IS = (r"\b(?:is|are|was|would be|should be|must be|equals|es|est|ist|lautet|è|é|adalah|là)\b"
      r"|是|为|為|は|은|는|هو|هي|है|คือ|=|:|-\s|—")
ANSWER_PHRASE = re.compile(
    rf"(?:{ANSWER_WORD})(?:\s[^\W\d_]+){{0,5}}?[\s*]{{0,8}}(?:{IS})|<(?:final_?)?answer>"
    r"|(?:答案|选[择项]?|उत्तर|ответ|الجواب)\s{0,3}(?=[-$(\\\d]|[A-J](?![a-z]))"
    r"|^[\s#*]{0,8}(?:final |correct )?answer[\s*]{0,8}$|^####\s{0,8}(?=[-$\d.,]+\s*$)",
    re.I | re.M)
LEAD_IN = re.compile(r"(?:[\s:*]|\\approx\b|not [^.,]{1,40}? but\b"
                     r"|(?:approximately|about|exactly|simply|therefore|thus|also)\b)*", re.I)
FORMULA = re.compile(                  # "$5 and $6" holds none
    r"\$\$(.+?)\$\$|\\\((.+?)\\\)|\\\[(.+?)\\\]"
    r"|(?<![\\\w])\$(?!\s)((?:\\.|[^$\\\n])+?)(?<!\s)\$(?!\d)", re.S)
SEPARATOR = re.compile(                # of boxes that are one list
    r"(?:[\s$]|\\[()\[\]]|\\q?quad)*(?:[,;/]|\b(?:and|or|und|et|y|e|и)\b|和|)"
    r"(?:[\s$]|\\[()\[\]]|\\q?quad|\b(?:and|or)\b|[a-z](?:_\{?\d\}?)?\s*=)*")
SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)|[。！？।]|\n|</(?:final_?)?answer>")
DENIAL = (r"\b(?:not|never|no es|no,|wrong|incorrect|except|anything but|different from|rejected"
          r"|worst|nicht|kein\w*|falsch\w*|non|não|pas|не|нет)\b|n't\b|❌|✗|错|不|아니|ない")
DENIED = re.compile(rf"(?:{DENIAL}) +(?:\w+ +)?$", re.I)                  # "not the" answer
RETRACTION = re.compile(               # behind an answer
    r"\A[\s$.,!?*]*(?:no\b|(?:is|was) (?:wrong|incorrect|not)\b)"
    r"|\b(?:correction|actually|or rather|scratch that|i mean)\b.*(?:\d|\b[A-D]\b)", re.I | re.S)
BECAUSE = re.compile(
    r",?\s(?:because|since|(?<!well )as(?! well)|given that|where|which|porque|car|weil)\b.*"
    r"|(?<=\S), not\b(?! correct| right).*", re.S)
VALUE = re.compile(r"[-+$€£¥\\(\[{.\d]|[A-J]\b|[a-z]\s*=|(?:option|choice) \W?[A-J]\b")

def braced_text(text, start):
    """Return what is inside of the braces that open at `start`, or None if they stay open."""
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1:brace.start()]
    return None

def find_boxes(text):
    """Return (start, end, content) of the last boxes of a text that hold something. The content of
    a box that stays open is None."""
    boxes = []
    for match in list(re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(?=(\w)\b))", text))[-MAX_BOXES:]:
        content = match[1] or braced_text(text, match.end() - 1)
        end = len(text) if content is None else match.end() + len(content) + (not match[1])
        if content and content.strip():
            sign = re.search(r"[$=(\[]\s*-\s*$", text[:match.start()][-20:])
            tail = re.match(r"\d+|\s*(?:\^|\\(?:times|cdot)\b)[^$\n.,]{0,30}", text[end:end + 40])
            content = "-" * bool(sign) + content.strip() + (tail[0] if tail else "")
        if content != "":
            boxes.append((match.start(), end, content))
    return boxes

def last_list(boxes, text):
    """Return the content of the last box, with those before it if only commas or "and" are between
    them: three boxes can be one answer 3, 5, 7. None if the last one stays open."""
    parts = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1]):
        between = text[end:start][:100]
        if content is None or start < end or not SEPARATOR.fullmatch(unwrap_text(between)):
            break
        parts.insert(0, content)
    if parts[-1] is None or len(set(parts)) == 1:
        return parts[-1]
    return ", ".join(re.sub(r"^[a-z](?:_\{?\d\}?)?\s*=", "", part.strip(" .")) for part in parts)

def formulas(text):
    """Return (start, end, content) of the formulas of a text."""
    return [(match.start(), match.end(), next(filter(None, match.groups())))
            for match in FORMULA.finditer(text)]

def said_after(text, phrase):
    """Return what is said after "the answer is" (a match of ANSWER_PHRASE): a formula, or the text
    up to the end of the sentence or a reason; and whether it is a value, not prose."""
    start = LEAD_IN.match(text, phrase.end()).end()
    number, rest = NUMBER.match(text, start), text[start:start + MAX_ANSWER_CHARS]
    if number and len(number[0]) > MAX_ANSWER_CHARS / 2:
        return number[0], True
    found = formulas(rest)
    if found and found[0][0] == 0:
        n = 1
        while n < len(found) and SEPARATOR.fullmatch(rest[found[n - 1][1]:found[n][0]]):
            n += 1
        after = SENTENCE_END.split(rest[found[n - 1][1]:])[0]
        if not re.search(r"\b(?:and|or)\b.*\d", after):              # $18$ dollars and $50$ cents
            return last_list(found[:n], rest), True
    sentence = BECAUSE.sub("", SENTENCE_END.split(rest)[0]).strip(" *_")
    is_label = phrase[0].rstrip(" *").endswith((":", ">", "#"))
    is_value = is_label or VALUE.match(sentence)
    return (sentence if len(sentence) < MAX_ANSWER_CHARS else ""), bool(is_value)

def last_line(text):
    """Return the text of the last line, or None if that stops in mid-sentence."""
    text = text.rstrip()[-MAX_ANSWER_CHARS:]
    found = formulas(text)
    if found and not text[found[-1][1]:].strip(" .*"):
        return last_list(found, text)
    line = text.rpartition("\n")[2]
    line = re.sub(r"^\s*(?:\d+[.)]|[-*#>]+)\s+", "", line)              # "3." numbers a list
    ends = re.search(r"[.!*$)}。]$|=\s*[$€£]?[\d.,]+$", line)
    if len(line) == MAX_ANSWER_CHARS or re.search("[a-z] [a-z]", line) and not ends:
        return None
    return re.split(r"(?<=[.!?])\s+", line.strip(" *"))[-1].rstrip(" .")

def final_answer(response):
    r"""Return the answer that a response commits to, as LaTeX, or None.

    Only what follows the last </think> counts; reasoning that is not closed has no answer. Of a
    box and "the answer is" (in one of the larger languages, as a heading, a tag or "#### "), what
    is said last counts: boxes that are one list, or the formula or sentence after the phrase.
    Boxes that are empty do not count, nor phrases that only talk about the answer. Without either
    it is the last line. A last box without a closing brace is no answer, nor is one that is denied
    ("is not 18", "18? No"), or a last line that stops in mid-sentence.
    """
    text = response.rpartition("</think>")[2]
    if reopens_thought(text):
        return None
    text = to_latex(text[-MAX_RESPONSE:])
    boxes = find_boxes(text)
    since = boxes[-1][1] if boxes else 0
    said = []
    for phrase in list(ANSWER_PHRASE.finditer(text, since))[-MAX_BOXES:]:
        answer, is_value = said_after(text, phrase)
        before = text[max(0, phrase.start() - 40):phrase.start()]
        denied = DENIED.search(before) or re.search(DENIAL, phrase[0], re.I)
        if answer and not denied and (is_value or not boxes):
            said.append((is_value, answer, phrase.end()))
    if said:
        _, answer, end = max(said, key=lambda found: found[0::2])        # values, then the last one
        tail = SENTENCE_END.sub("\n", text[end:end + MAX_ANSWER_CHARS]).partition("\n")[2]
    elif boxes:
        answer, tail = last_list(boxes, text), text[since:since + MAX_ANSWER_CHARS]
    else:
        return last_line(text)
    return None if RETRACTION.search(tail) else answer

# ---------------------------------------------------------------------------------------------
# Numbers and letters

NUMBER = re.compile(
    r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")
ZEROS = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9,
         "trillion": 12, "tausend": 3, "millionen": 6, "mille": 3, "millones": 6, "milhões": 6,
         "тысяч": 3, "миллион": 6, "миллиард": 9, "हज़ार": 3, "हजार": 3, "लाख": 5, "करोड़": 7,
         "ألف": 3, "مليون": 6, "万": 4, "萬": 4, "만": 4, "亿": 8, "億": 8, "억": 8, "兆": 12}
MAGNITUDE = rf"\s*({'|'.join(ZEROS)})s?(?![A-Za-z])"
NUMBER_WORD = (r"(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty"
               r"|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred)")
# Words that change the number beside them: sums, powers, bases, denials, ...
CHANGES = (rf"(?:times|over|and|point)\s+{NUMBER_WORD}\b|\b(?:and (?:a|one) half|plus|minus|divided"
           r"|multiplied|square root|sqrt|log|ln|sin|cos|tan|pi|power of|modulo|mod|base|hex|binary"
           r"|squared|cubed|factorial|inverse|repeating|mille|negative|below zero|or more"
           rf"|or less)\b|[√∛∜ΣΠ¬]|{DENIAL}")
# ... magnitudes in other words than those of ZEROS, and fractions
SCALE = (r"(?:half|halves|thirds?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|twentie|hundred"
         r"|thousand|million|billion|trillion)ths?|mila?|milion[ei]?|miliard[oiy]?|miljoen|miljard"
         r"|duizend|milyon|milyar|bin|juta|ribu|miliar|mln|bn|mrd|mio|tsd|milliards?|milliarden?"
         r"|billionen|billones|(?:quadr|quint)illions?|googol|lac|cr|(?-i:(?:[kKMb]|MM)(?!&))|tysi\w+|nghìn"
         r"|ngàn|triệu|tỷ|тыс\w*|млн|млрд|трлн)\b"
         r"|[千百十仟佰천백십]|آلاف|ملايين|مليار|ล้าน|พัน|หมื่น|แสน|লাখ|হাজার|কোটি")
NO_NUMBER = re.compile(                # before it
    r"\b(?:than|least|most|over|under|above|below|between|up to|half|twice|double|triple|times"
    r"|third of|hundred and|anything|from|moins|menos|meno|минус)\b|负|負|マイナス|마이너스"
    rf"|[≥≤<>≠≯≮≲≳≪≫]|!=|=/=|[A-Za-z]\($|{CHANGES}", re.I)
NO_NUMBER_AFTER = re.compile(
    rf"\s?[eixyzn]\b|['!]|[A-Z]\b|\s*(?i:{SCALE})|.*\bor\b|-\w|(?i:.*(?:{CHANGES}))", re.S)

def unwrap_text(latex):
    """Take words in LaTeX out of their command: \\text{ cm} becomes cm."""
    pattern = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
    return re.sub(pattern, r" \1 ", latex).strip()

def parse_number(text, words=False):
    """Return the only number of a text as a Fraction, or None: 18, $1,000.50, 10,\\!080.

    words: whether words and units may stand around it, as in 18 dollars, 60 km/h, 5 million or
    18 (9 eggs at $2 each).
    """
    thin_space = r"\\[!,;: ]\s*(?=\d{3}(?!\d))|\\!|(?<!\d)\\[,;: ]|\\[,;: ](?!\d)"    # not 1\;2
    text = re.sub(thin_space, "", unwrap_text(text))
    for latex, plain in (("{,}", ","), ("\\$", "$"), ("\\%", "%")):
        text = text.replace(latex, plain)
    if words:
        text = re.sub(r"\s\((?:=|[^()]*[a-z]{2})[^()]*\)",                         # a remark
                      lambda remark: remark[0] * bool(
                          re.search(CHANGES, remark[0].replace("(not ", "("), re.I)), text)
        text = re.sub(r"(?<=[a-z])\s*\^\s*\{?-?[1-3]\}?|\^\s*\{?\\circ\}?", "", text)     # m^2
        text = re.sub(r"(?<=[A-Za-z])\s*/\s*(?=[A-Za-z])", " per ", text)
        text = re.sub(r"\b(?:negative|minus|moins|menos|meno|минус)\s+(?=[$\d.])", "-", text)
    text = re.sub(r"\b\d{1,3}(?: \d{3})+\b", lambda match: match[0].replace(" ", ""), text)
    text = re.sub(r"(?<![\w)}$%])\s*-\s*((?:US)?[$€£¥]|USD)?\s*(?=[\d.])", r" \1-", text)
    found = NUMBER.findall(text)
    if len(found) != 1 or len(found[0]) > MAX_ANSWER_CHARS:
        return None
    before, _, after = text.partition(found[0])
    allowed = r"[^\W\d_]*[^\d+*/^=<>\\{}|_~]*" if words else r"[\s$]*"
    if not re.fullmatch(allowed, before + after):
        return None
    zeros = re.match(MAGNITUDE, after, re.I)
    if words and (NO_NUMBER.search(before) or NO_NUMBER_AFTER.match(after)
                  or re.search(r"[A-Za-z]-?$", before)):
        return None
    return Fraction(found[0].replace(",", "")) * 10 ** (ZEROS[zeros[1].lower()] if zeros else 0)

LETTER = re.compile(
    r"(?:(?:i|would|go with|only|statement|so|thus|hence|therefore|la|the|my|correct|right|best"
    r"|final|answer|is|choose|pick|select|option|choice|opción|opção|вариант)\b[\s:,]*|选项\s*)*"
    r"\(?([A-J])(?![A-Za-z0-9_'+*/^-])(.*)", re.I | re.S)
NEXT_LETTER = re.compile(              # behind a letter: another one; A can be the article
    r"(?<![A-Za-z0-9_'])[B-HJ](?![A-Za-z0-9_'])|[,;/&+(]\s*A(?![\w'])"
    r"|\b(?:and|or|und|et|y|o)\s+\(?A(?![\w' ])|(?:[,;/&+]|\b(?:and|or))\s*\(?[b-d](?![\w'])"
    r"|\s\([a-d]\)")
AFTER_LETTER = re.compile(             # what may stand behind the letter that is meant
    r"\W*$|[).:,]+\s.*|\s[-—]\s.*|\\?\s+\(.*|[^\x00-\x7f].*|\)?,?\s*"
    r"(?:is (?:the |my )?(?:correct|right|best|answer)|because|since|as(?! well)|for|not)\b.*",
    re.S)

def choice_letter(text):
    """Return the letter A to D of B, (B), **B**, \\text{Option B}, B) 5 eV or "B is correct"; None
    for any other text. Several letters are no letter."""
    choice = LETTER.fullmatch(unwrap_text(text).strip(" $*.[]"))
    if not choice or choice[1] not in "ABCD":
        return None
    rest = re.sub(r",? (?:and )?not \(?[A-Ja-j]\b.*", "", choice[2], flags=re.S)
    if NEXT_LETTER.search(rest) or re.search(DENIAL, rest, re.I):
        return None
    return choice[1] if AFTER_LETTER.fullmatch(choice[2]) else None

# ---------------------------------------------------------------------------------------------
# Formulas

MONEY = "$€£¥₹"
UNIT = re.compile(
    r"(?<=[\d}\s)])\s*(?:\\(?:text|mathrm|mbox)\{\s*([^{}]*?)\s*\}"
    r"|(?<=\s)(?!squared|cubed|factorial|and\b|or\b)([a-z]{2,}|[a-z]+/[a-z]+)"
    r"|\^\s*\{?\\circ\s*\}?)(?:\^\{?(\d)\}?)?\s*$")
EQUATION = re.compile(                 # the left side of one whose right side is no answer: 2x =
    r"[<>!≤≥/]$|\d\s*\*?\s*[a-z]\b(?!\s*[$\d(])|(?<![a-z])[a-z]\s*[-+*/^]\s*\d", re.I)
UNITS = {"dollar": "$", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "meter": "m"}
NAME = (r"(?:(?!\\(?:sqrt|d?frac|sin|cos|tan|log|ln|sum|prod|int|lim)(?![a-zA-Z]))"
        r"\\?[a-zA-Z]+(?:\s[A-Z]{1,4})?(?:\{[^{}]*\})?(?:_\{?\w+\}?)?(?:\([^()=]*\))?"
        r"|\(\w(?:,\s*\w)*\))")
NAMED = re.compile(rf"(?:^|(?<=,))\s*({NAME})\s*=(?!=)")             # x = 3, y = 4
FUNCTION = r"(?<![\\a-zA-Z])(pi|sqrt|sin|cos|tan|cot|log|ln)(?![a-zA-Z])"

def _tidy(text):
    """Write a formula in the forms that math-verify reads right."""
    text = re.sub(r"(?<!\.)\.\s*$", "", text.strip().strip("$")).strip()
    for pattern, new in (
            (r"\\varnothing|\\\{\s*\\\}|^\{\s*\}$", r"\\emptyset"),
            (rf"^{NAME}\s*\\in\s*(?=\\?[\[({{]|\\left)", ""),                 # x \in [0, 1]
            (r"^\\\{\s*\w\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|[|:])(.*(?:[<>]|\\[lg]e).*)\\\}$",
             r"\1"),                                                        # {x | 0 \le x}
            (r"^\](?=.*,)", "("), (r"(?<=\S)\[$", ")"),                     # ]0, 1[
            (r"\\(?:mathrm|text)\{i\}", "i"), (r"\\text\{\s*\(?base (\d+)\)?\s*\}", r"_{\1}"),
            (r"(?<=\d)[eE]([-+]?\d+)\b", r"\\cdot 10^{\1}"),
            (r"(?<![\w_])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),             # 2 1/2
            (r"(?<![\w_])(\d+)\s*\(", r"\1\\cdot("),
            (FUNCTION, r"\\\1 "), (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
            (r"^(?![^{]*\\pm.*\\pm)([^,()\[{]*)\\pm(.*)$", r"\1+\2, \1-\2")):
        text = re.sub(pattern, new, text)
    if not re.search(r"[<>]|\\[lg]e", text):
        text = re.sub(r",?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)|;", ",", text)
    return text.strip()

def _split_unit(text):
    r"""Split a formula and its unit: "5\text{ cm}^2" is ("5", "cm2"), "5 million" (5 10^6, "")."""
    money = re.match(rf"-?\s*\\?([{MONEY}])", text)
    text, unit = re.sub(rf"\\?[{MONEY}]\s*(?=[\d.])", "", text), money[1] if money else ""
    found = UNIT.search(text)
    if not found or not found.start():
        return text, unit
    word = found[1] or found[2] or "degree"
    zeros = re.match(MAGNITUDE, word)
    if not zeros and re.search(rf"^\s*(?:[eixyzn]$|{SCALE})|{CHANGES}", word, re.I):
        return text[:found.start()], f"?{word}"              # no unit, and no other is the same
    word = (word[zeros.end():] if zeros else word).strip()
    word = re.sub(r"(?<=\w\w)s$", "", word)               # feets, but not ms
    zeros = rf"\cdot 10^{ZEROS[zeros[1]]}" if zeros else ""
    return text[:found.start()] + zeros, UNITS.get(word, word) + (found[3] or "") or unit

def _parse_latex(text):
    """Read a formula -> list of SymPy expressions, in which decimals are exact fractions, i is the
    imaginary unit, and the other variables are real."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, Float, I, Rational, Symbol
    options = LatexExtractionConfig(
        normalization_config=NormalizationConfig(malformed_operators=True))      # units stay
    found = []
    for x in parse(f"\\boxed{{{text}}}", [options], parsing_timeout=None):
        if isinstance(x, Basic):
            names = {s: I if s.name == "i" else Symbol(s.name, real=True) for s in x.free_symbols}
            x = x.xreplace({**names, **{f: Rational(str(f)) for f in x.atoms(Float)}})
        found.append(x)
    return found

def _same_constant(a, b):
    """Tell whether two SymPy constants are equal, exactly or, with roots and the like, to 1,000
    digits. Returns None for anything else."""
    from sympy import Expr, Float, N, UnevaluatedExpr
    if not all(isinstance(x, Expr) and not x.free_symbols and not x.has(UnevaluatedExpr)
               for x in (a, b)):
        return None
    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational or a == b or a.is_infinite or b.is_infinite:
        return a == b
    return bool(abs(N(a - b, 15, maxn=2000)) <= abs(N(b, 15)) * Float(10) ** -1000)

def _same_formula(answer, reference):
    """Tell whether math-verify finds two tidy formulas equal, where it is not more lenient than
    mathematics: an equation is not its right side, a set no tuple, X not x, and 3, 3 not 3."""
    from math_verify import verify
    words = [unwrap_text(text).lower().strip("() .") for text in (answer, reference)]
    if all(re.fullmatch(r"[a-z][a-z .'-]+|\d+:\d+", text) for text in words) and (
            "\\text" in answer + reference or re.search(r"[a-z]{4}|:", words[0])):
        return words[0] == words[1]
    one_letter = r"(?<![\\a-zA-Z{])[a-zA-Z](?![a-zA-Z])|\\[a-zA-Z]+"
    found, expected = (set(re.findall(one_letter, text)) for text in (answer, reference))
    if found != expected and {*map(str.lower, found)} == {*map(str.lower, expected)}:
        return False
    names = NAMED.findall(reference)
    given = NAMED.findall(answer)
    if len(given) > 1 and given != (names or sorted(given)):  # (2, 1) for y, x
        return False
    if not names or names == given:                          # x = 3 is 3, y = 3 is not x = 3
        answer, reference = NAMED.sub("", answer), NAMED.sub("", reference)
        if len(set(given)) > 1:                              # in this order
            answer, reference = (f"({text.strip('()')})" for text in (answer, reference))
    left, _, right = answer.rpartition("=")
    if left.strip(" <>") and "=" not in reference:           # 9 \cdot 2 = 18 is 18
        sum_of_names, no_names = rf"{NAME}\s*[+-]\s*{NAME}\s*", r"[^a-zA-Z]*(?:\\[a-z]+[^a-zA-Z]*)*"
        if not re.fullmatch(f"{sum_of_names}|{no_names}", left):
            return False
        if re.search(r"\d", left) and not _same_formula(left, right):         # 5 = 6
            return False
        answer = right
    closed_infinity = r"\\infty\s*\]|\[\s*-\s*\\infty"
    if answer.count("'") != reference.count("'"):
        return False
    for sign in (":", r"\\l?dots|\.\.\.|'$", "!!", closed_infinity):
        if re.search(sign, answer) and not re.search(sign, reference):
            return False
    brackets = [re.match(r"(?:\\left)?\s*(\\\{|[(\[])|", text)[1] for text in (answer, reference)]
    if "\\{" in brackets and brackets[0] != brackets[1] and None not in brackets:
        return False
    found, expected = _parse_latex(answer), _parse_latex(reference)
    if found and expected:
        same = _same_constant(found[0], expected[0])
        if same is not None:
            return same
        if type(found[0]).__name__ == "FiniteSet" and answer.count(",") != reference.count(","):
            return False
    return bool(verify(expected, found, float_rounding=200, numeric_precision=200,
                       timeout_seconds=None, allow_set_relation_comp=True))

@functools.lru_cache(maxsize=100_000)       # most samples of a problem agree
def same_expression(answer, reference):
    """Tell whether math-verify finds two LaTeX expressions equal, in a second of processor time."""
    import math_verify                          # takes a second: not in the time limit below
    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)      # the limit is ours
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARS:
        return answer == reference
    answer, reference = _tidy(answer), _tidy(reference)
    bases, reference_bases = (re.findall(r"\d_\{?(\d+)", text) for text in (answer, reference))
    if answer == reference or bases not in ([], reference_bases):       # it reads 52_8 as 52
        return answer == reference
    (answer, unit), (reference, expected) = _split_unit(answer), _split_unit(reference)
    if unit != expected and (unit and expected or "?" in unit + expected):
        return False
    try:
        with time_limit(1):
            return _same_formula(answer, reference)
    except (OutOfTime, Exception):              # SymPy raises all kinds of errors
        return False

def same_choice(answer, reference):
    """Tell whether both are the same letter of a multiple choice."""
    return choice_letter(answer) is not None and choice_letter(answer) == choice_letter(reference)

def same_value(answer, reference):
    """Tell whether both are the same number or, if either is no single number, the same
    expression."""
    numbers = parse_number(answer), parse_number(reference)
    return numbers[0] == numbers[1] if None not in numbers else same_expression(answer, reference)

def same_number(answer, reference):
    """As same_value; words around the number, and an equation before it, do not matter."""
    if re.search(r"(?<![\d.,])\d{1,3}\.000(?!\d)", answer):           # 18.000: in Spain 18,000
        return answer == reference
    left, _, right = answer.rpartition("=")                # of 2x = 18 the right side is no answer
    value = answer if EQUATION.search(left) else right
    numbers = parse_number(value, words=True), parse_number(reference)
    return numbers[0] == numbers[1] if None not in numbers else same_expression(answer, reference)

def is_right(grader, response, reference):
    """Tell whether the final answer of a response is right.

    grader: same_value, same_number or same_choice. reference: text, also in GSM8K's form with
    "#### " before it, a number, or a list. Call it from the main thread: elsewhere there is no
    time limit.
    """
    found = final_answer(response)
    if isinstance(reference, list):
        reference = ", ".join(map(str, reference))
    if type(reference) is int:                  # str() stops at 4,300 digits
        reference = f"{Decimal(reference):f}"
    reference = to_latex(str(reference).rpartition("####")[2].strip())
    return bool(found) and grader(found, reference)
