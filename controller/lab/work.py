"""What the lab's agents do: they read documentation step by step, with tools, and remember. Pure and deterministic.

``step(state, corpus)`` gives the next state from the state and the corpus alone, so that an agent which was moved to another
region can be compared, byte for byte, with one that never was. States look like those of real agents (a conversation with tool
calls and their results, notes, a plan) and grow until old messages are folded into notes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from controller.errors import Misconfigured

State = dict[str, Any]

PASSAGE_CHARS = 4000
STATE_MAX_BYTES = 200_000
KEPT_MESSAGES = 20
"""Messages that stay as they are when older ones are folded into notes."""
NOTES_KEPT = 200
MAX_FILE_BYTES = 2 * 2**20
SUFFIXES = (".txt", ".md", ".rst", ".py")
STANDARD_FILES = ("pydoc_data/topics.py", "argparse.py", "doctest.py", "inspect.py", "typing.py", "decimal.py", "_pydecimal.py")

_WORD = re.compile(r"[A-Za-z][A-Za-z_]{3,}")
_HEADING = re.compile(r"^(?:#+ .+|class \w+.*|\S.*\n[=\-*~^]{4,}$)", re.MULTILINE)
_DEFINITION = re.compile(
    r"^[ \t]*(?:async )?def (\w+)\(([^)\n]{0,80})|^(\w+) (?:is|are|means|returns) ([^.\n]{10,120})", re.MULTILINE
)
_SENTENCE = re.compile(r"[A-Z][^.\n]{30,200}\.")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages to read, and the hash that says which corpus it is."""

    passages: tuple[tuple[str, str], ...]
    """(where, text)"""
    sha256: str


def load_corpus(directory: Path | None = None) -> Corpus:
    """Text files of a directory, or (None) documentation and sources that come with every CPython. Raises Misconfigured."""
    if directory is None:
        root = Path(os.__file__).parent
        files = [path for path in (root / name for name in STANDARD_FILES) if path.is_file()]
    else:
        root = directory
        files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    passages: list[tuple[str, str]] = []
    for path in files:
        if path.stat().st_size > MAX_FILE_BYTES:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        name = path.relative_to(root).as_posix()
        passages.extend(
            (f"{name}:{at}", text[at : at + PASSAGE_CHARS]) for at in range(0, len(text), PASSAGE_CHARS) if text[at:].strip()
        )
    if not passages:
        raise Misconfigured(f"no text files below {root}", hint=f"name a directory with files ending in {', '.join(SUFFIXES)}")
    return Corpus(tuple(passages), hashlib.sha256(msgspec.json.encode(passages)).hexdigest())


# ------------------------------------------------------------------------------------------------------------------ tools


def _terms(text: str) -> list[tuple[str, int]]:
    counts = Counter(word.lower() for word in _WORD.findall(text))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def count_words(text: str, choice: int) -> str:
    """How many words, and the most frequent ones."""
    terms = _terms(text)
    top = ", ".join(f"{word} {count}" for word, count in terms[: 5 + choice % 5])
    return f"{len(text.split())} words, {len(terms)} different terms; most frequent: {top}"


def find_headings(text: str, choice: int) -> str:
    """Headings and classes."""
    found = [match.group(0).split("\n")[0].strip() for match in _HEADING.finditer(text)]
    return "\n".join(found[: 10 + choice % 10]) or "no headings"


def grep(text: str, choice: int) -> str:
    """Lines that contain one of the passage's frequent terms."""
    terms = _terms(text)
    if not terms:
        return "nothing to look for"
    word = terms[choice % min(len(terms), 12)][0]
    lines = [line.strip() for line in text.splitlines() if word in line.lower()]
    return f"{len(lines)} lines contain {word!r}:\n" + "\n".join(lines[:8])


def extract_definitions(text: str, choice: int) -> str:
    """Functions, and sentences that say what something is."""
    found = [" ".join(part for part in match.groups() if part) for match in _DEFINITION.finditer(text)]
    return "\n".join(found[: 8 + choice % 8]) or "no definitions"


