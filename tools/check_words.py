"""`python -m tools.check_words [PATH ...]`: words in code, tests and docs for which the project has a better one.

Prints FILE:LINE, the word and its replacement; the status is 1 if there are any. Names are compared part by part
(`is_taken`, `TakenBoxes`); comments, strings, documents and the names of tests by whole words and the patterns of
`PROSE`. The changelog is left out: it quotes former names.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastdet", "kernels", "bench", "tools", "tests", "docs", "examples")

WORDS = {
    "door doors": "entry point",
    "house room rooms": "layout, package, space",
    "kin": "variants",
    "meant": "intended",
    "told said says": "reports, gives, message, lines",
    "bake baked": "capture, captured",
    "streak": "growth_tracker",
    "whatever": "the real thing",
}
# Parts of names that are harmless in prose.
NAMES = {
    "taken belonging": "valid, chosen, kept",
    "wait waits waiting": "host_sync",
    "numbers": "settings, or the quantity itself",
    "originals": "original_sizes",
    "facts": "metadata",
    "tell tells say": "report, message, lines",
    "sure": "confident, above_threshold",
    "seen": "inspected, found, visited",
    "look ailing mine far near instead which": "the real thing",
    "recent": "LRUCache",
    "spare": "scratch",
    "want": "compute_losses, compute_detections",
    "as_good": "best_of_gt",
}
# Names of other libraries.
ALLOWED_NAMES = {"wait", "wait_stream", "wait_event", "which", "tell", "numbers"}
PROSE = {
    r"(?<![\w.])locs?": "deltas",
    r"[Bb]ox offsets|offsets from (the |an )?(anchor|them)": "deltas",
    r"host (never )?waits?|[Ww]aits? for (a|the) (GPU|device)|waits? nowhere": "host sync",
    r"(its|same|own|training|evaluation|torchvision's|detectron2's|VGG16's) numbers": "settings, outputs",
    r"\d+ taken": "drawn, sampled, kept",
    r"as (it|they) should": "self-check passed",
    r"(?<!make )(?<!makes )sure": "confident, above the threshold",
    r"knows|if it likes|makes? of (it|them|the|a)": "plain words",
    r"\w*([mtn]alis|initialis|optimis|organis|hronis|quantis|cognis)\w*": "-ize",
    r"\w*([Cc]entre|[Cc]olour|[Ll]abelled|[Nn]eighbour|[Bb]ehaviour|[Gg]rey\b)\w*": "US spelling",
}
NAME_PARTS = {part: better for parts, better in {**WORDS, **NAMES}.items() for part in parts.split()}
PATTERNS = {**{"|".join(words.split()): better for words, better in WORDS.items()}, **PROSE}


def in_prose(text: str) -> list[tuple[str, str]]:
    return [(found[0], better) for part, better in PATTERNS.items() for found in re.finditer(rf"\b({part})\b", text)]


def in_name(name: str) -> list[tuple[str, str]]:
    if name.startswith("test_"):
        return in_prose(name.replace("_", " "))
    parts = {name, *re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)} if name not in ALLOWED_NAMES else ()
    return [(name, NAME_PARTS[part.lower()]) for part in sorted(parts) if part.lower() in NAME_PARTS]


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, word, replacement) of each word in a file; those in the name of the file are on line 0."""
    yield from ((0, *found) for found in in_name(path.stem))
    text = path.read_text()
    prose = [(1, text)]
    if path.suffix == ".py":
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        names = [(token.start[0], token.string) for token in tokens if token.type == tokenize.NAME]
        yield from ((line, *found) for line, name in names for found in in_name(name))
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        prose = [(token.start[0], token.string) for token in tokens if token.type in kinds]
    for start, part in prose:
        yield from ((line, *found) for line, words in enumerate(part.splitlines(), start) for found in in_prose(words))


def main(arguments: list[str]) -> int:
    given = [Path(argument).resolve() for argument in arguments] or [*ROOT.glob("*.md"), *map(ROOT.joinpath, FOLDERS)]
    paths = [path for each in given for path in (sorted(each.rglob("*.*")) if each.is_dir() else [each])]
    paths = [path for path in paths if path.suffix in (".py", ".md")]
    left_out = ROOT / "CHANGELOG.md", Path(__file__).resolve()
    lines = [
        f"{path.relative_to(ROOT)}:{line}: {word} -> {better}"
        for path in paths
        if path not in left_out
        for line, word, better in findings(path)
    ]
    print("\n".join([*lines, f"{len(lines)} words"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
