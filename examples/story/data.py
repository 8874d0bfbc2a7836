"""What is learnt: text, and pairs of a better and a worse answer, from Python itself or from files."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as byte_decoders
from torch import Tensor

SEQUENCE = 128  # tokens in a sequence, at most
IGNORE = -100  # the target where no loss is taken: prompt and padding
SMALLEST_TEXT = 16 * SEQUENCE  # tokens
FEWEST_PAIRS = 10
MODULES = """
argparse array ast asyncio base64 bisect builtins bz2 calendar codecs collections configparser contextlib
copy csv datetime decimal difflib dis email.message enum fileinput fractions ftplib functools gettext
glob gzip hashlib heapq html.parser http.client http.cookiejar imaplib inspect io ipaddress itertools
json linecache locale logging mailbox math mimetypes multiprocessing numbers operator os os.path pathlib
pdb pickle pkgutil platform plistlib pprint queue random re sched selectors shelve shlex shutil signal
smtplib socket socketserver stat statistics string struct subprocess symtable sys sysconfig tarfile
tempfile textwrap threading time timeit tokenize trace traceback types unicodedata unittest unittest.mock
urllib.parse urllib.request uuid warnings weakref webbrowser xml.dom.minidom xml.etree.ElementTree
xmlrpc.client zipfile zlib
"""


class Example(NamedTuple):
    """Strings."""

    prompt: str
    chosen: str
    rejected: str


class Pair(NamedTuple):
    """Token ids; the prompt begins with the start token, an answer that is whole ends in the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Batch(NamedTuple):
    tokens: Tensor  # (batch, T)
    targets: Tensor  # (batch, T): the next token, or IGNORE
    extra: Any = None  # what else a stage's loss reads


class Tokens(NamedTuple):
    """A tokenizer, ours or a Hugging Face model's own."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    start: int
    end: int
    size: int


class Data(NamedTuple):
    text: Tensor  # token ids
    text_held_out: Tensor
    pairs: list[Pair]
    pairs_held_out: list[Pair]
    plain_words: frozenset[str]  # the commonest of the text


def fail(message: str) -> NoReturn:
    """One line, exit code 2."""
    print(f"finetune: {message}", file=sys.stderr)
    sys.exit(2)


# ---- text and pairs, as strings -------------------------------------------------------------------


def read_file(option: str, path: Path, characters: int = -1) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(characters)
    except OSError as error:
        fail(f"{option} {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{option} {path}: not UTF-8 text ({error.reason})")
    if not text.strip():
        fail(f"{option} {path}: the file is empty")
    return text


def documentation() -> str:
    """The reference manual's sections that come with Python as the topics of help()."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        fail("this Python comes without pydoc_data, the default text: give --text FILE")
    return "\n\n".join(topics[name] for name in sorted(topics))


def docstring_examples() -> list[Example]:
    """What does str.strip do? The first sentence of its docstring; rejected: with its words shuffled."""
    sentences: dict[str, str] = {}
    for module_name in MODULES.split():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name, value in sorted(vars(module).items()):
            members = vars(value).items() if inspect.isclass(value) else ()
            for path, member in [(name, value), *((f"{name}.{n}", v) for n, v in sorted(members))]:
                doc = getattr(member, "__doc__", None)
                if "_" in (name[0], path.rsplit(".")[-1][0]) or not callable(member) or not doc:
                    continue
                paragraph = " ".join(inspect.cleandoc(str(doc)).split("\n\n")[0].split())
                sentence = re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]
                if (
                    20 <= len(sentence) <= 160
                    and sentence[0].isupper()
                    and sentence[-1] == "."
                    and sentence.isprintable()
                ):
                    sentences.setdefault(sentence, f"{module_name}.{path}")
    if len(sentences) < 100:
        fail("this Python comes without docstrings, the default pairs: give --data FILE or --text")
    return [
        Example(f"What does {name} do?\n", sentence, shuffled(sentence))
        for sentence, name in sentences.items()
    ]


def shuffled(text: str) -> str:
    """Its words in another order."""
    words = text.split()
    order = torch.randperm(len(words)).tolist()
    if len(set(words)) > 1:
        while [words[i] for i in order] == words:
            order = torch.randperm(len(words)).tolist()
    return " ".join(words[i] for i in order)


def text_examples(text: str) -> list[Example]:
    """The start of a passage, its true continuation, and that one with its words shuffled."""
    words = re.findall(r"\S+\s*", text)
    examples = []
    for i in range(0, len(words) - 32 + 1, 32):
        prompt, chosen = "".join(words[i : i + 12]), "".join(words[i + 12 : i + 32])
        examples.append(Example(prompt, chosen, shuffled(chosen)))
    return examples


def read_examples(path: Path) -> list[Example]:
    """JSON lines: TRL's preference pairs (prompt, chosen, rejected; strings or messages), or `messages`,
    whose last answer is chosen and, with its words shuffled, rejected."""
    examples = []
    for number, line in enumerate(read_file("--data", path).split("\n"), start=1):
        if line.strip():
            try:
                examples.append(example_of(json.loads(line)))
            except (json.JSONDecodeError, RecursionError) as error:
                fail(f"--data {path}, line {number}: not JSON ({error})")
            except ValueError as error:
                fail(f"--data {path}, line {number}: {error}")
    if len(examples) < FEWEST_PAIRS:
        fail(f"--data {path}: {len(examples)} pairs; at least {FEWEST_PAIRS} are needed")
    return examples


