"""The documentation as the tests see it: the tracked pages, with their headings, links, tables and blocks of code."""
import collections
import functools
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]

# line: of the opening fence. info: what stands behind it, "sh local". text: without the fence's own indent.
Block = collections.namedtuple("Block", "line info text")
FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")


class Page:
    def __init__(self, path):
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.text = path.read_text()
        self.blocks, self.prose = split(self.text)

    def __repr__(self):
        return self.name

    @functools.cached_property
    def anchors(self):
        """What may follow # in a link to the page, as GitHub makes it of headings."""
        found, seen = set(re.findall(r"""<a (?:id|name)=["']([^"']+)""", self.prose)), collections.Counter()
        for heading in re.findall(r"^#{1,6} +(.*?) *#*$", self.prose, re.M):
            text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
        return found

    def links(self):
        """Targets of links and images in Markdown and HTML. What is between backticks is no link."""
        text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", self.prose, flags=re.S)
        found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)", text)
        found += re.findall(r"^ {0,3}\[[^]]+\]:\s*<?([^\s>]+)", text, re.M)
        return found + re.findall(r"""<(?:img|a)\b[^>]*\b(?:src|href)=["']([^"']+)""", text)

    def tables(self, heading):
        """First columns of the tables whose header begins so."""
        found = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-| :]+\n((?:\|.*\n?)*)", self.text, re.M)
        return [[line.split("|")[1].strip(" `") for line in rows.splitlines()] for rows in found]

    def local_blocks(self):
        return [block for block in self.blocks if block.info == "sh local"]


def split(text):
    """Blocks of code, and the rest, in which their lines are empty."""
    blocks, prose, fence = [], [], None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        match = FENCE.fullmatch(line.rstrip("\n"))
        if fence is None and match:
            fence, inside = (number, *match.groups()), []
        elif fence is not None and match and match[2].startswith(fence[2]) and not match[3].strip():
            blocks.append(Block(fence[0], fence[3].strip(), "".join(inside)))
            fence = None
        elif fence is not None:
            inside.append(line.removeprefix(fence[1]))
        else:
            prose.append(line)
            continue
        prose.append("\n")
    assert fence is None, f"the block that begins in line {fence[0]} has no end"
    return blocks, "".join(prose)


@functools.cache
def pages():
    """All tracked ones, by name."""
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Page(ROOT / name) for name in sorted(listed.split("\0")) if name and (ROOT / name).exists()]


def page(name):
    return next(page for page in pages() if page.name == name)


def commands(block):
    """The simple commands of a block of shell, as lists of words: enough for what pages show, no parser of shell."""
    text = re.sub(r"\\\n", " ", block.text)
    text = re.sub(r"(?m)(^|\s)#.*$", "", text)
    text = re.sub(r"(?m)^\$ ", "", text)
    quoted = []

    def keep(match):
        quoted.append(match[0])
        return f"\0{len(quoted) - 1}\0"

    text = re.sub(r"'[^']*'|\"(?:[^\"\\]|\\.)*\"", keep, text)
    pieces = re.split(r"&&|\|\||[;|&\n(){}]|\$\(|\bdo\b|\bthen\b", text)
    fill = lambda word: re.sub(r"\0(\d+)\0", lambda match: quoted[int(match[1])], word)
    return [[fill(word) for word in piece.split()] for piece in pieces if piece.split()]
