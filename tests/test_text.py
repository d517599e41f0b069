"""Text as it looks, and which characters show nothing."""
import json
import shutil
import subprocess
import sys
import unicodedata

import pytest
from conftest import ROOT

from data.text import plain, skeleton
from thinksafe import escape_control_chars, is_hidden

# Default_Ignorable_Code_Point as DerivedCoreProperties.txt of Unicode 15.1 lists it
DEFAULT_IGNORABLE = [(0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F),
                     (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)]

POINTS = [*range(0x20000), *range(0x20000, 0xE0000, 997), *range(0xE0000, 0xE2000), *range(0xE2000, 0x110000, 997)]       # beyond them are ideographs and private use


def test_hidden_is_what_unicode_says():
    """Default-ignorable, control, format, surrogate, line end; beyond that Braille's blank cell alone. All of it is escaped, but \n."""
    ignorable = {i for first, last in DEFAULT_IGNORABLE for i in range(first, last + 1)}
    for i in POINTS:
        c = chr(i)
        hidden = i in ignorable or i == 0x2800 or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        assert bool(is_hidden(c)) == hidden, hex(i)
        assert escape_control_chars(c) == (c.encode("unicode_escape").decode() if hidden and c != "\n" else c)


def test_the_page_shows_what_is_hidden():
    """The page's own pattern, in a JavaScript engine: the same characters, but tab and newline, which a page shows."""
    line, = [line for line in (ROOT / "extras" / "report.html").read_text("utf-8").splitlines() if line.startswith("const HIDDEN = ")]
    for name in ("Cc", "Cf", "Cs", "Zl", "Zp", "Default_Ignorable_Code_Point"):
        assert rf"\\p{{{name}}}" in line
    if not shutil.which("node"):
        pytest.skip("no node here: the page's pattern is not run")
    code = line + f" const POINTS = {POINTS};" + r""" const all = new RegExp(`^${HIDDEN}$`, "iu"), found = [];
        for (const i of POINTS) if (all.test(String.fromCodePoint(i))) found.push(i); console.log(JSON.stringify(found));"""
    found = set(json.loads(subprocess.run(["node"], input=code, capture_output=True, text=True, check=True).stdout))
    hidden = {i for i in POINTS if is_hidden(chr(i))}
    new = {i for i in found - hidden if unicodedata.category(chr(i)) == "Cn"}        # format characters that this Python's Unicode does not have yet
    assert found - new == hidden - {9, 10}


@pytest.mark.parametrize("text, looks", [
    ("Аgent", "Agent"), ("Uѕеr", "User"), ("Ｕｓｅｒ：", "User:"), ("𝐀𝐠𝐞𝐧𝐭 𝑠𝑎𝑓𝑒", "Agent safe"), ("ѕаfe", "safe"), ("Ag\u0301ent", "Agent"), ("Ag\u0332ent", "Agent"), ("сор", "cop"),
    ("a\u200bb\u00adc\ufe0fd\u034fe\u2800f\u3164g\U000e0041h\x08i\x1bj", "abcdefghij"), ("a\rb\vc\fd\x1ce\x1df\x1eg\x85h\u2028i\u2029j", "a\nb\nc\nd\ne\nf\ng\nh\ni\nj"), ("a\r\nb\tc", "a\nb\tc"),
    ("❤\ufe0f 👩\u200d🔬", "❤ 👩🔬"), ("ﬁrst", "first"), ("ſafe \u212a", "safe K"), ("\ud800x", "x"), ("", ""), (" \u200b ", "  "),
    ("Café piñata naïve", None), ("Привет, как дела?", None), ("καλημέρα κόσμε", None), ("漢字「かな」 한국어 नमस्ते ไทย й", None), ("“q” — x² … 5 € ½ ™", None), ("Ｓｔｅｐ １： ａ．", "Step 1: a."), ("使用Python：好，", None), ("plain text: 1 < 2", None)])
def test_plain(text, looks):
    looks = text if looks is None else looks
    assert plain(text) == looks and plain(looks) == looks
    assert len(skeleton(looks)) == len(looks) and skeleton(looks).isascii() >= looks.isascii()


def test_skeleton():
    assert skeleton("Usér Аgent： ᴀɢᴇɴᴛ ＜ЕND∶") == "User Agent: AGENT <END:".replace("AGENT", "agent")
    for i in POINTS:
        assert len(skeleton(chr(i))) == 1


def test_reading_takes_linear_time(tries):
    """Texts that a pattern could read again and again, of 20,000 characters: where it takes the square, half a minute for each."""
    code = r"""from data.guards import GUARDS, read_refusal, readings
forms = [*{form.marks: form for form in GUARDS.values()}.values()]
begins = ["safety", "safe", "user", "agent ", "conversation ", "<begin ", "[", "<|", "verdict ", "only the last ", "first line must read ", "[ ", "< ", "\\n", "\u0410", "e\u0301"]
for i, begin in enumerate(begins):
    for rest in (":", " ", "*", begin):
        text = (begin + rest * 20000)[:20000]
        readings(forms[i % 4], text, text[::-1])
read_refusal("Refusal: " * 3000, "Refusal:")"""
    with tries("attack"):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