def example_of(row: object) -> Example:
    needed = "an object with prompt, chosen and rejected, or with messages, is needed"
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}; {needed}")
    if "messages" in row:
        prompt, answer = conversation("messages", row["messages"])
        return Example(prompt, answer, shuffled(answer))
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"{key!r} is missing; {needed}")
    texts = {}
    for key in ("prompt", "chosen", "rejected"):
        value = row.get(key)
        if isinstance(value, list) and key == "prompt":
            texts[key] = "".join(message_text(key, message) for message in value) + "assistant: "
        elif isinstance(value, list):  # with the prompt in it where there is no "prompt"
            before, texts[key] = conversation(key, value)
            texts.setdefault("prompt", before)
        elif isinstance(value, str):
            texts[key] = checked(key, value, empty=key == "prompt")
        elif key in row or key != "prompt":
            raise ValueError(f"{key!r} is a {type(value).__name__}; a string or messages")
        elif isinstance(row["chosen"], str):
            raise ValueError(f"'prompt' is missing; {needed}")
    return Example(**texts)


def conversation(key: str, messages: object) -> tuple[str, str]:
    """All before the last message, as text, and that one, which is the assistant's."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} is no list of messages")
    texts = [message_text(key, message) for message in messages]
    last = messages[-1]
    if last["role"] != "assistant":
        raise ValueError(f"{key!r} ends with a message of role {last['role']!r}, not 'assistant'")
    return "".join(texts[:-1]) + "assistant: ", last["content"]


def message_text(key: str, message: object) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{key!r}: a message is an object with the strings role and content")
    return f"{message['role']}: {checked(f'content of {key}', message.get('content'))}\n"


def checked(key: str, text: object, empty: bool = False) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is a {type(text).__name__}; a string is needed")
    if not text.strip() and not empty:
        raise ValueError(f"{key!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is no character")
    return text


# ---- as tokens -------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = byte_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_tokens(tokenizer: Tokenizer) -> Tokens:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    return Tokens(encode, tokenizer.decode, start=0, end=1, size=tokenizer.get_vocab_size())


def read_data(text_path: Path | None, data_path: Path | None) -> tuple[str, list[Example]]:
    """The text for the base model and the pairs; what a file does not give comes from the other or Python."""
    text = read_file("--text", text_path, 4_000_000) if text_path else documentation()
    if data_path:
        examples = read_examples(data_path)
    else:
        examples = text_examples(text) if text_path else docstring_examples()
    return text, [examples[i] for i in torch.randperm(len(examples)).tolist()]


def prepare(text: str, examples: list[Example], tokens: Tokens) -> Data:
    """A tenth of the text (its end) and of the pairs is held out."""
    ids = tokens.encode(text)
    if len(ids) < SMALLEST_TEXT or len(examples) < FEWEST_PAIRS:
        fail(f"the text is too small: {len(ids)} tokens; at least {SMALLEST_TEXT} are needed")
    pairs = [encode_pair(tokens, example) for example in examples]
    held_out = min(128, max(FEWEST_PAIRS // 2, len(pairs) // 10))
    whole, cut = torch.tensor(ids), len(ids) - max(SEQUENCE + 1, min(len(ids) // 10, 8192))
    words = Counter(re.findall(r"[a-z]+", text.lower()))
    common = frozenset(word for word, _ in words.most_common(50))
    return Data(whole[:cut], whole[cut:], pairs[held_out:], pairs[:held_out], common)


def encode_pair(tokens: Tokens, example: Example) -> Pair:
    """Of what is too long, the end of the prompt and the start of the answer stay."""
    prompt, chosen, rejected = (tokens.encode(text) for text in example)
    prompt = [tokens.start, *prompt[-SEQUENCE // 2 + 1 :]]
    room = SEQUENCE - len(prompt)
    return Pair(prompt, [*chosen, tokens.end][:room], [*rejected, tokens.end][:room])


def text_batches(text: Tensor, steps: int, batch: int) -> list[Batch]:
    """Random windows. The targets are shifted here, once, so that no logits need be sliced."""
    starts = torch.randint(len(text) - SEQUENCE, (steps, batch, 1))
    windows = text[starts + torch.arange(SEQUENCE + 1)]  # (steps, batch, SEQUENCE + 1)
    return [Batch(window[:, :-1], window[:, 1:]) for window in windows]


def whole_text(text: Tensor, batch: int) -> list[Batch]:
    """All windows, one behind the other."""
    windows = text.unfold(0, SEQUENCE + 1, SEQUENCE)
    return [Batch(part[:, :-1], part[:, 1:]) for part in windows.split(batch)]


def answers_batch(rows: list[tuple[list[int], list[int]]], extra: Any = None) -> Batch:
    """(prompt, answer) in rows of one length; only the answers are targets."""
    shape = len(rows), max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    tokens, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer) - 1
        tokens[row, :end] = torch.tensor([*prompt, *answer[:-1]])
        targets[row, len(prompt) - 1 : end] = torch.tensor(answer)
    return Batch(tokens, targets, extra)


def pairs_batch(pairs: list[Pair], extra: Any = None) -> Batch:
    """Chosen in the first half of the rows, rejected in the second."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    rows += [(pair.prompt, pair.rejected) for pair in pairs]
    return answers_batch(rows, extra)


def shuffled_batches(count: int, steps: int, size: int) -> list[list[int]]:
    """Indices below `count`, each as often as any other, `size` a step."""
    order = torch.cat([torch.randperm(count) for _ in range(steps * size // count + 1)])
    return [part.tolist() for part in order.split(size)[:steps]]
