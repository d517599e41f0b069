"""
Text as it looks, for what a guard reads: other characters can look like those of a guard's frame.

    from data.text import plain, skeleton
    plain("\u0410gent\u200b:\u2028safe")          # "Agent:\nsafe"
"""
import functools
import re
import unicodedata

from thinksafe import is_hidden

LINE_ENDS = "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"        # those of str.splitlines beside \n
# Letters and signs that look like a letter or sign of the guards' frames (from Unicode's
# confusables.txt: Cyrillic, Greek, Armenian, Cherokee, phonetic small capitals).
LOOK_ALIKES = str.maketrans({twin: sign for sign, twins in {
    "a": "аɑαᴀ", "A": "АΑᎪ", "b": "ЬʙᏏ", "B": "ВΒᏴ", "c": "сϲᴄ", "C": "СϹᏟ", "d": "ԁᴅᏧ", "D": "Ꭰ",
    "e": "еҽεєɛᴇ", "E": "ЕΕᎬ", "f": "ꜰք", "F": "Ϝ", "g": "ɡցɢ", "G": "ԌᏀ", "h": "һհʜᏂ", "H": "НΗᎻ",
    "i": "іιıɩɪᎥ", "I": "ІΙӀ", "j": "јϳᴊ", "J": "ЈᎫ", "k": "κᴋ", "K": "КΚᏦ", "l": "ӏǀʟ", "L": "Ꮮ",
    "m": "ᴍ", "M": "МΜᎷ", "n": "ոռɴ", "N": "Ν", "o": "оοσօᴏ", "O": "ОΟՕ", "p": "рρᴘ", "P": "РΡᏢ",
    "q": "ԛզ", "r": "ʀᴦ", "R": "ᎡƦ", "s": "ѕꜱƽ", "S": "ЅՏᏚ", "t": "τᴛ", "T": "ТΤᎢ",
    "u": "υսʋᴜ", "U": "Ս", "v": "νѵᴠ", "V": "ѴᏙ", "w": "ԝաѡᴡ", "W": "ԜᎳ", "x": "хχ", "X": "ХΧ",
    "y": "уүγʏ", "Y": "УΥҮ", "z": "ᴢ", "Z": "ΖᏃ",
    ":": "∶ː꞉։׃܃⁚﹕", "<": "‹˂ᐸ❮〈⟨《«≪⟪", ">": "›˃ᐳ❯〉⟩》»≫⟫",
    "[": "❲〔【⟦", "]": "❳〕】⟧", "/": "⁄∕⧸", "|": "∣",
}.items() for twin in twins} | dict(zip(range(0xFF01, 0xFF5F), range(0x21, 0x7F))))   # full width

@functools.lru_cache(10_000)
def _shown(c):
    """Return "\\n" for a line end, "" for another hidden character, else the character."""
    return "\n" if c in LINE_ENDS else "" if is_hidden(c) and c not in "\n\t" else c

@functools.lru_cache(10_000)
def _ascii(c):
    """Return the ASCII that a character looks like, "" for an accent, else the character."""
    parts = unicodedata.normalize("NFKD", c)
    letters = "".join(part for part in parts if unicodedata.category(part)[0] != "M")
    letters = letters.translate(LOOK_ALIKES)
    return letters if letters.isascii() else c

@functools.lru_cache(10_000)
def _latin(c):
    """Return the ASCII that a letter or digit looks like, "" for an accent by itself. A letter that
    comes with its accent stays, as does any other character."""
    composed = re.match(r"\w+ \w", unicodedata.decomposition(c))
    spelled = c.isalpha() or c.isdecimal() or unicodedata.combining(c)
    return _ascii(c) if spelled and not composed else c

def plain(text):
    """Return a text as it looks: every line end is \\n, hidden characters are left out, and a word
    in which letters only look like ASCII is ASCII, its signs too, if it has a Latin letter or could
    all be ASCII."""
    def word(match):
        found = match[0]
        looks = found if found.isascii() else "".join(map(_latin, found))
        if looks == found:
            return found
        looks = looks.translate(LOOK_ALIKES)
        latin = looks.isascii() or re.search("[A-Za-z]", unicodedata.normalize("NFKD", found))
        return looks if latin else found
    return re.sub(r"\S+", word, "".join(map(_shown, text.replace("\r\n", "\n"))))

def skeleton(text):
    """Return a text of the same length, in which each character that looks like one of ASCII is
    that one."""
    return "".join(_ascii(c) if len(_ascii(c)) == 1 else c for c in text)
