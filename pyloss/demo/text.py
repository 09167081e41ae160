"""English text that every Python has, as word and punctuation numbers.

The text: the language reference in `pydoc_data.topics`, and the docstrings of the standard
library. The docstrings are read with `ast`, so that no module is imported (some open windows or
print when imported). The same Python version always gives the same text in the same order.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNKNOWN = "<unk>"
END = "<end>"  # stands after each document

# Not part of the library proper, or no prose in them; pydoc_data holds the topics read above.
_SKIPPED_DIRECTORIES = frozenset(
    "site-packages dist-packages test tests idle_test idlelib lib2to3 encodings pydoc_data "
    "__pycache__".split()
)
# A word or identifier, a number, an empty line, or one punctuation mark; a mark that is repeated
# (rulers, "...", ">>>") is one token.
_TOKEN = re.compile(r"[^\W\d]\w*(?:'[a-z]+)?|\d+|\n\s*\n|([^\w\s])\1*")
_LONGEST_RUN = 3  # rulers of any length become one of three marks
_VALIDATION_SHARE = 20  # one document in 20

_NO_BLANK_BEFORE = frozenset(". , ; : ! ? ) ] } / -".split())
_NO_BLANK_AFTER = frozenset("( [ { / - @".split())
_QUOTES = frozenset("\" ' ` ``".split())


@dataclass(frozen=True)
class Corpus:
    words: list[str]  # the vocabulary; a token is an index into it
    train: np.ndarray  # int64
    validation: np.ndarray  # int64, whole documents that `train` does not have

    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`; words that are not in the vocabulary become UNKNOWN."""
        index = {word: i for i, word in enumerate(self.words)}
        return [index.get(word, index[UNKNOWN]) for word in tokenize(text)]

    def decode(self, tokens: list[int]) -> str:
        """Readable text: blanks go where English and dotted names put them."""
        out = ""
        glue = True  # no blank before the next token
        open_quotes: set[str] = set()
        for word in (self.words[token] for token in tokens):
            if word in ("\n\n", END):
                out = out.rstrip() + "\n\n"
                glue = True
                open_quotes.clear()
                continue
            closing = word in open_quotes
            dotted = out.endswith(".") and word[0].islower()
            if not (glue or closing or dotted or word in _NO_BLANK_BEFORE):
                out += " "
            out += word
            glue = word in _NO_BLANK_AFTER
            if word in _QUOTES:
                glue = not closing
                open_quotes ^= {word}
        return out.strip()


def tokenize(text: str) -> list[str]:
    """Splits text into words, numbers, punctuation and paragraph ends."""
    tokens = []
    for match in _TOKEN.finditer(text):
        word = match.group()
        if match.group(1):
            word = word[:_LONGEST_RUN]
        elif word.isspace():
            word = "\n\n"
        tokens.append(word)
    return tokens


def _docstrings_of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings_of(child)


def documents() -> list[str]:
    """The texts: one per topic and one per docstring, each text once, in a fixed order."""
    from pydoc_data.topics import topics

    texts = dict.fromkeys(topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    kept = (path for path in files if _SKIPPED_DIRECTORIES.isdisjoint(path.parts))
    for path in sorted(kept, key=lambda p: p.as_posix()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in library sources
            try:
                tree = ast.parse((library / path).read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
        texts.update(dict.fromkeys(_docstrings_of(tree)))
    return list(texts)


def load_corpus(vocabulary: int) -> Corpus:
    """Reads the text, keeps the `vocabulary` most frequent words, and splits by document."""
    tokenized = [[*tokenize(text), END] for text in documents()]
    counts = Counter(word for text in tokenized for word in text)
    by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
    words = [UNKNOWN, *by_frequency[: vocabulary - 1]]
    if len(words) < vocabulary:
        raise RuntimeError(
            f"this Python's documentation has only {len(words)} different words, "
            f"{vocabulary} are needed: is the standard library there as .py files?"
        )
    index = {word: i for i, word in enumerate(words)}
    # The order of the library puts like beside like, so the split takes every 20th document.
    parts: tuple[list[int], list[int]] = ([], [])
    for number, text in enumerate(tokenized):
        part = parts[number % _VALIDATION_SHARE == 0]
        part.extend(index.get(word, 0) for word in text)
    train, validation = (np.array(part, dtype=np.int64) for part in parts)
    return Corpus(words, train, validation)