def summarise(text: str, choice: int) -> str:
    """The sentences whose terms are the passage's most frequent ones, in their order."""
    weight = dict(_terms(text)[:40])
    sentences = _SENTENCE.findall(text)
    scored = sorted(
        range(len(sentences)), key=lambda n: (-sum(weight.get(word.lower(), 0) for word in _WORD.findall(sentences[n])), n)
    )
    return " ".join(sentences[n] for n in sorted(scored[: 2 + choice % 3])) or "no sentences"


TOOLS: Mapping[str, Callable[[str, int], str]] = {
    "count_words": count_words,
    "find_headings": find_headings,
    "grep": grep,
    "extract_definitions": extract_definitions,
    "summarise": summarise,
}


# ------------------------------------------------------------------------------------------------------------------ steps


def begin(agent: str, spec: Mapping[str, object]) -> State:
    """The state before the first step."""
    goal = str(spec.get("goal") or "read the documentation and keep notes of what matters")
    return {
        "agent": agent,
        "step": 0,
        "goal": goal,
        "messages": [{"role": "user", "content": goal}],
        "notes": [],
        "terms": {},
        "folded": 0,
    }


def step(state: State, corpus: Corpus) -> State:
    """The next state. Does not change the one that is given."""
    number = int(state["step"]) + 1
    seed = int.from_bytes(hashlib.sha256(f"{state['agent']}:{number}".encode()).digest()[:8], "big")
    where, text = corpus.passages[seed % len(corpus.passages)]
    tool = sorted(TOOLS)[(seed >> 20) % len(TOOLS)]
    result = TOOLS[tool](text, seed >> 40)
    call = {"role": "assistant", "tool": tool, "arguments": {"passage": where}, "id": f"call-{number}"}
    answer = {"role": "tool", "id": f"call-{number}", "content": result, "excerpt": text[: 400 + seed % 800]}
    terms = dict(state["terms"])
    for word, count in _terms(text)[:3]:
        terms[word] = terms.get(word, 0) + count
    following = {**state, "step": number, "messages": [*state["messages"], call, answer], "terms": _bounded(terms)}
    return _fold(following)


def _bounded(terms: dict[str, int]) -> dict[str, int]:
    """The most frequent 300, in a fixed order."""
    return dict(sorted(sorted(terms.items(), key=lambda item: (-item[1], item[0]))[:300]))


def _fold(state: State) -> State:
    """Old messages become notes when the state has grown too large."""
    if len(encode(state)) <= STATE_MAX_BYTES:
        return state
    old, kept = state["messages"][1:-KEPT_MESSAGES], state["messages"][-KEPT_MESSAGES:]
    content = " ".join(str(message.get("content", "")) for message in old)
    note = {
        "steps": f"{state['folded'] + 1}..{state['step']}",
        "messages": len(old),
        "terms": _terms(content)[:20],
        "gist": summarise(content[:20_000], 2)[:1000],
    }
    notes = [*state["notes"], note][-NOTES_KEPT:]
    return {**state, "messages": [state["messages"][0], *kept], "notes": notes, "folded": state["step"]}


def encode(state: State) -> bytes:
    """Equal states give equal bytes."""
    return msgspec.json.encode(state, order="sorted")


def decode(body: bytes, agent: str) -> State:
    """Raises Misconfigured when it is not a state of this agent."""
    try:
        state = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Misconfigured(
            f"the checkpoint of agent {agent!a} is not a state: {error}", hint="give it another name"
        ) from error
    if state.get("agent") != agent or not isinstance(state.get("step"), int):
        raise Misconfigured(f"the checkpoint is of agent {state.get('agent')!r}, not of {agent!a}", hint="give it another name")
    return state


def fleet_specs(count: int, payment_every: int = 10) -> dict[str, dict[str, object]]:
    """Names and task specs of a lab fleet: one in ``payment_every`` is of the class that needs two copies of every step."""
    specs: dict[str, dict[str, object]] = {}
    for number in range(1, count + 1):
        payment = payment_every > 0 and number % payment_every == 0
        name = f"{'payment' if payment else 'reader'}-{number:04d}"
        specs[name] = {"class": "payment" if payment else "reader", "copies": 2 if payment else 1}
    return specs
